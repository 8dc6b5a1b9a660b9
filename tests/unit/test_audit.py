"""The audit log: what it tells and cannot tell, what it survives, what of it can be proved."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Annotated, get_args, get_origin, get_type_hints

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steerscope.errors import SpecError
from steerscope.hub.audit import entries, events, fields, files
from steerscope.hub.audit.entries import GENESIS, AuditError
from steerscope.hub.audit.events import (
    AuditEvent,
    Denied,
    KillMode,
    KillSwitch,
    PolicyCreated,
    Released,
    RequestRejected,
    RequestSteered,
)
from steerscope.hub.audit.fields import Checked
from steerscope.hub.audit.log import AuditLog, AuditUnavailableError, Fsync, OnError
from steerscope.hub.audit.verification import Damage, verify
from steerscope.steering.interventions import Intervention, Phase, When, parse_spec

FOREVER = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUM_LINES = 8


def steered(external_id="chatcmpl-1", **other):
    told = {"external_id": external_id, "policy": "force-known", "asked": "a" * 64,
            "applied": "a" * 64, "engine": "0", "model": "demo", "num_prompt_tokens": 20,
            "num_tokens": 60, "num_steered_tokens": 40, "dose_max": 0.25,
            "complete": True}  # fmt: skip
    return RequestSteered(**told | other)


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


def read(path):
    return [entries.decode(line[:-1]) for line in lines_of(path)]


def kinds(path):
    return [type(entry.event).__name__ for entry in read(path)]


def damages(*paths, **options):
    return [problem.damage for problem in verify(paths, **options).problems]


def write(path, count=NUM_LINES, **options):
    """A log of ``count`` lines, the first of which says that it was started."""
    log = AuditLog.open(path, **options)
    for i in range(count - 1):
        log.record(steered(f"chatcmpl-{i}"), identity=f"team-{i % 3}")
    log.close()
    return log.head.hash


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path):
    with contextlib.closing(AuditLog.open(path)) as log:
        yield log


@pytest.fixture
def key_file(tmp_path):
    key = tmp_path / "key"
    key.write_text("0123456789abcdef" * 4)
    key.chmod(0o600)
    return key


@contextlib.contextmanager
def disk_that_ends_at(num_bytes):
    """No file can grow beyond that: what a full disk does, a write of part of a line included."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What it tells


def test_an_entry_is_one_line_of_json_that_says_who_when_and_what(log, path):
    log.record(KillSwitch(mode=KillMode.STEERING_OFF), identity="alice")
    first, last = map(json.loads, lines_of(path))
    assert first["previous"] == GENESIS
    assert first["event"]["type"] == "log_started"
    assert last["seq"] == 2
    assert last["identity"] == "alice"
    assert last["event"] == {"type": "kill_switch", "mode": "steering_off"}
    age = datetime.now(UTC) - datetime.fromisoformat(last["time"])
    assert 0 <= age.total_seconds() < 60
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", last["time"])


def test_previous_is_what_sha256sum_says_of_the_line_before(log, path):
    log.record(steered())
    first, last = path.read_bytes().splitlines()
    done = subprocess.run(["sha256sum"], input=first, capture_output=True, check=True)
    assert json.loads(last)["previous"] == done.stdout.split()[0].decode()


def test_edits_say_everything_that_an_intervention_asks(log, path):
    asked = (
        Intervention(feature="known", clamp=6.0),
        Intervention(
            feature="unknown",
            ablate=True,
            phase=Phase.GENERATION,
            only_if_active=True,
            when=When(feature="known", above=0.5, below=2.0),
            span=(3, 9),
        ),
    )
    log.record(PolicyCreated(policy="p", revision=2, digest="b" * 64, edits=events.edits(asked)))
    assert json.loads(lines_of(path)[-1])["event"]["edits"] == [
        {"feature": "known", "op": "clamp", "value": 6.0},
        {"feature": "unknown", "op": "ablate", "value": 0.0, "phase": "generation",
         "only_if_active": True, "when": "known", "above": 0.5, "below": 2.0, "span": [3, 9]},
    ]  # fmt: skip
    told = set(events.Edit.__struct_fields__)
    ops = {"clamp", "ablate", "at_least", "at_most", "scale", "add"}
    assert set(Intervention.__struct_fields__) - ops <= told


