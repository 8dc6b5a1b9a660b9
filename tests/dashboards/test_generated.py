"""What is shipped: complete, consistent, up to date, and about nothing that does not exist."""

import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from steerscope.export.instruments import INSTRUMENTS, SIGNAL_SCORE, Kind
from steerscope_dashboards import expressions, recording
from steerscope_dashboards.alerts import VLLM_RUNNING, alerts
from steerscope_dashboards.pages import TAGS, Board

ROOT = Path(__file__).resolve().parents[2]
RUNBOOKS = ROOT / "dashboards" / "runbooks"


@pytest.fixture(scope="module")
def trees(generated):
    return [json.loads(path.read_text()) for path in expressions.boards(generated)]


def _panels(tree):
    return [panel for panel in tree["panels"] if panel["type"] != "row"]


@pytest.mark.timeout(300)
def test_the_files_are_what_the_generator_makes(tmp_path):
    script = ROOT / "scripts" / "generate_dashboards.sh"
    done = subprocess.run([script, "--check"], capture_output=True, text=True, check=False)
    if "No matching distribution" in done.stderr:
        pytest.skip("Grafana's Foundation SDK cannot be installed")
    assert done.returncode == 0, done.stderr
    made = subprocess.run([script, "--check", "--out", tmp_path], capture_output=True, check=False)
    assert made.returncode == 1


def test_every_metric_that_is_named_exists(generated, shipped):
    exported = {VLLM_RUNNING}
    for instrument in INSTRUMENTS:
        exported.add(instrument.name)
        if instrument.kind is Kind.HISTOGRAM:
            exported |= {instrument.name + end for end in ("_bucket", "_count", "_sum")}
    exported |= {recorded.name for recorded in recording.recordings(shipped)}
    named = set()
    for path in generated.iterdir():
        text = re.sub(r"https?://\S+", "", path.read_text())
        named |= set(re.findall(r"[a-z_]*:?\bsteerscope_\w+(?::\w+)?|vllm:\w+", text))
    assert named
    assert named <= exported


def test_the_metric_of_vllm_exists_in_vllm():
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        pytest.skip("vLLM is not installed")
    loggers = Path(found.origin).parent / "v1" / "metrics" / "loggers.py"
    assert f'name="{VLLM_RUNNING}"' in loggers.read_text()


def test_there_is_one_dashboard_for_each_purpose(trees):
    assert {tree["uid"] for tree in trees} == set(Board)
    for tree in trees:
        assert tree["tags"] == list(TAGS)
        assert [link["tags"] for link in tree["links"]] == [["steerscope"], ["vllm"]]
        assert tree["schemaVersion"] == 39


def test_dashboards_have_their_variables(trees):
    offered = {tree["uid"]: [v["name"] for v in tree["templating"]["list"]] for tree in trees}
    for names in offered.values():
        assert names[:3] == ["datasource", "model", "engine"]
    assert "feature" in offered[Board.FEATURE]
    assert "signal" in offered[Board.OVERVIEW]


def test_every_variable_that_is_used_is_offered(trees):
    for tree in trees:
        offered = {variable["name"] for variable in tree["templating"]["list"]}
        used = set(re.findall(r"\$\{?([a-z]+)", json.dumps(tree["panels"])))
        assert used <= offered, tree["uid"]


def test_every_panel_says_what_it_shows_and_what_to_do(trees):
    for tree in trees:
        for panel in _panels(tree):
            shows, action = panel["description"].split("\n\n**What to do:** ")
            assert shows.endswith(".")
            assert len(action) > 20, panel["title"]
            assert panel["datasource"]["uid"] == "${datasource}"


def test_panels_over_scores_show_exemplars_and_no_others_do(trees):
    """Scores alone carry traces, and only in their buckets over time."""
    asking = {
        target["expr"]: panel["type"]
        for tree in trees
        for panel in _panels(tree)
        for target in panel["targets"]
        if target.get("exemplar")
    }
    buckets = f"{SIGNAL_SCORE.name}_bucket"
    assert set(asking) == {
        target["expr"]
        for tree in trees
        for panel in _panels(tree)
        for target in panel["targets"]
        if buckets in target["expr"] and not target["instant"]
    }
    assert set(asking.values()) == {"timeseries", "heatmap"}


def test_panels_have_ids_of_their_own_and_lie_apart(trees):
    for tree in trees:
        identities = [panel["id"] for panel in tree["panels"]]
        assert len(set(identities)) == len(identities)
        taken = set()
        for panel in tree["panels"]:
            box = panel["gridPos"]
            cells = {
                (x, y)
                for x in range(box["x"], box["x"] + box["w"])
                for y in range(box["y"], box["y"] + box["h"])
            }
            assert box["x"] + box["w"] <= 24, panel["title"]
            assert not cells & taken, panel["title"]
            taken |= cells


def test_every_alert_has_severity_runbook_and_dashboard(generated):
    tree = yaml.safe_load((generated / "alerting.rules.yaml").read_text())
    for rule in tree["groups"][0]["rules"]:
        is_heartbeat = rule["alert"] == "SteerscopeHeartbeat"
        assert rule["labels"]["severity"] in ({"none"} if is_heartbeat else {"critical", "warning"})
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook_url", "dashboard_url"}
        assert (RUNBOOKS / notes["runbook_url"].rpartition("/")[2]).exists()
        uid = re.search(r"/d/([a-z-]+)", notes["dashboard_url"])
        assert uid is not None
        assert uid[1] in set(Board)


def test_every_alert_has_a_runbook_and_every_runbook_an_alert(shipped):
    pages = {path.stem: path.read_text() for path in RUNBOOKS.glob("*.md")}
    assert set(pages) == {alert.name for alert in alerts(shipped)}
    for name, text in pages.items():
        assert text.startswith(f"# {name}\n"), name
        headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
        assert headings == ["What it means", "What it does not mean", "First three steps"], name
        steps = text.partition("## First three steps\n")[2]
        assert re.findall(r"^(\d)\. ", steps, re.MULTILINE) == ["1", "2", "3"], name


def test_the_operator_s_resource_holds_the_same_rules(generated):
    resource = yaml.safe_load((generated / "prometheusrule.yaml").read_text())
    assert (resource["apiVersion"], resource["kind"]) == (
        "monitoring.coreos.com/v1",
        "PrometheusRule",
    )
    plain = [
        group
        for name in ("recording.rules.yaml", "alerting.rules.yaml")
        for group in yaml.safe_load((generated / name).read_text())["groups"]
    ]
    assert resource["spec"]["groups"] == plain


def test_amtool_accepts_the_example_of_an_alertmanager(prometheus_tools):
    config = ROOT / "dashboards" / "alertmanager" / "alertmanager.yml"
    done = subprocess.run(
        ["amtool", "check-config", config],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 receivers" in done.stdout
    for alert, severity, receiver in (
        ("SteerscopeEngineSilent", "critical", "page"),
        ("SteerscopeCoverageLow", "warning", "ticket"),
        ("SteerscopeHeartbeat", "none", "heartbeat"),
    ):
        routed = subprocess.run(
            [
                *("amtool", "config", "routes", "test", f"--config.file={config}"),
                *(f"alertname={alert}", f"severity={severity}"),
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert routed.stdout.strip() == receiver, routed.stderr


def test_the_pictures_are_small_and_one_for_each_dashboard():
    pictures = {path.stem: path for path in (ROOT / "dashboards" / "previews").glob("*.png")}
    assert set(pictures) == set(Board)
    for path in pictures.values():
        assert path.stat().st_size < 200_000, path.name
