"""What a worker tells the hub, and what it does when it cannot."""

import time

import numpy as np
import pytest
import torch
import zmq
from steerscope.catalog import store
from steerscope.engine import readout as readout_module
from steerscope.engine import sender as sender_module
from steerscope.engine.plan import BatchPlan, RequestInfo, StepLayout
from steerscope.engine.readout import Readout, Source
from steerscope.engine.roster import Arrival, MoreBlocks, Roster
from steerscope.engine.rows import RowTable
from steerscope.engine.sender import MAX_QUEUED_BYTES, FrameSender
from steerscope.engine.slots import SlotCache
from steerscope.engine.tape import Tape
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.hub.protocol import frames_address
from steerscope.steering.interventions import parse_spec
from steerscope.steering.stamp import Stamp
from steerscope.telemetry import frames
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.frames import RequestEnd
from steerscope.telemetry.requests import Limits, RequestLedger

NO_TOKENS = np.zeros(0, np.int64)


class Wire:
    """Takes frames, or does not; ``lost`` once the hub at its end is gone."""

    def __init__(self):
        self.open = True
        self.lost = False
        self.sent = []

    def has_lost_hub(self):
        lost, self.lost = self.lost, False
        return lost

    def send(self, payload):
        if self.open:
            self.sent.append(frames.decode(payload))
        return self.open


@pytest.fixture
def site(tiny_world):
    catalog = store.load(tiny_world.catalog)
    step = StepRows(8, torch.device("cpu"), max_waiting=300)
    return SiteTap(catalog, next(iter(catalog.sites)), step, 4, torch.device("cpu")), step


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def readout(site, wire):
    tap, step = site
    made = Readout(Source("digest", "model", "0", 0), [tap], Tape([tap], step, 8), wire, Roster())
    made.plan = BatchPlan(RowTable(1), lambda _: RequestInfo(None, 5), None)
    return made


@pytest.fixture
def patience(monkeypatch):
    """However slow the machine, steps wait for each other."""
    monkeypatch.setattr(readout_module, "TELL_EVERY_NS", 10**12)


def layout(*members):
    starts = np.cumsum([0, *(n for _, _, n in members)])
    return StepLayout(tuple(m[0] for m in members), starts, np.array([m[1] for m in members]))


def emit(readout, *members, finished=(), steered_E=NO_TOKENS, waits=False):
    """One step, in the order of the runtime: ends, arrivals, tokens."""
    readout.tell()
    readout.end(dict.fromkeys(finished, 7))
    readout._roster.leave(finished)
    for req_id, *_ in members:
        if req_id not in readout._roster:
            readout._roster.arrive([Arrival(req_id, RequestInfo(Stamp(f"ext-{req_id}"), 5), ())])
    if members:
        step(readout, *members, steered_E=steered_E)
        if not waits:
            readout.tell()
    else:
        readout.flush()


def step(readout, *members, steered_E=NO_TOKENS):
    """What the runtime does with a step."""
    made = layout(*members)
    if readout.plan.goes_on(made._replace(req_ids=list(made.req_ids))):
        readout.extend(readout.plan, steered_E)
    else:
        readout.plan.rows(made)
        readout.meet(made)
        readout.emit(made, steered_E)


def decode(readout, position, steered_E=NO_TOKENS):
    """A step in which "a" and "b" decode; "b" is ten tokens ahead."""
    step(readout, ("a", position, 1), ("b", position + 10, 1), steered_E=steered_E)


def test_a_request_is_introduced_once_and_its_end_is_told(readout, wire):
    emit(readout, ("a", 0, 3))
    emit(readout, ("a", 3, 1))
    emit(readout, finished=["a"])
    assert [[s.external_id for s in f.started] for f in wire.sent] == [["ext-a"], [], []]
    assert [f.finished for f in wire.sent] == [(), (), (RequestEnd("a", 7),)]
    assert [f.step for f in wire.sent] == [0, 1, 2]


def test_an_id_that_comes_back_is_introduced_again(readout, wire):
    emit(readout, ("a", 0, 1))
    emit(readout, ("a", 0, 1), finished=["a"])
    assert [len(f.started) for f in wire.sent] == [1, 1]