def test_a_clock_that_is_set_back_is_said_so_and_is_no_damage(path):
    clock = iter([1000.0, 2000.5, 1000.25, 1001.0]).__next__
    log = AuditLog.open(path, clock=clock)
    for _ in range(3):
        log.record(steered())
    log.close()
    assert [entry.behind_us for entry in read(path)] == [None, None, 1_000_250_000, None]
    assert not damages(path)


def test_without_a_log_events_go_nowhere():
    log = AuditLog.off()
    log.record(steered())
    assert not log.failing
    assert log.lost == 0
    assert log.recovers()
    log.close()


def test_after_close_an_event_is_refused_rather_than_lost_in_silence(log):
    log.close()
    with pytest.raises(AuditUnavailableError):
        log.record(steered())
    assert log.lost == 1


# What it cannot tell


def structs():
    return [events.Edit, entries.Entry, *get_args(AuditEvent)]


def leaves(hint):
    """The types at the bottom of a field's type, bounds kept."""
    if get_origin(hint) is Annotated and hint.__origin__ is str:
        return [hint]
    if get_origin(hint) is Annotated:
        return leaves(hint.__origin__)
    inner = [each for each in get_args(hint) if each not in (type(None), Ellipsis)]
    return [leaf for each in inner for leaf in leaves(each)] if inner else [hint]


def test_no_event_has_a_field_that_text_fits_into():
    texts = {fields.Id, fields.Reason, fields.Digest, fields.PolicyName, fields.FeatureName,
             fields.Word, fields.FieldPath, fields.RpcName, fields.TraceId,
             entries.Sha256, entries.Time}  # fmt: skip
    others = {int, float, bool, datetime, Phase, events.Op, KillMode, events.Change, events.Edit,
              *get_args(AuditEvent)}  # fmt: skip
    for struct in structs():
        for name, hint in get_type_hints(struct, include_extras=True).items():
            assert set(leaves(hint)) <= texts | others, f"{struct.__name__}.{name}"
    lengths = [get_args(text)[1].max_length or 64 for text in texts]
    assert max(lengths) <= 200


def text_fields():
    return [(struct, name) for struct in structs() for name, _ in fields.cleaners(struct)]


@FOREVER
@given(st.sampled_from(text_fields()), st.text(st.characters(), max_size=400))
def test_whatever_is_put_into_a_text_field_is_bounded_printable_and_can_be_read_back(place, text):
    struct, name = place
    (hint,) = leaves(get_type_hints(struct, include_extras=True)[name])
    clean = dict(fields.cleaners(struct))[name](text)
    assert clean.isprintable()
    assert len(clean) <= get_args(hint)[1].max_length
    assert msgspec.json.decode(msgspec.json.encode(clean), type=hint) == clean


def test_long_ids_that_begin_alike_stay_apart():
    one, other = (Released(external_id="x" * 500 + end).external_id for end in "ab")
    assert one != other
    assert len(one) == len(other) == 128


def test_text_of_another_form_is_not_repeated():
    event = RequestRejected(
        external_id="r", policy="Tell me, please", field="ste er", reason="no policy"
    )
    assert (event.policy, event.field) == ("?", "?")
    assert Denied(rpc="a b", scope="ad min").rpc == "?"


SECRET = "Who is Michael Jordan?"
SPECS = (
    SECRET,
    f'{{"{SECRET}": 1}}',
    f'{{"interventions": "{SECRET}"}}',
    f'{{"interventions": [{{"feature": "known", "{SECRET}": 2}}]}}',
    f'{{"interventions": [{{"feature": "known", "phase": "{SECRET}"}}]}}',
    f'{{"interventions": [{{"feature": "known", "clamp": "{SECRET}"}}]}}',
    f'{{"interventions": [{{"feature": "{SECRET}", "clamp": 1}}, '
    f'{{"feature": "{SECRET}", "clamp": 2}}]}}',
    f'{{"interventions": [{{"feature": "it\'s {SECRET}", "clamp": 1}}, '
    f'{{"feature": "it\'s {SECRET}", "clamp": 2}}]}}',
    f'{{"interventions": [{{"feature": "\\"a\\" \'b\' {SECRET}", "clamp": 1}}, '
    f'{{"feature": "\\"a\\" \'b\' {SECRET}", "clamp": 2}}]}}',
)


