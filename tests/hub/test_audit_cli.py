"""``steerscope audit``, as people call it: what it prints and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from steerscope.cli.main import main
from steerscope.hub.audit import events, files
from steerscope.hub.audit.events import KillMode, KillSwitch, PolicyCreated, Released
from steerscope.hub.audit.log import AuditLog
from steerscope.steering.interventions import Intervention

NUM_LINES = 5


@pytest.fixture
def path(tmp_path):
    """A log of five entries, a second apart."""
    path = tmp_path / "audit.jsonl"
    clock = iter(range(1_700_000_000, 1_800_000_000)).__next__
    log = AuditLog.open(path, clock=clock)
    edits = events.edits([Intervention(feature="known", clamp=6.0)])
    log.record(PolicyCreated(policy="force", revision=2, digest="c" * 64, edits=edits), "alice")
    log.record(Released(external_id="chat-1", position=7), "bob")
    log.record(Released(external_id="chat-2"), "alice")
    log.record(KillSwitch(mode=KillMode.FORCE_POLICY, policy="force"), "bob")
    log.close()
    return path


@pytest.fixture
def audit(capsys):
    def run(*arguments):
        code = main(["audit", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def shown(audit, path):
    """The numbers of the entries that ``show`` prints."""

    def run(*arguments):
        code, out, _ = audit("show", path, "-o", "json", *arguments)
        assert code == 0
        return [json.loads(line)["seq"] for line in out.splitlines()]

    return run


def edit(path, old, new):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_an_intact_log_ends_with_0_and_says_what_that_leaves_open(audit, path):
    code, out, _ = audit("verify", path)
    assert code == 0
    assert out.startswith("intact: entries 1 to 5")
    assert "without --anchor, entries cut off at the end are not noticed" in out


def test_an_edited_line_ends_with_1_and_is_named(audit, path):
    edit(path, b"chat-1", b"chat-9")
    code, out, _ = audit("verify", path)
    assert code == 1
    assert out.startswith(f"{path}:3: edited: its SHA-256 is ")
    assert out.endswith("broken: 5 lines, 1 problems\n")


def test_the_anchor_that_was_printed_finds_what_was_cut_off_later(audit, path):
    code, out, _ = audit("verify", path, "--print-anchor")
    assert code == 0
    anchor = out.strip()
    assert len(anchor) == 64
    code, out, _ = audit("verify", path, "--anchor", anchor)
    assert (code, "the anchor is entry 5, 0 follow" in out) == (0, True)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert audit("verify", path)[0] == 0
    code, out, _ = audit("verify", path, "--anchor", anchor)
    assert code == 1
    assert "no line has the anchor's hash" in out


def test_a_broken_log_has_no_anchor(audit, path):
    edit(path, b"chat-1", b"chat-9")
    code, out, _ = audit("verify", path, "--print-anchor")
    assert code == 1
    assert "edited" in out


def test_what_cannot_be_read_ends_with_2(audit, path, tmp_path):
    code, _, err = audit("verify", tmp_path / "none.jsonl")
    assert (code, "no such file" in err) == (2, True)
    code, _, err = audit("verify", tmp_path)
    assert (code, "directory" in err) == (2, True)
    code, _, err = audit("verify", path, "--key-file", tmp_path / "no-key")
    assert (code, "no-key" in err) == (2, True)
    for wrong in (["--anchor", "abc"], []):
        with pytest.raises(SystemExit) as ended:
            audit("verify", *([path, *wrong] if wrong else []))
        assert ended.value.code == 2


def test_a_damaged_log_cannot_send_commands_to_the_terminal(audit, path):
    edit(path, b'"identity":"alice","event":{"type":"released"',
         b'"identity":"\\u001b[2J\\u202e","event":{"type":"rele\x1b[2Jased"')  # fmt: skip
    edit(path, b'"identity":"bob","event":{"type":"released"',
         b'"identity":"\\u001b[2J","event":{"type":"released"')  # fmt: skip
    for part in ("verify", "show"):
        code, out, err = audit(part, path)
        assert code == 1
        assert (out + err).replace("\n", "").isprintable()


def test_show_prints_a_table_in_which_an_entry_is_a_line(audit, path):
    code, out, _ = audit("show", path)
    header, *rows = out.splitlines()
    assert code == 0
    assert header.split() == ["SEQ", "TIME", "IDENTITY", "EVENT", "DETAILS"]
    assert len(rows) == NUM_LINES
    assert rows[1].split() == [
        "2", "2023-11-14T22:13:21.000000Z", "alice", "policy_created", "policy=force",
        "revision=2", f"digest={'c' * 12}", "edits=known:clamp:6",
    ]  # fmt: skip


def test_show_as_json_prints_the_lines_as_they_are(audit, path):
    assert audit("show", path, "-o", "json")[1].encode() == path.read_bytes()


def test_show_chooses_by_who_what_and_when(shown):
    assert shown("--identity", "bob") == [3, 5]
    assert shown("--policy", "force") == [2, 5]
    assert shown("--policy", "force", "--identity", "alice") == [2]
    assert shown("--request", "chat-2") == [4]
    assert shown("--request", "chat") == []
    assert shown("--since", "2023-11-14T22:13:22Z") == [3, 4, 5]
    assert shown("--until", "2023-11-14T22:13:22Z") == [1, 2]
    assert shown("--since", "2023-11-15T00:13:23+02:00", "--until", "2023-11-14 22:13:24") == [4]
    with pytest.raises(SystemExit) as ended:
        shown("--since", "yesterday")
    assert ended.value.code == 2


def test_a_request_with_a_long_id_is_found_by_it(audit, tmp_path):
    path = tmp_path / "long.jsonl"
    log = AuditLog.open(path)
    log.record(Released(external_id="x" * 300))
    log.record(Released(external_id="x" * 299))
    log.close()
    _, out, _ = audit("show", path, "--request", "x" * 300, "-o", "json")
    assert len(out.splitlines()) == 1


def test_a_log_can_be_verified_while_it_is_written_and_rotated(tmp_path):
    """A reader must not take what a writer is just doing for damage."""
    path = tmp_path / "audit.jsonl"
    child = (
        "import sys; from pathlib import Path; from steerscope.hub.audit.events import Released;"
        "from steerscope.hub.audit.log import AuditLog, Fsync;"
        "log = AuditLog.open(Path(sys.argv[1]), max_bytes=1 << 14, keep=20, fsync=Fsync.NEVER)\n"
        "print(1, flush=True)\n"
        "while True: log.record(Released(external_id='r'))"
    )
    writer = subprocess.Popen([sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        codes = [main(["audit", "verify", str(path)]) for _ in range(50)]
    finally:
        writer.kill()
        writer.wait()
    assert files.first_seq(files.rotated(path)[0]) > 1, "no file was deleted meanwhile"
    assert codes == [0] * 50


def test_the_command_is_there(path):
    done = subprocess.run(
        [sys.executable, "-m", "steerscope.cli.main", "audit", "verify", path],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert done.returncode == 0
    assert done.stdout.startswith("intact")