def test_what_could_not_be_sent_is_counted_and_starts_and_ends_are_told_later(readout, wire):
    emit(readout, ("a", 0, 2))
    wire.open = False
    emit(readout, ("b", 2, 3), finished=["a"])
    wire.open = True
    emit(readout, ("b", 5, 1))
    last = wire.sent[-1]
    assert (last.dropped, last.dropped_tokens) == (1, 3)
    assert last.finished == (RequestEnd("a", 7),)
    (start,) = last.started
    assert (start.request_id, start.first_position) == ("b", 2)


def test_with_the_hub_gone_for_good_nothing_piles_up(readout, wire):
    emit(readout, ("a", 0, 2))
    wire.open = False
    for i in range(100):
        emit(readout, (f"r{i}", 0, 2), finished=[f"r{i - 1}"] if i else ["a"])
    wire.open = True
    emit(readout, finished=["r99"])
    last = wire.sent[-1]
    assert (last.dropped, last.finished, last.started) == (100, (RequestEnd("a", 7),), ())


def test_a_hub_that_is_gone_is_followed_by_one_that_is_told_of_running_requests(readout, wire):
    emit(readout, ("a", 2, 3), ("b", 0, 2))
    wire.lost = True
    emit(readout, ("a", 5, 1), ("c", 0, 4))
    emit(readout, ("b", 2, 1))
    emit(readout, ("a", 6, 1), ("b", 3, 1), ("c", 4, 1))
    told = [{s.request_id: (s.first_position, s.resumed_at) for s in f.started} for f in wire.sent]
    assert told == [
        {"a": (2, None), "b": (0, None)},
        {"a": (0, 5), "c": (0, None)},
        {"b": (0, 2)},
        {},
    ]
    assert [f.told_tokens for f in wire.sent] == [0, 5, 10, 11]


def test_an_end_is_told_to_a_hub_that_never_knew_the_request(readout, wire):
    emit(readout, ("a", 0, 3), ("b", 0, 2))
    wire.lost = True  # while the step runs in which "a" was said to have ended
    emit(readout, ("c", 0, 1), finished=["a"])
    emit(readout, finished=["b"])
    emit(readout, finished=["c"])
    started = [[(s.request_id, s.resumed_at) for s in f.started] for f in wire.sent[1:]]
    assert started == [[("a", 7), ("c", None)], [("b", 7)], []]
    assert [[e.request_id for e in f.finished] for f in wire.sent[1:]] == [["a"], ["b"], ["c"]]


def test_steps_of_the_same_requests_are_told_as_one(readout, wire, site, patience):
    tap, _ = site
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    acts = []
    for k in range(3):
        tap(torch.randn(2, 128, generator=torch.Generator().manual_seed(k)), None)
        acts.append(tap.acts_of_step(2).clone())
        decode(readout, 4 + k)
    assert len(wire.sent) == 1  # only the prompts so far
    emit(readout, finished=["a"])
    told, end = wire.sent[1:]
    assert (told.request_ids, told.query_start_loc, told.positions) == (
        ("a", "b"),
        (0, 3, 6),
        (4, 14),
    )
    assert np.array_equal(frames.acts_TF(told.sites[0]), torch.stack(acts, 1).reshape(6, -1))
    assert len(told.overhead_ns) == 3
    assert (end.told_tokens, end.step, end.finished) == (8 + 6, 2, (RequestEnd("a", 7),))