@pytest.mark.parametrize("spec", SPECS)
def test_what_a_refused_spec_held_is_not_in_the_reason(log, path, spec):
    with pytest.raises(SpecError) as caught:
        parse_spec(spec)
    error = caught.value
    log.record(RequestRejected(external_id="r", field=error.field, reason=error.reason))
    for word in ("Who", "Michael", "Jordan"):
        assert word.encode() not in lines_of(path)[-1]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("must be a finite number, got nan", "must be a finite number, got nan"),
        ("the policy's name 'a secret' is taken", "the policy's name '…' is taken"),
        ("can't have b'a secret'", "can't have b'…'"),
        ("no policy 'one', no feature \"two\" here", "no policy '…' here"),
        ("unknown field `a secret`", "unknown field '…'"),
        ("unfinished 'a secret", "unfinished '…'"),
    ],
)
def test_a_reason_keeps_our_words_and_drops_what_they_quote(reason, told):
    assert RequestRejected(external_id="r", field="", reason=reason).reason == told


# What it survives


def test_a_log_goes_on_where_it_ended(path):
    write(path)
    write(path)
    assert [entry.seq for entry in read(path)] == list(range(1, 2 * NUM_LINES + 1))
    assert not damages(path)


@pytest.mark.parametrize("left", ["nothing", "one byte", "half", "all but the newline"])
def test_a_line_that_a_crash_cut_off_is_kept_aside_and_told(path, left):
    write(path)
    whole, last = b"".join(lines_of(path)[:-1]), lines_of(path)[-1]
    num = {"nothing": 0, "one byte": 1, "half": len(last) // 2}.get(left, len(last) - 1)
    path.write_bytes(whole + last[:num])
    AuditLog.open(path).close()
    assert not damages(path)
    assert b"".join(lines_of(path)).startswith(whole)
    remains = path.with_name(f"audit.jsonl.{NUM_LINES:012d}.torn")
    assert remains.exists() == bool(num)
    if num:
        assert remains.read_bytes() == last[:num]
        assert read(path)[-2].event.file == remains.name
        assert read(path)[-2].event.num_bytes == num


def test_a_crash_at_any_byte_loses_no_line_before_it_and_no_byte_of_what_is_left(path):
    write(path, 3)
    content = path.read_bytes()
    whole = content.rindex(b"\n", 0, -1) + 1
    for end in range(whole, len(content)):
        path.write_bytes(content[:end])
        AuditLog.open(path).close()
        assert not damages(path)
        assert path.read_bytes().startswith(content[:whole])
        remains = path.with_name("audit.jsonl.000000000003.torn")
        assert (remains.read_bytes() if remains.exists() else b"") == content[whole:end]
        remains.unlink(missing_ok=True)


def test_a_second_crash_while_the_first_is_put_right_loses_nothing(path):
    write(path)
    path.write_bytes(path.read_bytes() + b'{"seq":9,"ti')
    AuditLog.open(path).close()
    told, half = lines_of(path)[NUM_LINES], b'{"seq":9,"time":"2'
    assert b"log_torn" in told
    path.write_bytes(b"".join(lines_of(path)[:NUM_LINES]) + half)
    AuditLog.open(path).close()
    remains = path.with_name("audit.jsonl.000000000009.torn")
    assert remains.read_bytes() == b'{"seq":9,"ti' + half
    assert kinds(path)[NUM_LINES:] == ["LogTorn", "LogStarted"]


def test_a_last_line_that_is_whole_but_no_entry_stops_the_hub(path):
    write(path)
    path.write_bytes(path.read_bytes() + b"what is this\n")
    with pytest.raises(AuditError, match="no entry"):
        AuditLog.open(path)
    assert path.read_bytes().endswith(b"what is this\n")


def test_a_killed_writer_leaves_every_event_it_recorded(path):
    child = (
        "import sys; from pathlib import Path; from steerscope.hub.audit.log import AuditLog;"
        "from steerscope.hub.audit.events import Released;"
        "log = AuditLog.open(Path(sys.argv[1]), max_bytes=1 << 16)\n"
        "for i in range(10**9): log.record(Released(external_id=f'r-{i}')); print(i, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", child, str(path)], stdout=subprocess.PIPE, text=True
    )
    while int(process.stdout.readline()) < 2000:
        pass
    process.kill()
    acknowledged = max(map(int, process.stdout.read().split()), default=2000)
    process.wait()
    AuditLog.open(path).close()
    assert not damages(path)
    told = [e.event for file in (*files.rotated(path), path) for e in read(file)]
    ids = [event.external_id for event in told if isinstance(event, Released)]
    assert ids[: acknowledged + 1] == [f"r-{i}" for i in range(acknowledged + 1)]


