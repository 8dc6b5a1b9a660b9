"""docs/metrics.md says what the exporter does, all of it; the guide beside it forgets no alert."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from steerscope import config
from steerscope.catalog import store
from steerscope.catalog.model import ModelMatch
from steerscope.demo.paths import CATALOG_DIR
from steerscope.export import otlp_events
from steerscope.export.instruments import INSTRUMENTS, activation_bounds, bounds_for
from steerscope.export.prometheus import HubCollector
from steerscope.steering.admission import RESERVED_NAMES
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.totals import PHASES, CanaryOutcome, CanaryTotals, EngineTotals, HubTotals
from steerscope.telemetry.tracks import EngineKey
from steerscope.telemetry.windows import MIN_TOKENS, DriftWindow

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dashboards"))

from steerscope_dashboards import settings
from steerscope_dashboards.recording import BURNS
from steerscope_dashboards.reference import labels, page
from steerscope_dashboards.reference.__main__ import main
from steerscope_dashboards.reference.examples import EXAMPLES
from steerscope_dashboards.reference.uses import uses

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "dashboards" / "generated"
GUIDE = (ROOT / "docs" / "operators-guide.md").read_text(encoding="utf-8")
ENUMERATED = ("phase", "reason", "outcome", "op", "mode")


@pytest.fixture(scope="module")
def text():
    return page.page(GENERATED)


class Totals:
    """One engine, of the embedded model's catalog."""

    def __init__(self, catalog):
        columns, bounds = Columns(catalog), bounds_for(catalog)
        window = DriftWindow(catalog.document.baselines, columns, 900.0)
        width = len(columns.features)
        for phase in range(len(PHASES)):
            acts_nF = np.zeros((MIN_TOKENS, width), np.float32)
            window.add(phase, slice(0, width), acts_nF, time.monotonic())
        engine = EngineTotals(columns, catalog.signals, bounds, window)
        engine.frames = 1
        engine.steered += 1
        self.engines = {EngineKey("demo", "0"): engine}


@pytest.fixture(scope="module")
def exported():
    """The values that an exporter gives to each label of each metric, where it has an engine."""
    catalog = store.load(CATALOG_DIR)
    hub = HubTotals(canaries={"known": CanaryTotals(scores={"doubt": 0.5})})
    hub.undelivered.update({"metrics": 0, "logs": 0})
    registry = CollectorRegistry(auto_describe=False)
    registry.register(HubCollector(catalog, Totals(catalog), hub, tuple, ModelMatch.EXACT))
    found = defaultdict(set)
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            for label, value in sample.labels.items():
                found[family.name, label].add(value)
    return found