def test_steered_steps_are_told_as_one_with_their_edits(readout, wire, site, patience):
    tap, step_rows = site
    add = '{"interventions": [{"feature": "unit_1", "add": 4.0}]}'
    tap.write_row(1, list(parse_spec(add).interventions))
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    step_rows.stage(np.array([0, 1], np.int64))
    for k in range(3):
        tap(torch.randn(2, 128, generator=torch.Generator().manual_seed(k)), None)
        tap.deltas_TF[step_rows.rows(2)][1, 0] = k
        decode(readout, 4 + k, step_rows.steered_E)
    readout.tell()
    tokens, deltas, doses = frames.edits(wire.sent[-1].sites[0])
    assert tokens.tolist() == [3, 4, 5]  # those of "b"
    assert deltas[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert (doses > 0.0).all()


def test_steps_of_changing_crowds_are_told_as_one(readout, wire, site, patience):
    """Random crowds, chunks and edits: every token's values come under its request and position."""
    tap, step_rows = site
    rng = np.random.default_rng(5)
    add = '{"interventions": [{"feature": "unit_1", "add": 4.0}]}'
    tap.write_row(1, list(parse_spec(add).interventions))
    emit(readout, ("a", 0, 1))  # from here on all wait
    expected, at = {}, {"a": 1}
    for k in range(60):
        if k % 3 == 0:  # else the crowd is that of the step before, in another order now and then
            for name in [name for name in at if rng.random() < 0.3]:
                readout.end({name: at.pop(name)})
                readout._roster.leave([name])
            for name in (f"r{k}", f"s{k}"):
                if rng.random() < 0.5 and len(at) < 4:
                    at[name] = 0
                    readout._roster.arrive([Arrival(name, RequestInfo(Stamp(name), 5), ())])
        crowd = list(at)
        if k % 5 == 0:
            rng.shuffle(crowd)
        members = [(name, at[name], int(rng.integers(1, 3)) if k % 4 else 1) for name in crowd]
        if not members:
            continue
        num_tokens = sum(n for _, _, n in members)
        step_rows.stage(rng.integers(0, 2, num_tokens))
        tap(torch.randn(num_tokens, 128), None)
        rows = [(name, first + i) for name, first, n in members for i in range(n)]
        for t, (key, act) in enumerate(zip(rows, tap.acts_of_step(num_tokens), strict=True)):
            delta = float(tap.deltas_TF[step_rows.rows(num_tokens)][t, 1])
            expected[key] = act.numpy().copy(), delta if t in step_rows.steered_E else 0.0
        steered_E = step_rows.steered_E
        step_rows.clear()
        readout.meet(layout(*members))
        readout.emit(layout(*members), steered_E)
        at |= {name: first + n for name, first, n in members}
    readout.tell()
    assert len(wire.sent) < 15  # of 60 steps
    told = {}
    for frame in wire.sent[1:]:
        (sent,) = frame.sites
        acts, edits = frames.acts_TF(sent), frames.edits(sent)
        deltas = dict(zip(edits[0].tolist(), edits[1][:, 1].tolist(), strict=True))
        bounds = zip(frame.query_start_loc, frame.query_start_loc[1:], strict=False)
        assert len(set(frame.request_ids)) == len(frame.request_ids)
        for name, first, (start, end) in zip(
            frame.request_ids, frame.positions, bounds, strict=True
        ):
            for t in range(start, end):
                assert (name, first + t - start) not in told
                told[name, first + t - start] = acts[t], deltas.get(t, 0.0)
    assert told.keys() == expected.keys()
    for key, (act, delta) in expected.items():
        assert np.array_equal(told[key][0], act)
        assert told[key][1] == delta
    assert sum(delta != 0.0 for _, delta in expected.values()) > 20


def test_a_prefix_that_is_computed_in_the_very_step_that_hits_it_is_told(
    readout, wire, site, patience
):
    """vLLM lets requests that come together share blocks that only one of them computes."""
    tap, _ = site
    readout.keep(SlotCache((len(tap.features),), 64, 1 << 20), 4)
    emit(readout, ("x", 0, 1))
    for name, blocks in (("a", [3]), ("b", [3, 5])):
        readout._roster.arrive([Arrival(name, RequestInfo(Stamp(f"ext-{name}"), 5), blocks)])
    tap(torch.randn(6, 128), None)
    acts = tap.acts_of_step(6).numpy().copy()
    step(readout, ("a", 0, 4), ("b", 4, 2))
    readout.tell()
    (cached,) = [s.cached for s in wire.sent[-1].started if s.request_id == "b"]
    assert list(cached.known) == [1, 1, 1, 1]
    assert np.array_equal(frames.acts_TF(cached.sites[0]), acts[:4])


def test_a_slot_that_changes_hands_while_steps_wait_has_what_came_last(
    readout, wire, site, patience
):
    tap, _ = site
    roster, acts = readout._roster, []

    def run(*members):
        num_tokens = sum(n for _, _, n in members)
        tap(torch.randn(num_tokens, 128), None)
        acts.append(tap.acts_of_step(num_tokens).numpy().copy())
        step(readout, *members)

    readout.keep(SlotCache((len(tap.features),), 64, 1 << 20), 4)
    emit(readout, ("x", 0, 1))
    for name, block in (("a", 1), ("b", 2)):
        roster.arrive([Arrival(name, RequestInfo(Stamp(name), 5), [block])])
    run(("a", 0, 4), ("b", 0, 4))
    readout.end({"b": 4})
    roster.leave(["b"])
    roster.extend([MoreBlocks("a", [2], anew=False)])
    run(("a", 4, 1))
    roster.arrive([Arrival("c", RequestInfo(Stamp("c"), 9), [1, 2])])
    run(("a", 5, 1), ("c", 5, 1))
    readout.tell()
    (cached,) = [s.cached for frame in wire.sent for s in frame.started if s.request_id == "c"]
    assert list(cached.known) == [1] * 5
    assert np.array_equal(frames.acts_TF(cached.sites[0]), np.concatenate([acts[0][:4], acts[1]]))


class TestManyThatShareAPrefix:
    """Eight tokens of it were computed by "a" and are kept; "b" to "d" come in one step."""

    @pytest.fixture
    def crowd(self, readout, wire, site, patience):
        tap, _ = site
        readout.keep(SlotCache((len(tap.features),), 64, 1 << 20), 4)
        readout._roster.arrive([Arrival("a", RequestInfo(Stamp("ext-a"), 9), [3, 4, 5])])
        tap(torch.randn(8, 128), None)
        step(readout, ("a", 0, 8))
        readout.tell()
        for i, name in enumerate("bcd"):
            blocks = [3, 4, 6 + i]
            readout._roster.arrive([Arrival(name, RequestInfo(Stamp(f"ext-{name}"), 9), blocks)])
        tap(torch.randn(4, 128), None)
        wire.sent.clear()
        return layout(("a", 8, 1), *((name, 8, 1) for name in "bcd"))

    def run(self, readout, crowd):
        readout.meet(crowd)
        readout.emit(crowd, NO_TOKENS)

    def test_they_are_told_of_a_few_at_a_time_before_their_tokens(
        self, readout, wire, crowd, tiny_world
    ):
        readout._news._max_cached = 10
        readout._news.ended.append(RequestEnd("x", 7))  # may have tokens that still wait
        self.run(readout, crowd)
        (starts,) = wire.sent
        assert [s.request_id for s in starts.started] == ["b", "c"]
        assert all(sum(s.cached.known) == 8 for s in starts.started)
        assert (starts.request_ids, starts.finished) == ((), ())
        readout.tell()
        tokens = wire.sent[1]
        assert [s.request_id for s in tokens.started] == ["d"]
        assert (tokens.request_ids, len(tokens.finished)) == (("a", "b", "c", "d"), 1)
        catalog = store.load(tiny_world.catalog)
        ledger = RequestLedger(Columns(catalog), Limits(10, 60.0, 100), lambda track: ())
        steps = [ledger.feed(frame, 0.0) for frame in wire.sent]
        cached = [n for fed in steps for n in fed.blocks if n.cached]
        assert sum(news.fresh_T.sum() for news in cached) == 3 * 8
        assert [track.end for track in ledger.running()] == [9] * 3

    def test_a_hub_that_is_new_by_then_is_told_of_each_once(self, readout, wire, crowd):
        readout._news._max_cached = 10
        wire.lost = True
        self.run(readout, crowd)
        readout.tell()
        told = [(s.request_id, s.resumed_at) for f in wire.sent for s in f.started]
        assert sorted(told) == [("a", 8), ("b", None), ("c", None), ("d", None)]
        assert wire.sent[-1].request_ids == ("a", "b", "c", "d")

    def test_what_cannot_be_told_is_not_kept_for_later(self, readout, wire, crowd):
        wire.open = False
        self.run(readout, crowd)
        readout.tell()
        wire.open = True
        readout.flush()
        (late,) = wire.sent
        assert [(s.request_id, s.first_position, s.cached) for s in late.started] == [
            (name, 8, None) for name in "bcd"
        ]

    def test_of_a_prefix_that_no_frame_would_hold_nothing_is_told(
        self, readout, wire, crowd, monkeypatch
    ):
        monkeypatch.setattr(
            readout_module, "MAX_REUSED_BYTES", 8 * readout._kept.bytes_per_slot - 1
        )
        self.run(readout, crowd)
        readout.tell()
        assert [s.cached for s in wire.sent[-1].started] == [None] * 3


def test_an_id_that_comes_back_while_its_end_waits_is_another_request(readout, wire, patience):
    emit(readout, ("a", 0, 4), ("b", 0, 4))
    decode_a = ("a", 4, 1)
    step(readout, decode_a)
    readout.settle()
    readout.end({"a": 5})
    readout._roster.leave(["a"])
    readout._roster.arrive([Arrival("a", RequestInfo(Stamp("another"), 5), ())])
    step(readout, ("a", 0, 2))
    readout.tell()
    told = [([s.external_id for s in f.started], [e.end for e in f.finished]) for f in wire.sent]
    assert told == [(["ext-a", "ext-b"], []), ([], [5]), (["another"], [])]


def test_an_end_is_told_after_all_of_the_request_s_tokens(readout, wire, patience):
    """Where one of them was preempted and goes back, what waits takes several frames."""
    emit(readout, ("a", 0, 4), ("b", 0, 4))
    step(readout, ("a", 4, 1), ("b", 4, 1))
    step(readout, ("a", 0, 3), ("b", 5, 1))
    readout.settle()
    readout.end({"b": 6})
    readout._roster.leave(["b"])
    step(readout, ("a", 3, 2))
    readout.tell()
    told = [(f.request_ids, [e.request_id for e in f.finished]) for f in wire.sent[1:]]
    assert told == [(("a", "b"), []), (("a", "b"), []), (("a",), ["b"])]


def test_where_what_waits_takes_several_frames_each_has_its_own_values(
    readout, wire, site, patience
):
    tap, _ = site
    emit(readout, ("a", 0, 4), ("b", 0, 4))
    acts = []
    for first in (4, 5, 2, 3):  # then both go back
        tap(torch.randn(2, 128), None)
        acts.append(tap.acts_of_step(2).numpy().copy())
        step(readout, ("a", first, 1), ("b", first, 1))
    readout.tell()
    told = [frames.acts_TF(frame.sites[0]) for frame in wire.sent[1:]]
    assert len(told) == 2
    for made, pair in zip(told, (acts[:2], acts[2:]), strict=True):
        assert np.array_equal(made, np.stack(pair, 1).reshape(4, -1))


def test_a_hub_that_is_gone_is_told_of_what_waited_in_several_frames(readout, wire, patience):
    emit(readout, ("a", 0, 4), ("b", 0, 4))
    step(readout, ("a", 4, 1), ("b", 4, 1))
    step(readout, ("a", 0, 3), ("b", 5, 1))
    wire.lost = True
    readout.settle()
    readout.end({"b": 6})
    readout._roster.leave(["b"])
    readout.tell()
    first, second = wire.sent[1:]
    assert {s.request_id: s.resumed_at for s in first.started} == {"a": 4, "b": 4}
    assert (first.finished, second.started) == ((), ())
    assert second.finished == (RequestEnd("b", 6),)


def test_a_request_that_began_and_ended_while_it_waited_is_told(readout, wire, patience):
    emit(readout, ("a", 0, 4))
    readout._roster.arrive([Arrival("b", RequestInfo(Stamp("ext-b"), 5), ())])
    step(readout, ("a", 4, 1), ("b", 0, 3))
    readout.settle()
    readout.end({"b": 3})
    readout._roster.leave(["b"])
    step(readout, ("a", 5, 1))
    readout.tell()
    assert [[s.external_id for s in f.started] for f in wire.sent[1:]] == [["ext-b"], []]
    assert [f.request_ids for f in wire.sent[1:]] == [("a", "b"), ("a",)]
    assert [[e.request_id for e in f.finished] for f in wire.sent[1:]] == [[], ["b"]]


def test_positions_that_do_not_follow_each_other_are_told_apart(readout, wire, patience):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    for position in (4, 5, 5):
        decode(readout, position)
    readout.tell()
    told = [(f.positions, f.query_start_loc) for f in wire.sent[1:]]
    assert told == [((4, 14), (0, 2, 4)), ((5, 15), (0, 1, 2))]


def test_no_step_waits_longer_than_it_should(readout, wire):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    began = time.monotonic_ns()
    position = 4
    while len(wire.sent) == 1:
        decode(readout, position)
        position += 1
        time.sleep(0.005)
    assert time.monotonic_ns() - began >= readout_module.TELL_EVERY_NS
    assert wire.sent[1].query_start_loc[1] == position - 4
    assert wire.sent[1].monotonic_ns - began < readout_module.TELL_EVERY_NS
    time.sleep(1e-9 * readout_module.TELL_EVERY_NS)
    decode(readout, position)
    assert wire.sent[2].query_start_loc == (0, 1, 2)


@pytest.mark.parametrize("is_awaited", [True, False])
def test_an_end_that_a_response_waits_for_waits_less_than_tokens(readout, wire, is_awaited):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    readout._roster.restamp("a", Stamp("ext-a", is_awaited=is_awaited))
    readout.end({"a": 4})
    began = time.monotonic_ns()
    position = 14
    while len(wire.sent) == 1:
        step(readout, ("b", position, 1))
        position += 1
        time.sleep(0.001)
    waited = time.monotonic_ns() - began
    assert (waited < readout_module.TELL_EVERY_NS / 2) == is_awaited
    assert [end.request_id for end in wire.sent[1].finished] == ["a"]


def test_a_hub_that_is_gone_is_told_of_what_waited(readout, wire, patience):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    decode(readout, 4)
    wire.lost = True
    decode(readout, 5)
    emit(readout, finished=["a"])
    told = wire.sent[1]
    assert [(s.request_id, s.resumed_at) for s in told.started] == [("a", 4), ("b", 14)]
    assert told.query_start_loc == (0, 2, 4)


def test_a_fault_in_the_readout_never_reaches_serving(readout, wire, site):
    readout._tape._sites[0].acts = None
    emit(readout, ("a", 0, 2))
    assert wire.sent == []


def test_a_fault_in_keeping_never_reaches_serving_and_tokens_are_told(
    readout, wire, site, patience
):
    class Broken:
        def write(self, *args):
            raise RuntimeError("no such slot")

    readout.keep(Broken(), 4)
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    decode(readout, 4)
    readout.settle()
    decode(readout, 5)
    readout.tell()
    assert [f.query_start_loc for f in wire.sent] == [(0, 4, 8), (0, 2, 4)]


def test_a_step_that_is_lost_is_counted_and_those_around_it_are_told(
    readout, wire, patience, monkeypatch
):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    decode(readout, 4)

    def fails(*args):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patched:
        patched.setattr(readout._tape, "_advance", fails)
        decode(readout, 5)
    decode(readout, 6)
    decode(readout, 7)
    readout.tell()
    told = [(f.positions, f.query_start_loc, f.dropped_tokens) for f in wire.sent[1:]]
    assert told == [((4, 14), (0, 1, 2), 2), ((6, 16), (0, 2, 4), 2)]


def test_a_step_with_a_request_of_which_nothing_is_known_is_lost_and_counted(
    readout, wire, patience
):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    decode(readout, 4)
    step(readout, ("a", 5, 1), ("late", 3, 1))
    readout._roster.arrive([Arrival("late", RequestInfo(Stamp("ext-late"), 5), ())])
    step(readout, ("a", 6, 1), ("late", 4, 2))
    readout.tell()
    told = [(f.positions, f.query_start_loc, f.dropped_tokens) for f in wire.sent[1:]]
    assert told == [((4, 14), (0, 1, 2), 2), ((6, 4), (0, 1, 3), 2)]


def test_a_step_whose_start_fails_is_lost_and_the_request_is_introduced_with_the_next(
    readout, wire, patience, monkeypatch
):
    def fails(*args):
        raise RuntimeError("no such digest")

    emit(readout, ("a", 0, 4))
    step(readout, ("a", 4, 1))
    readout._roster.arrive([Arrival("c", RequestInfo(Stamp("ext-c"), 5), ())])
    with monkeypatch.context() as patched:
        patched.setattr(readout._news, "_request_start", fails)
        step(readout, ("a", 5, 1), ("c", 0, 1))
    step(readout, ("a", 6, 1), ("c", 1, 1))
    step(readout, ("a", 7, 1), ("c", 2, 1))
    readout.tell()
    told = [(f.request_ids, f.positions, f.dropped_tokens) for f in wire.sent[1:]]
    assert told[-1] == (("a", "c"), (6, 1), 2)
    assert [s.first_position for s in wire.sent[-1].started] == [1]
    assert wire.sent[-1].query_start_loc == (0, 2, 4)


def test_only_tokens_that_were_changed_are_listed_as_edits(readout, wire, site):
    tap, step = site
    gated = '{"feature": "unit_1", "clamp": 4.0, "when": {"feature": "probe_1", "above": 0.0}}'
    tap.write_row(1, list(parse_spec(f'{{"interventions": [{gated}]}}').interventions))
    rows = np.array([0, 1, 1, 1, 1, 1], np.int64)
    step.stage(rows)
    tap(2 * torch.randn(6, 128, generator=torch.Generator().manual_seed(1)), None)
    readout._roster.arrive([Arrival("a", RequestInfo(None, 6), ())])
    readout.meet(layout(("a", 0, 6)))
    readout.emit(layout(("a", 0, 6)), step.steered_E)
    (sent,) = wire.sent[0].sites
    tokens, deltas, doses = frames.edits(sent)
    probe = frames.acts_TF(sent)[:, 3]
    assert tokens.tolist() == [t for t in range(1, 6) if probe[t] > 0.0]
    assert 0 < len(tokens) < 5
    assert (doses > 0.0).all()
    assert (deltas[:, [0, 2, 3]] == 0.0).all()


def test_what_waits_for_a_hub_goes_to_the_next_one_in_order(tmp_path):
    with zmq.Context() as context:

        def hub():
            socket = context.socket(zmq.PULL)
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
            socket.bind(frames_address(str(tmp_path)))
            return socket

        sender = FrameSender(str(tmp_path), MAX_QUEUED_BYTES // 3)
        with hub() as first:
            assert sender.send(b"a")
            assert first.recv() == b"a"
            assert not sender.has_lost_hub()
        deadline = time.monotonic() + 10
        while not sender.has_lost_hub():
            assert time.monotonic() < deadline
        assert not sender.has_lost_hub()
        assert sender.send(b"b")
        assert sender.send(b"c")
        with hub() as second:
            assert [second.recv(), second.recv()] == [b"b", b"c"]


def test_where_no_more_bytes_may_wait_only_the_newest_frame_is_lost(tmp_path):
    sender = FrameSender(str(tmp_path), MAX_QUEUED_BYTES // 3)  # nobody is there
    assert [sender.send(b"x") for _ in range(4)] == [True, True, True, False]
    with zmq.Context() as context, context.socket(zmq.PULL) as hub:
        hub.setsockopt(zmq.RCVTIMEO, 10_000)
        hub.bind(frames_address(str(tmp_path)))
        assert hub.recv() == b"x"
        while not sender.send(b"y"):
            pass
        while (message := hub.recv()) == b"x":
            pass
        assert message == b"y"


def test_a_frame_that_the_hub_would_refuse_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(sender_module, "MAX_FRAME_BYTES", 3)
    sender = FrameSender(str(tmp_path), 1)
    assert [sender.send(payload) for payload in (b"abc", b"abcd")] == [True, False]


class Flight:
    """A device's event, as far as the readout asks it."""

    def __init__(self):
        self.is_under_way = False

    def record(self):
        self.is_under_way = True

    def synchronize(self):
        self.is_under_way = False


def test_values_under_way_from_a_gpu_are_told_before_the_next_step_begins(readout, wire):
    flight = readout._tape._event = Flight()
    emit(readout, ("a", 0, 3))
    assert flight.is_under_way
    assert wire.sent == []
    readout.release({})
    assert not flight.is_under_way
    emit(readout, finished=["a"])
    told, last = wire.sent
    assert told.request_ids == ("a",)
    assert [end.request_id for end in last.finished] == ["a"]
    readout.release({})
    assert len(wire.sent) == 2