def test_two_writers_are_refused_also_from_another_process(log, path):
    with pytest.raises(AuditError, match="open in another process"):
        AuditLog.open(path)
    child = (
        "import sys; from pathlib import Path; from steerscope.hub.audit.log import AuditLog;"
        "AuditLog.open(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", child, path], capture_output=True, text=True)
    assert "open in another process" in done.stderr
    log.record(steered())
    log.close()
    AuditLog.open(path).close()
    assert not damages(path)


@pytest.mark.parametrize("on_error", OnError)
def test_on_a_full_disk_changes_are_refused_or_losses_counted_and_the_gap_is_told(path, on_error):
    log = AuditLog.open(path, on_error=on_error)
    before = path.read_bytes()
    with disk_that_ends_at(len(before) + 100):
        for _ in range(3):
            if on_error is OnError.REFUSE:
                with pytest.raises(AuditUnavailableError, match=f"audit log {path}: "):
                    log.record(steered())
            else:
                log.record(steered())
        assert (log.failing, log.lost) == (True, 3)
        assert log.refuses is (on_error is OnError.REFUSE)
        assert not log.recovers()
        assert path.read_bytes() == before, "part of a line was left"
    log.record(steered("the next one"))
    log.record(steered("and one more"))
    assert (log.failing, log.refuses, log.lost) == (False, False, 3)
    _, gap, *last = read(path)
    assert gap.event.num_entries == 3
    assert [entry.event.external_id for entry in last] == ["the next one", "and one more"]
    assert not damages(path)
    log.close()


def test_part_of_a_line_that_cannot_be_cut_off_at_once_is_cut_off_later(path, monkeypatch):
    def fails(fd, size):
        raise OSError(errno.EIO, "Input/output error")

    log = AuditLog.open(path)
    size = path.stat().st_size
    with monkeypatch.context() as patch, disk_that_ends_at(size + 100):
        patch.setattr(os, "ftruncate", fails)
        with pytest.raises(AuditUnavailableError):
            log.record(steered())
    assert path.stat().st_size == size + 100
    log.record(steered())
    assert kinds(path) == ["LogStarted", "EntriesLost", "RequestSteered"]
    assert not damages(path)
    log.close()


def test_a_log_recovers_without_an_event(path):
    log = AuditLog.open(path)
    with disk_that_ends_at(path.stat().st_size), pytest.raises(AuditUnavailableError):
        log.record(steered())
    assert log.recovers()
    assert not log.refuses
    assert kinds(path) == ["LogStarted", "EntriesLost"]
    log.close()


# Files


def test_rotated_files_are_of_the_size_asked_and_one_chain(path):
    log = AuditLog.open(path, max_bytes=8192)
    for i in range(200):
        log.record(steered(f"r-{i}"))
    log.close()
    rotated = files.rotated(path)
    assert len(rotated) > 5
    assert all(file.stat().st_size <= 8192 for file in (*rotated, path))
    assert all(file.stat().st_size > 7000 for file in rotated)
    for before, after in zip(rotated, (*rotated[1:], path), strict=True):
        first = read(after)[0]
        assert first.event == events.LogRotated(file=before.name)
        assert first.previous == entries.digest(lines_of(before)[-1][:-1])
        assert files.first_seq(before) == read(before)[0].seq
    assert not damages(path)