@pytest.mark.parametrize("seed", ["1", "2"])
def test_the_page_is_up_to_date_and_the_same_each_time(seed):
    script = ROOT / "scripts" / "generate_metrics_reference.sh"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(
        [script, "--check"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_page_that_is_out_of_date_is_told_and_left_alone(tmp_path, capsys):
    mine = tmp_path / "metrics.md"
    mine.write_text("# Metrics\n")
    assert main(["--check", "--out", str(mine)]) == 1
    assert "run `make metrics-reference`" in capsys.readouterr().err
    assert mine.read_text() == "# Metrics\n"
    assert main(["--out", str(mine)]) == 0
    assert main(["--check", "--out", str(mine)]) == 0


def test_every_instrument_has_its_section_with_help_unit_and_example(text):
    sections = dict(re.findall(r"^## (steerscope_\w+)\n(.*?)(?=^## )", text, re.M | re.S))
    assert list(sections) == [instrument.name for instrument in INSTRUMENTS]
    for instrument in INSTRUMENTS:
        section = sections[instrument.name]
        assert instrument.help in section
        assert f"- {instrument.kind}, unit `{instrument.unit}`" in section
        query = section.split("```promql\n")[1].split("\n```")[0]
        assert instrument.name in query


def test_enumerated_labels_have_the_values_that_the_exporter_gives_them(exported):
    checked = 0
    for instrument in INSTRUMENTS:
        for label in set(instrument.labels) & set(ENUMERATED):
            said = set(re.findall(r"`(\w+)`", labels.values(instrument, label)))
            said -= {"model_name", "engine"}
            assert said == exported[instrument.name.removesuffix("_total"), label]
            checked += 1
    assert checked >= 12


def test_labels_that_a_catalog_fills_name_what_is_always_there(exported):
    names = {instrument.name: instrument for instrument in INSTRUMENTS}
    said = labels.values(names["steerscope_signal_requests_total"], "label")
    always = exported["steerscope_signal_requests", "label"] - {"low", "elevated", "high"}
    assert set(re.findall(r"`(\w+)`", said)) == always
    said = labels.values(names["steerscope_steering_requests_total"], "policy")
    found = exported["steerscope_steering_requests", "policy"]
    assert set(re.findall(r"`(\w+)`", said)) == found - {"every-way"} == RESERVED_NAMES
    said = labels.values(names["steerscope_otel_dropped_total"], "signal")
    assert set(re.findall(r"`(\w+)`", said)) == exported["steerscope_otel_dropped", "signal"]


def test_prometheus_understands_every_example(tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    rules = [
        {"record": f"example:{instrument.name}", "expr": str(example.vector)}
        for instrument, example in EXAMPLES.items()
    ]
    file = tmp_path / "examples.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "examples", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(INSTRUMENTS)} rules found" in done.stdout


def test_a_rule_on_a_recorded_series_uses_the_metric_that_was_recorded():
    used = uses(GENERATED)["steerscope_signal_score_ratio"]
    assert "SteerscopeHallucinationRiskRising" in used.alerts
    assert "model_name:steerscope_risk_excess:ratio_rate1h" in used.recordings


def test_every_alert_and_dashboard_is_found_by_some_metric():
    found = uses(GENERATED).values()
    rules = yaml.safe_load((GENERATED / "alerting.rules.yaml").read_text())["groups"]
    alerts = {rule["alert"] for group in rules for rule in group["rules"]}
    assert {alert for used in found for alert in used.alerts} == alerts
    assert len({board for used in found for board in used.boards}) == 4


def test_the_buckets_of_activations_are_those_of_catalogs_at_the_limits(text):
    for limit in map(int, re.findall(r"buckets of a catalog of up to (\d+) features", text)):
        last, next_one = map(activation_bounds, (limit, limit + 1))
        said = re.search(rf"up to {limit} features: (.*), \+Inf", text)[1]
        assert tuple(map(float, said.split(", "))) == last
        assert last != next_one


def test_every_attribute_of_the_event_is_there(text):
    spelled = {
        value
        for name, value in vars(otlp_events).items()
        if name.isupper() and isinstance(value, str) and name != "EVENT"
    }
    assert set(page.EVENT_ATTRIBUTES) == spelled
    assert all(f"| `{attribute}` |" in text for attribute in spelled)
    assert otlp_events.EVENT in text


def test_the_operators_guide_has_one_row_for_each_alert_with_its_severities():
    severities = defaultdict(list)
    for group in yaml.safe_load((GENERATED / "alerting.rules.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            found = severities[rule["alert"]]
            found += {rule["labels"]["severity"]} - set(found)
    rows = re.findall(r"^\| \[(\w+)\]\(\.\./dashboards/(\S+)\) \| ([\w, ]+) \|", GUIDE, re.M)
    told = {f"Steerscope{name}": (page, severity.split(", ")) for name, page, severity in rows}
    assert told == {name: (f"runbooks/{name}.md", found) for name, found in severities.items()}
    assert len(rows) == len(told)
    assert all((ROOT / "dashboards" / page).is_file() for page, _ in told.values())


def test_the_operators_guide_has_the_burn_rates_and_floors_that_are_shipped():
    shipped = settings.load(ROOT / "dashboards" / "settings.yaml")
    for burn in BURNS:
        above = f"{100 * burn.factor * shipped.objective.budget:.0f}%"
        row = f"| {burn.long} and {burn.short} | {burn.factor:g} | {above} | {burn.severity} |"
        assert row in GUIDE
    assert f"Less than {shipped.floors.sequences} scored sequences" in GUIDE
    assert f"the alert wants {shipped.floors.drift_tokens} (`floors.drift_tokens`)" in GUIDE
    assert f"Below {MIN_TOKENS} tokens" in GUIDE


def test_the_operators_guide_shows_a_canary_that_the_demo_can_have():
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", GUIDE, re.M | re.S)
    tree = {"catalog": str(CATALOG_DIR), **yaml.safe_load(text)}
    found = config.from_tree(tree, base=ROOT, where="the guide").canary
    bands = {s.name: {label.label for label in s.labels} for s in store.load(CATALOG_DIR).signals}
    for check in found.checks.values():
        assert all(label in bands[signal] for signal, label in check.expect.items())


def test_the_operators_guide_lists_what_can_come_of_a_canarys_run():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \|$", GUIDE.split("## The canary")[1], re.M)
    assert rows == list(CanaryOutcome)
