"""The commands of the control plane, as people call them, against a real hub."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading

import msgspec
import pytest
import yaml
from auth_world import Secured, hub_with, somebody
from hub_world import frame, start
from steerscope.cli import completion
from steerscope.cli.main import main
from steerscope.cli.output import yaml_text
from steerscope.cli.report import spark
from steerscope.hub import launcher

pytestmark = pytest.mark.timeout(60)

CLAMP = {"feature": "known", "clamp": 6.0}
FULL = {
    "name": "full",
    "description": "all of it\nin two lines",
    "max_dose": 0.5,
    "interventions": [
        {
            "feature": "known",
            "at_least": 2.5,
            "phase": "generation",
            "only_if_active": True,
            "when": {"feature": "unknown", "above": 0.5},
            "span": [3, 9],
        },
        {"feature": "unknown", "ablate": True, "phase": "prompt"},
    ],
    "annotations": {"team": "search"},
    "expire_time": "2100-01-01T00:00:00Z",
}


@pytest.fixture
def cli(shared_hub, capsys, monkeypatch):
    """Runs a command against the hub: its exit code, what it printed, what it complained of."""
    monkeypatch.setenv("STEERSCOPE_ADDRESS", f"127.0.0.1:{shared_hub.grpc_port}")
    monkeypatch.delenv("STEERSCOPE_TOKEN", raising=False)

    def run(*arguments, stdin=None):
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def process(shared_hub):
    """Starts a command as a process of its own, that heeds Ctrl-C as in a terminal.

    What a shell starts in the background ignores it, and whatever that starts in its turn.
    """
    environment = {**os.environ, "STEERSCOPE_ADDRESS": f"127.0.0.1:{shared_hub.grpc_port}"}
    with contextlib.ExitStack() as running:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        running.callback(signal.signal, signal.SIGINT, before)

        def run(*arguments, **options):
            command = [sys.executable, "-m", "steerscope.cli.main", *arguments]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            made = subprocess.Popen(command, env=environment, **{**pipes, **options})
            running.callback(made.wait)
            running.callback(made.kill)
            return made

        yield run


@pytest.fixture
def file(tmp_path):
    """Writes a file of policies."""

    def write(*documents, name="policies.yaml"):
        path = tmp_path / name
        texts = [each if isinstance(each, str) else yaml_text(each) for each in documents]
        path.write_text("---\n".join(texts))
        return path

    return write


def names(client):
    return {policy.name for policy in client.list_policies('origin = "created"')}


def policy(name, *edits, **fields):
    return {"name": name, "interventions": list(edits) or [CLAMP], **fields}


def test_apply_creates_then_changes_then_leaves_alone(cli, file, client):
    path = file(policy("ap-a"), policy("ap-b"))
    assert cli("policy", "apply", "-f", path) == (
        0,
        "policy/ap-a created\npolicy/ap-b created\n",
        "",
    )
    path = file(policy("ap-a"), policy("ap-b", max_dose=0.5))
    assert cli("policy", "apply", "-f", path)[1].splitlines() == [
        "policy/ap-a unchanged",
        "policy/ap-b configured",
    ]
    assert client.get_policy("ap-b").max_dose == 0.5
    cli("policy", "apply", "-f", file(policy("ap-b")))
    assert not client.get_policy("ap-b").HasField("max_dose")


def test_apply_reads_lists_json_and_stdin(cli, file, client):
    listed = file([policy("form-a"), policy("form-b")])
    assert cli("policy", "apply", "-f", listed)[0] == 0
    as_json = file(json.dumps(policy("form-c"), indent="\t"), name="policies.json")
    assert cli("policy", "apply", "-f", as_json)[0] == 0
    code, out, _ = cli(
        "policy", "apply", "-f", "-", "-o", "json", stdin=json.dumps(policy("form-d"))
    )
    assert (code, json.loads(out)) == (0, [{"name": "form-d", "result": "created"}])
    assert {f"policies/form-{c}" for c in "abcd"} <= names(client)


def test_a_dry_run_changes_nothing(cli, file, client):
    code, out, _ = cli("policy", "apply", "--dry-run", "-f", file(policy("dry")))
    assert (code, out) == (0, "policy/dry created (dry run)\n")
    assert "policies/dry" not in names(client)


def test_what_get_prints_is_read_again_as_it_is(cli, file, client):
    assert cli("policy", "apply", "-f", file(FULL))[0] == 0
    for how in ("yaml", "json"):
        code, out, _ = cli("policy", "get", "full", "-o", how)
        assert code == 0
        tree = yaml.safe_load(out)
        assert tree.pop("status")["origin"] == "created"
        assert tree == FULL
        assert cli("policy", "apply", "-f", "-", stdin=out)[1] == "policy/full unchanged\n"


BAD = {
    "two operations": (policy("bad", {**CLAMP, "add": 1.0}), "interventions[0]: exactly one of"),
    "nan": (policy("bad", {"feature": "known", "clamp": float("nan")}), "interventions[0].clamp"),
    "infinite": ("name: bad\ninterventions: [{feature: known, add: .inf}]", "interventions[0].add"),
    "endless": ("name: bad\ninterventions: [{feature: known, add: 1e999}]", "interventions[0].add"),
    "a text for a number": (policy("bad", {"feature": "known", "clamp": "x"}), "[0].clamp: "),
    "a name that is none": (policy("Bad Name"), "name: "),
    "no name": ({"interventions": [CLAMP]}, "missing required field `name`"),
    "no edits": ({"name": "bad", "interventions": []}, "interventions: must not be empty"),
    "an unknown field": (policy("bad", dose=1.0), "unknown field `dose`"),
    "an unknown field of an edit": (policy("bad", {**CLAMP, "if": 1}), "interventions[0]: "),
    "a dose below zero": (policy("bad", max_dose=-1.0), "max_dose: must be above zero"),
    "a time without zone": (policy("bad", expire_time="2100-01-01T00:00:00"), "expire_time: "),
    "a feature that the hub has not": (
        policy("bad", {"feature": "nobody", "add": 1.0}),
        "interventions[0].feature: ",
    ),
    "a policy of the catalog": (policy("force-known", max_dose=0.5), "FAILED_PRECONDITION"),
    "a key twice": ("name: bad\nname: worse\ninterventions: []", "'name' is there twice"),
    "an alias": ("name: &a bad\ndescription: *a\ninterventions: []", "aliases are not read"),
    "malformed": ("name: [bad", "line "),
    "a tag": ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a scalar": ("just words", "Expected `object`"),
    "deep nesting": ("[" * 5000, "recursion"),
}


@pytest.mark.parametrize("case", BAD)
def test_one_bad_document_is_named_in_one_line_and_nothing_is_changed(cli, file, client, case):
    document, told = BAD[case]
    before = names(client)
    path = file(policy("good"), document)
    for command in (("apply",), ("apply", "--dry-run")):
        code, out, err = cli("policy", *command, "-f", path)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        assert told in err
        assert str(path) in err
    assert names(client) == before


def test_errors_name_the_document(cli, file):
    _, _, err = cli("policy", "apply", "-f", file(policy("good"), policy("bad", {"feature": "x"})))
    assert ": document 2: interventions[0]: " in err
    _, _, err = cli("policy", "apply", "-f", file([policy("good"), policy("good")]))
    assert "[1]: name: 'good' is there twice" in err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no policy"),
        (b"---\n---\n", "holds no policy"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        (b"# " + b"x" * (1 << 20), "longer than 1 MiB"),
        (b'{"name": "a", "name": "b"}', "'name' is there twice"),
    ],
)
def test_a_file_that_is_no_policies_is_refused(cli, tmp_path, content, told):
    path = tmp_path / "odd.yaml"
    path.write_bytes(content)
    code, _, err = cli("policy", "apply", "-f", path)
    assert code == 2
    assert told in err
    assert cli("policy", "apply", "-f", tmp_path / "none.yaml")[0] == 2


def test_what_was_done_before_a_change_failed_is_told(cli, file, settings, capsys):
    hub = msgspec.structs.replace(settings.hub, max_policies=2)
    full = launcher.start_hub(msgspec.structs.replace(settings, hub=hub))
    try:
        where = ("--address", f"127.0.0.1:{full.grpc_port}")
        path = file(policy("fits"), policy("one-too-many"))
        code, out, err = cli("policy", "apply", "-f", path, *where)
    finally:
        full.stop()
    assert (code, out) == (2, "policy/fits created\n")
    assert "document 2: RESOURCE_EXHAUSTED" in err


def test_diff_says_what_apply_would_change(cli, file):
    cli("policy", "apply", "-f", file(policy("df")))
    same = file("# other words\ninterventions: [{clamp: 6, feature: known, phase: all}]\nname: df")
    assert cli("policy", "diff", "-f", same) == (0, "", "")
    code, out, _ = cli("policy", "diff", "-f", file(policy("df", max_dose=0.25)))
    assert code == 1
    assert out.startswith("--- hub/df\n+++ file/df\n")
    assert "+max_dose: 0.25\n" in out
    code, out, _ = cli("policy", "diff", "-f", file(policy("df-new")))
    assert code == 1
    assert "+name: df-new\n" in out
    assert cli("policy", "diff", "-f", file("name: ["))[0] == 2


def test_get_prints_a_table(cli, file):
    cli("policy", "apply", "-f", file(policy("tab", max_dose=0.5, description="calm \x1b[31mred")))
    code, out, _ = cli("policy", "get")
    assert code == 0
    header, *rows = out.splitlines()
    assert header.split()[:3] == ["NAME", "ORIGIN", "STATE"]
    (row,) = [row for row in rows if row.startswith("tab ")]
    assert "created  active" in row
    assert "known clamp 6" in row
    assert r"calm \x1b[31mred" in row
    assert "tab" not in cli("policy", "get", "--filter", 'origin = "catalog"')[1]


def test_what_is_not_there_ends_with_1(cli):
    for command in (
        ("policy", "get", "nobody"),
        ("policy", "revisions", "nobody"),
        ("policy", "delete", "nobody"),
        ("features", "nobody"),
        ("report", "nobody"),
        ("release", "nobody"),
        ("rules", "unbind", "nobody"),
    ):
        code, out, err = cli(*command)
        assert (code, out) == (1, ""), command
        assert err.startswith("steerscope: ")
        assert err.count("\n") == 1


def test_delete_removes_all_or_none(cli, file, client):
    cli("policy", "apply", "-f", file(policy("del-a"), policy("del-b")))
    assert cli("policy", "delete", "del-a", "force-known")[0] == 2
    assert cli("policy", "delete", "del-a", "nobody")[0] == 1
    assert {"policies/del-a", "policies/del-b"} <= names(client)
    assert cli("policy", "delete", "del-a", "--etag", "wrong")[0] == 2
    assert cli("policy", "delete", "del-a", "del-b")[1] == (
        "policy/del-a deleted\npolicy/del-b deleted\n"
    )
    assert not {"policies/del-a", "policies/del-b"} & names(client)


def test_revisions_are_listed_and_read(cli, file):
    cli("policy", "apply", "-f", file(policy("rev")))
    cli("policy", "apply", "-f", file(policy("rev", description="newer")))
    _, out, _ = cli("policy", "revisions", "rev")
    header, newest, oldest = out.splitlines()
    assert header.startswith("REVISION")
    assert newest.endswith("newer")
    _, out, _ = cli("policy", "get", "rev", "--revision", oldest.split()[0], "-o", "json")
    assert "description" not in json.loads(out)


def test_features_are_listed_and_shown(cli):
    code, out, _ = cli("features")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["NAME", "known", "late", "unknown"]
    assert yaml.safe_load(cli("features", "known")[1])["label"] == "Known entity"
    assert len(json.loads(cli("features", "--filter", "layer > 1", "-o", "json")[1])) == 1


def test_steering_waits_and_is_released(cli):
    code, out, _ = cli("steer", "chatcmpl-1", "--policy", "force-known", "--ttl", "30")
    assert code == 0
    assert out.startswith("request/chatcmpl-1 waiting\n")
    code, out, _ = cli("release", "requests/chatcmpl-1")
    assert (code, out) == (0, "request/chatcmpl-1 released\n")


def test_steering_may_bring_edits_of_its_own(cli):
    edits = json.dumps([CLAMP])
    arguments = ("steer", "chatcmpl-2", "--interventions", edits, "--max-dose", "0.5", "--dry-run")
    code, out, _ = cli(*arguments, "-o", "json")
    assert code == 0
    assert json.loads(out).keys() == {"steering_digest"}
    assert cli("release", "chatcmpl-2")[0] == 1


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ("{", "--interventions: malformed JSON"),
        ("{}", "--interventions: must be a list"),
        ("[]", "--interventions: interventions: must not be empty"),
        ('[{"feature": "known", "clamp": NaN}]', "interventions[0].clamp: must be a finite"),
        ('[{"feature": "known", "clamp": 1, "clamp": 2}]', "'clamp' is there twice"),
        ('[{"feature": "nobody", "clamp": 1}]', "interventions[0].feature"),
    ],
)
def test_edits_that_are_none_are_refused_by_field(cli, edits, told):
    code, _, err = cli("steer", "chatcmpl-3", "--interventions", edits)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


def test_a_report_is_readable(cli, shared_hub, worker_of, catalog):
    worker = worker_of(shared_hub)
    begun = start("rep", 3, policy="force-known")
    worker.send(
        frame(
            catalog,
            ("rep", 0, 6),
            acts=[[float(i), 0.0, 1.0] for i in range(6)],
            started=(begun,),
            finished=("rep",),
            edited={4: 1.0, 5: 1.0},
        )
    )
    code, out, _ = cli("report", "rep", "--wait", "5")
    assert code == 0
    assert "requests/rep  finished" in out
    assert "prompt of 3, 6 observed" in out
    assert "2 tokens changed, 4 to 5, dose 0.500" in out
    assert "signal    in_answer  0.953  high  (low < 0.35 <= high)" in out
    assert "▁▂▄▅▇█  max 5 at token 5, 2 edited" in out
    assert json.loads(cli("report", "rep", "-o", "json")[1])["name"] == "requests/rep"
    _, out, _ = cli("report", "rep", "--feature", "late")
    assert [line.split()[1] for line in out.splitlines() if "feature " in line] == ["late"]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ([(0, 0.0), (1, 1.0), (3, 7.0)], "▁▂·█"),
        ([(0, -1.0), (1, 0.0), (2, 1.0)], "▁▅█"),
        ([(0, 0.0), (1, float("nan"))], "▁·"),
        ([(i, float(i % 48 == 5)) for i in range(96)], "▁▁█▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁█" + "▁" * 21),
        ([], "·"),
    ],
)
def test_values_become_a_line_of_signs(values, line):
    assert spark(values) == line


@pytest.fixture
def clean_rules(client):
    yield
    client.update_rules(default_policy=None, bindings=[], override=None)


def test_rules_are_set_bound_and_unbound(cli, clean_rules):
    assert cli("rules", "set-default", "force-known")[0] == 0
    assert cli("rules", "bind", "beta", "--policy", "force-known", "--model", "demo")[0] == 0
    assert cli("rules", "bind", "plain", "--unsteered", "--lora", "tuned", "--first")[0] == 0
    _, out, _ = cli("rules", "get")
    assert out.splitlines() == [
        "default      force-known",
        "kill switch  off",
        "",
        "BINDING  POLICY       REQUESTS WITH",
        "plain    not steered  lora=tuned",
        "beta     force-known  model=demo",
    ]
    assert cli("rules", "unbind", "plain")[0] == 0
    assert cli("rules", "set-default", "--none")[0] == 0
    tree = json.loads(cli("rules", "get", "-o", "json")[1])
    assert tree["default_policy"] is None
    assert [binding["name"] for binding in tree["bindings"]] == ["beta"]


def test_what_rules_get_prints_is_read_again(cli, clean_rules, client):
    cli("rules", "bind", "beta", "--policy", "force-known", "--identity", "team-a")
    cli("kill-switch", "on")
    _, out, _ = cli("rules", "get", "-o", "yaml")
    cli("rules", "unbind", "beta")
    assert cli("rules", "apply", "-f", "-", "--dry-run", stdin=out)[0] == 0
    assert client.get_rules().rules.bindings == ()
    assert cli("rules", "apply", "-f", "-", stdin=out)[0] == 0
    now = client.get_rules().rules
    assert [binding.name for binding in now.bindings] == ["beta"]
    assert now.override is not None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("default_policy: nobody", "default_policy"),
        ("override: {mode: 'off'}", "override: is set by steerscope kill-switch"),
        ("bindings: [{name: a, match: {}, policy: force-known}]", "bindings[0].match"),
        ("bindings: [{name: a, match: {colour: red}}]", "bindings[0].match: "),
        ("defaults: x", "unknown field `defaults`"),
        ("{}\n---\n{}", "must be one document, not 2"),
    ],
)
def test_rules_that_are_wrong_are_refused_by_field(cli, clean_rules, client, text, told):
    before = client.get_rules()
    code, _, err = cli("rules", "apply", "-f", "-", stdin=text)
    assert code == 2
    assert told in err
    assert client.get_rules() == before


def test_the_kill_switch_is_shown_and_turned(cli, clean_rules):
    assert cli("kill-switch")[1] == "kill switch off\n"
    _, out, _ = cli("kill-switch", "on", "--reason", "incident 7")
    assert out == "kill switch on: nothing is steered (incident 7)\n"
    assert cli("kill-switch")[1] == out
    _, out, _ = cli("kill-switch", "force", "force-known")
    assert out == "kill switch force: everything is steered by force-known\n"
    assert json.loads(cli("kill-switch", "-o", "json")[1])["override"]["mode"] == "force"
    assert cli("kill-switch", "off")[1] == "kill switch off\n"
    for wrong in (("force",), ("on", "force-known"), ("off", "--reason", "x")):
        assert cli("kill-switch", *wrong)[0] == 2


@pytest.fixture
def telling(shared_hub, worker_of, catalog):
    """Requests start one after the other for as long as the test lasts."""
    worker, stop = worker_of(shared_hub), threading.Event()

    def keep_telling():
        i = 0
        while not stop.wait(0.1):
            worker.send(frame(catalog, (f"w{i}", 0, 1), started=(start(f"w{i}", 1),)))
            i += 1

    thread = threading.Thread(target=keep_telling)
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.usefixtures("telling")
def test_watch_writes_one_json_object_a_line_where_there_is_no_terminal(process):
    watching = process("watch", "--max-events", "2")
    out, err = watching.communicate(timeout=30)
    assert (watching.returncode, err) == (0, "")
    first, second = map(json.loads, out.splitlines())
    assert first["started"]["name"].startswith("requests/w")
    assert second["cursor"] != first["cursor"]


@pytest.mark.usefixtures("telling")
def test_ctrl_c_ends_a_watch_with_130_and_no_traceback(process):
    watching = process("watch", stdin=subprocess.DEVNULL)
    assert watching.stdout.readline().startswith("{")
    watching.send_signal(signal.SIGINT)
    _, err = watching.communicate(timeout=30)
    assert (watching.returncode, err) == (130, "")


@pytest.mark.usefixtures("telling")
def test_a_reader_that_goes_away_ends_a_watch(process):
    watching = process("watch")
    assert watching.stdout.readline().startswith("{")
    watching.stdout.close()
    assert watching.wait(30) == 1
    assert watching.stderr.read() == ""


def test_watch_shows_activations_of_one_request_and_ends_with_it(
    cli, shared_hub, worker_of, catalog
):
    worker = worker_of(shared_hub)
    worker.send(
        frame(catalog, ("act", 0, 3), started=(start("act", 2),), finished=("act",), acts=2.0)
    )
    code, out, _ = cli("watch", "activations", "--request", "act", "--feature", "known")
    assert code == 0
    events = [json.loads(line) for line in out.splitlines()]
    (track,) = [track for event in events for track in event.get("features", [])]
    assert (track["feature"], track["activations"]) == ("known", [2.0, 2.0, 2.0])
    assert events[-1]["finished"]


def test_watch_draws_a_view_on_a_terminal(cli, shared_hub, worker_of, catalog, monkeypatch):
    pytest.importorskip("rich")
    worker = worker_of(shared_hub)
    worker.send(
        frame(catalog, ("tty", 0, 3), started=(start("tty", 2),), finished=("tty",), acts=2.0)
    )
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = cli("watch", "activations", "--request", "tty", "--feature", "known")
    assert code == 0
    assert "known" in out
    assert "███" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("watch", "requests", "--feature", "known"),
        ("watch", "signals", "--request", "x"),
        ("watch", "activations", "--label", "high"),
        ("watch", "--max-events", "0"),
        ("watch", "activations", "--feature", "nobody"),
        ("policy", "get", "--revision", "abc"),
        ("policy", "delete", "a", "b", "--etag", "x"),
        ("features", "--address", "nowhere"),
        ("features", "--token-file", "/no/such/file"),
        ("features", "--ca", "/no/such/file"),
        ("rules", "bind", "x", "--unsteered", "--header", "novalue"),
    ],
)
def test_what_makes_no_sense_is_an_error_in_one_line(cli, arguments):
    code, out, err = cli(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("steerscope: ")
    assert err.count("\n") == 1


def test_a_hub_that_is_not_there_is_named(cli):
    code, _, err = cli("rules", "get", "--address", "127.0.0.1:1", "--timeout", "0.5")
    assert code == 2
    assert "127.0.0.1:1" in err


def test_a_reader_that_goes_away_is_no_error_to_speak_of(process):
    printing = process("completion", "bash")
    printing.stdout.close()
    assert printing.wait(30) == 1
    assert printing.stderr.read() == ""


def test_a_token_comes_from_a_file_or_the_environment(cli, catalog_folder, tmp_path, monkeypatch):
    secured, team = Secured(tmp_path), somebody("team-a", "observe")
    token = tmp_path / "token"
    with hub_with(catalog_folder, tls=secured.tls(), identities=[team.tree]) as hub:
        where = ("--address", f"127.0.0.1:{hub.grpc_port}", "--ca", secured.ca)
        assert cli("features", *where)[0] == 2
        token.write_text(f"{team.token}\n")
        assert cli("features", *where, "--token-file", token)[0] == 0
        monkeypatch.setenv("STEERSCOPE_TOKEN", team.token)
        assert cli("features", *where)[0] == 0
        token.write_text("two words")
        code, _, err = cli("features", *where, "--token-file", token)
        assert code == 2
        assert "two words" not in err


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_command(cli, shell):
    pytest.importorskip("shtab")
    code, out, _ = cli("completion", shell)
    assert code == 0
    for word in ("policy", "apply", "kill-switch", "activations", "set-default", "max-dose"):
        assert word in out


def test_bash_completes_a_part_of_a_command(cli, tmp_path):
    pytest.importorskip("shtab")
    script = tmp_path / "completion.bash"
    script.write_text(cli("completion", "bash")[1])
    ask = (
        f"source {script}; COMP_WORDS=(steerscope policy re); COMP_CWORD=2; "
        "_shtab_steerscope steerscope re policy; echo ${COMPREPLY[@]}"
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["revisions"]