def test_nothing_is_deleted_unless_told_and_then_the_log_says_so(path):
    write(path, 100, max_bytes=4096)
    num_rotated = len(files.rotated(path))
    assert num_rotated > 5
    write(path, 2, max_bytes=4096)
    assert len(files.rotated(path)) >= num_rotated
    write(path, 50, max_bytes=4096, keep=2)
    kept = files.rotated(path)
    assert len(kept) == 2
    last_told = [e.event.kept_from for e in read(path) if isinstance(e.event, events.LogRotated)]
    assert last_told == [files.first_seq(kept[0])]
    assert verify([path]).first_seq == files.first_seq(kept[0])
    assert not damages(path)


@pytest.mark.parametrize("begun", [False, True])
def test_a_log_goes_on_after_a_crash_in_the_midst_of_a_rotation(path, begun):
    write(path)
    path.rename(files.numbered(path, 1))
    if begun:
        path.touch(0o600)
    write(path, 2)
    assert [entry.seq for entry in read(path)] == [NUM_LINES + 1, NUM_LINES + 2]
    assert not damages(path)


def test_a_rotation_that_cannot_be_made_is_a_write_error_and_overwrites_nothing(path):
    log = AuditLog.open(path, max_bytes=4096)
    taken = files.numbered(path, 1)
    taken.write_text("not ours")
    fill = steered("x" * 128)
    with pytest.raises(AuditUnavailableError, match="cannot be rotated"):  # noqa: PT012
        for _ in range(20):
            log.record(fill)
    assert taken.read_text() == "not ours"
    taken.unlink()
    log.record(steered())
    assert "EntriesLost" in kinds(taken) + kinds(path)
    assert not damages(path)
    log.close()


def test_files_are_for_their_owner_only_whatever_the_umask(path):
    before = os.umask(0)
    try:
        write(path, 30, max_bytes=4096)
    finally:
        os.umask(before)
    made = list(path.parent.iterdir())
    assert len(made) > 3
    assert {file.stat().st_mode & 0o777 for file in made} == {0o600}


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_to_is_refused(path, mode):
    write(path)
    path.chmod(mode)
    with pytest.raises(AuditError, match=f"{path}: others may write to it"):
        AuditLog.open(path)


@pytest.mark.parametrize("name", ["audit.jsonl", "audit.jsonl.lock"])
def test_a_symbolic_link_is_refused_also_where_nothing_is(path, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    path.with_name(name).symlink_to(elsewhere)
    with pytest.raises(AuditError, match="symbolic link"):
        AuditLog.open(path)
    assert not elsewhere.exists()


def test_what_is_no_plain_file_is_refused(path):
    os.mkfifo(path, 0o600)
    with pytest.raises(AuditError, match="not a plain file"):
        AuditLog.open(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(path):
    write(path)
    os.chown(path, 12345, -1)
    with pytest.raises(AuditError, match="belongs to user 12345"):
        AuditLog.open(path)


@pytest.mark.parametrize(
    ("options", "named"), [({"max_bytes": 4095}, "max_bytes"), ({"keep": 0}, "keep")]
)
def test_settings_that_cannot_be_are_refused_by_name(path, options, named):
    with pytest.raises(AuditError, match=named):
        AuditLog.open(path, **options)
    assert not path.exists()


# What can be proved


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A log's lines and its anchor."""
    path = tmp_path_factory.mktemp("sound") / "audit.jsonl"
    anchor = write(path)
    return lines_of(path), anchor


def judged(path, lines, anchor=None):
    path.write_bytes(b"".join(lines))
    return verify([path], anchor=anchor).problems


@FOREVER
@given(st.data())
def test_a_change_of_any_single_byte_is_found(path, sound, data):
    lines, anchor = sound
    content = bytearray(b"".join(lines))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[at]))
    problems = judged(path, [bytes(content)], anchor)
    assert problems
    edited = bytes(content[:at]).count(b"\n") + 1
    assert any(abs(problem.line - edited) <= 1 or problem.line == 0 for problem in problems)


@FOREVER
@given(st.integers(0, NUM_LINES - 2))
def test_a_line_that_was_removed_is_missed_without_an_anchor(path, sound, removed):
    lines, _ = sound
    (problem,) = judged(path, lines[:removed] + lines[removed + 1 :])
    assert (problem.damage, problem.line) == (Damage.REMOVED, removed + 1)


@FOREVER
@given(st.integers(0, NUM_LINES - 1), st.integers(0, NUM_LINES - 1))
def test_lines_that_changed_places_are_found(path, sound, one, other):
    lines, anchor = list(sound[0]), sound[1]
    lines[one], lines[other] = lines[other], lines[one]
    assert bool(judged(path, lines, anchor)) == (one != other)


@FOREVER
@given(st.data())
def test_a_line_that_was_put_in_is_found(path, sound, data):
    lines, anchor = sound
    at = data.draw(st.integers(0, NUM_LINES))
    before = lines[at - 1][:-1] if at else b""
    forged = entries.Entry(
        seq=at + 1,
        time=entries.moment(time.time()),
        identity="alice",
        event=steered(),
        previous=entries.digest(before) if at else GENESIS,
    )
    fits = entries.encode(forged, None) + b"\n"
    line = data.draw(st.sampled_from([fits, b"\n", b"{}\n", *lines]))
    found = judged(path, [*lines[:at], line, *lines[at:]], anchor)
    appended_to_the_anchor = at == NUM_LINES and line is fits
    assert bool(found) != appended_to_the_anchor


@FOREVER
@given(st.data())
def test_a_tail_that_was_cut_off_is_found_with_an_anchor(path, sound, data):
    lines, anchor = sound
    content = b"".join(lines)
    end = data.draw(st.integers(0, len(content) - 1))
    assert judged(path, [content[:end]], anchor)


def test_without_an_anchor_lines_cut_off_at_the_end_are_not_found(path, sound):
    lines, _ = sound
    assert not judged(path, lines[:-1])


@pytest.mark.parametrize("field", ["seq", "time", "previous"])
@pytest.mark.parametrize("count", [1, NUM_LINES])
def test_a_last_line_that_does_not_follow_the_one_before_is_found(path, field, count):
    write(path, count)
    *lines, last = lines_of(path)
    entry = entries.decode(last[:-1])
    wrong = {"seq": count + 1, "time": "2000-01-01T00:00:00.000000Z", "previous": "1" * 64}
    edited = msgspec.structs.replace(entry, **{field: wrong[field]})
    found = judged(path, [*lines, entries.encode(edited, None) + b"\n"])
    assert bool(found) == (count > 1 or field != "time")


def test_an_anchor_holds_for_a_log_that_has_grown_since(path):
    anchor = write(path)
    write(path)
    found = verify([path], anchor=anchor)
    assert not found.problems
    assert (found.anchor_seq, found.head_seq) == (NUM_LINES, 2 * NUM_LINES)


def test_a_log_that_was_written_anew_as_a_whole_is_found_with_an_anchor_only(path, tmp_path):
    anchor = write(path)
    path.unlink()
    write(path)
    assert not damages(path)
    assert damages(path, anchor=anchor) == [Damage.TRUNCATED]


@pytest.fixture
def rotated(path):
    """A log of at least four files, its anchor, its rotated files."""
    anchor = write(path, 60, max_bytes=8192)
    found = files.rotated(path)
    assert len(found) >= 3
    return path, anchor, found


def test_a_file_missing_in_the_middle_is_named(rotated):
    path, _, (_, second, third, *_) = rotated
    second.unlink()
    (problem,) = verify([path]).problems
    assert (problem.damage, problem.path) == (Damage.MISSING_FILE, third)
    assert second.name in problem.detail


def test_a_file_missing_at_the_beginning_is_not_taken_for_a_deletion_of_ours(rotated):
    path, _, (first, *_) = rotated
    first.unlink()
    assert damages(path) == [Damage.REMOVED]


def test_a_file_missing_at_the_end_is_found_with_an_anchor_only(rotated):
    path, anchor, _ = rotated
    path.unlink()
    assert not damages(path)
    assert damages(path, anchor=anchor) == [Damage.TRUNCATED]


def test_a_rotated_file_that_was_cut_off_at_its_end_is_named(rotated):
    path, _, (_, second, *_) = rotated
    second.write_bytes(b"".join(lines_of(second)[:-2]))
    (problem,) = verify([path]).problems
    assert (problem.damage, problem.path) == (Damage.TRUNCATED, second)


def test_a_rotated_file_that_lost_its_first_lines_is_named(rotated):
    path, _, (_, second, *_) = rotated
    second.write_bytes(b"".join(lines_of(second)[2:]))
    (problem,) = verify([path]).problems
    assert (problem.damage, problem.path, problem.line) == (Damage.REMOVED, second, 1)


def test_a_file_that_was_emptied_is_named(rotated):
    path, _, (_, second, *_) = rotated
    second.write_bytes(b"")
    assert (Damage.TRUNCATED, second) in [p[:2] for p in verify([path]).problems]
    path.write_bytes(b"")
    assert (Damage.TRUNCATED, path) in [p[:2] for p in verify([path]).problems]


def test_rotated_files_can_be_checked_apart_in_any_order(rotated):
    _, _, (_, second, third, *_) = rotated
    found = verify([third, second])
    assert not found.problems
    assert found.first_seq == files.first_seq(second)


# With a key


def rebuilt(lines):
    """The lines with a chain that holds again, as anyone can make it without a key."""
    previous, made = GENESIS, []
    for line in lines:
        entry = msgspec.structs.replace(entries.decode(line[:-1]), previous=previous)
        made.append(msgspec.json.encode(entry) + b"\n")
        previous = entries.digest(made[-1][:-1])
    return made


def test_a_chain_that_was_built_anew_is_found_with_the_key_and_not_without(path, key_file):
    key = entries.read_key(key_file)
    write(path, key_file=key_file)
    assert not damages(path, key=key)
    lines = lines_of(path)
    path.write_bytes(b"".join(rebuilt(lines)))
    assert not damages(path, key=key)
    forged = lines[3].replace(b'"identity":"team-2"', b'"identity":"team-0"')
    assert forged != lines[3]
    path.write_bytes(b"".join(rebuilt([*lines[:3], forged, *lines[4:]])))
    assert not damages(path)
    assert set(damages(path, key=key)) == {Damage.BAD_MAC}


def test_an_edit_of_the_last_line_is_found_with_the_key_alone(path, key_file):
    write(path, key_file=key_file)
    *lines, last = lines_of(path)
    path.write_bytes(b"".join([*lines, last.replace(b"team-", b"Team-")]))
    assert not damages(path)
    assert damages(path, key=entries.read_key(key_file)) == [Damage.BAD_MAC]
    with pytest.raises(AuditError, match="not written with this key"):
        AuditLog.open(path, key_file=key_file)


def test_a_log_has_macs_from_its_first_line_or_none(path, tmp_path, key_file):
    write(path)
    with pytest.raises(AuditError, match="begun without a key"):
        AuditLog.open(path, key_file=key_file)
    keyed = tmp_path / "keyed.jsonl"
    write(keyed, key_file=key_file)
    with pytest.raises(AuditError, match="begun with a key"):
        AuditLog.open(keyed)


def test_a_key_that_others_can_read_or_that_is_short_is_refused(path, key_file):
    key_file.chmod(0o640)
    with pytest.raises(AuditError, match="others can read"):
        AuditLog.open(path, key_file=key_file)
    key_file.chmod(0o600)
    key_file.write_text("short")
    with pytest.raises(AuditError, match="at least 32 bytes"):
        AuditLog.open(path, key_file=key_file)


# What it costs


@pytest.mark.parametrize("keyed", [False, True])
def test_ten_thousand_events_are_recorded_and_their_cost_is_told(
    path, key_file, keyed, record_property, capsys
):
    log = AuditLog.open(path, fsync=Fsync.CHANGES, key_file=key_file if keyed else None)
    begun = time.perf_counter()
    for i in range(10_000):
        log.record(steered(f"chatcmpl-{i:032d}"), "team-a")
    micros = (time.perf_counter() - begun) * 100
    log.close()
    record_property("microseconds_per_event", micros)
    with capsys.disabled():
        print(f"\n{micros:.1f} µs an event{' with a key' if keyed else ''}")
    found = verify([path], key=entries.read_key(key_file) if keyed else None)
    assert not found.problems
    assert found.num_entries == 10_001


def test_every_event_can_be_decoded_from_what_it_is_encoded_to():
    assert all(issubclass(event, Checked) for event in get_args(AuditEvent))
    tags = [event.__struct_config__.tag for event in get_args(AuditEvent)]
    assert len(set(tags)) == len(tags)
