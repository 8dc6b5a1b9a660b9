"""What a worker tells the hub, and what it does when it cannot."""

import time

import numpy as np
import pytest
import torch
import zmq
from steerscope.catalog import store
from steerscope.engine import readout as readout_module
from steerscope.engine.plan import RequestInfo, StepLayout
from steerscope.engine.readout import FrameSender, Readout, Source
from steerscope.engine.roster import Arrival, Roster
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.hub.protocol import frames_address
from steerscope.steering.interventions import parse_spec
from steerscope.steering.stamp import Stamp
from steerscope.telemetry import frames
from steerscope.telemetry.frames import RequestEnd

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

    is_waiting = False

    def send(self, payload, wait_ns):
        if self.open:
            self.sent.append(frames.decode(payload))
        return self.open


@pytest.fixture
def site(tiny_world):
    catalog = store.load(tiny_world.catalog)
    step = StepRows(8, torch.device("cpu"))
    return SiteTap(catalog, next(iter(catalog.sites)), step, 4, torch.device("cpu")), step


@pytest.fixture
def wire():
    return Wire()


@pytest.fixture
def readout(site, wire):
    source = Source("digest", "model", "0", 0)
    return Readout(source, [site[0]], wire, Roster())


@pytest.fixture
def patience(monkeypatch):
    """However slow the machine, steps wait for each other."""
    monkeypatch.setattr(readout_module, "TELL_EVERY_NS", 10**12)


def layout(*members):
    starts = np.cumsum([0, *(n for _, _, n in members)])
    return StepLayout(tuple(m[0] for m in members), starts, np.array([m[1] for m in members]))


def emit(readout, *members, finished=(), steered_E=NO_TOKENS, waits=False):
    """One step, in the order of the runtime: ends, arrivals, tokens."""
    readout.settle()
    readout.end(dict.fromkeys(finished, 7))
    readout._roster.leave(finished)
    for req_id, *_ in members:
        if req_id not in readout._roster:
            readout._roster.arrive([Arrival(req_id, RequestInfo(Stamp(f"ext-{req_id}"), 5), ())])
    made = layout(*members)
    if members:
        readout.emit(made, steered_E)
        if not waits:
            readout.settle()
    else:
        readout.flush()


def decode(readout, position, steered_E=NO_TOKENS):
    """A step in which "a" and "b" decode; "b" is ten tokens ahead."""
    readout.emit(layout(("a", position, 1), ("b", position + 10, 1)), steered_E)


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
        acts.append(tap.acts_TF[:2].clone())
        decode(readout, 4 + k)
    tap.acts_TF.zero_()
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
    tap, step = site
    add = '{"interventions": [{"feature": "unit_1", "add": 4.0}]}'
    tap.write_row(1, list(parse_spec(add).interventions))
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    step.stage(np.array([0, 1], np.int64))
    for k in range(3):
        tap(torch.randn(2, 128, generator=torch.Generator().manual_seed(k)), None)
        tap.deltas_TF[1, 0] = k
        decode(readout, 4 + k, step.steered_E)
    readout.settle()
    tokens, deltas, doses = frames.edits(wire.sent[-1].sites[0])
    assert tokens.tolist() == [3, 4, 5]  # those of "b"
    assert deltas[:, 0].tolist() == [0.0, 1.0, 2.0]
    assert (doses > 0.0).all()


def test_a_step_that_does_not_go_on_with_those_before_is_told_apart(readout, wire, patience):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    decode(readout, 4)
    decode(readout, 5)
    decode(readout, 5, np.array([1]))  # steered from here on
    emit(readout, ("b", 16, 1), waits=True)
    emit(readout, ("b", 17, 2), waits=True)
    lengths = [np.diff(f.query_start_loc).tolist() for f in wire.sent]
    assert lengths == [[4, 4], [2, 2], [1, 1], [1], [2]]


def test_positions_that_do_not_follow_each_other_are_told_apart(readout, wire, patience):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    for position in (4, 5, 5):
        decode(readout, position)
    readout.settle()
    assert [f.positions for f in wire.sent[1:]] == [(4, 14), (5, 15), (5, 15)]


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


def test_an_end_waits_less_than_tokens(readout, wire):
    emit(readout, ("a", 0, 4), ("b", 10, 4))
    readout.settle()
    readout.end({"a": 4})
    began = time.monotonic_ns()
    position = 14
    while len(wire.sent) == 1:
        readout.emit(layout(("b", position, 1)), NO_TOKENS)
        position += 1
        time.sleep(0.001)
    assert time.monotonic_ns() - began < readout_module.TELL_EVERY_NS
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
    readout._readback.sites[0].acts = None
    emit(readout, ("a", 0, 2))
    assert wire.sent == []


def test_only_tokens_that_were_changed_are_listed_as_edits(readout, wire, site):
    tap, step = site
    gated = '{"feature": "unit_1", "clamp": 4.0, "when": {"feature": "probe_1", "above": 0.0}}'
    tap.write_row(1, list(parse_spec(f'{{"interventions": [{gated}]}}').interventions))
    rows = np.array([0, 1, 1, 1, 1, 1], np.int64)
    step.stage(rows)
    tap(2 * torch.randn(6, 128, generator=torch.Generator().manual_seed(1)), None)
    readout._roster.arrive([Arrival("a", RequestInfo(None, 6), ())])
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

        sender = FrameSender(str(tmp_path))
        with hub() as first:
            assert sender.send(b"a", 0)
            assert first.recv() == b"a"
            assert not sender.has_lost_hub()
        deadline = time.monotonic() + 10
        while not sender.has_lost_hub():
            assert time.monotonic() < deadline
        assert not sender.has_lost_hub()
        assert sender.send(b"b", 0)
        assert sender.send(b"c", 0)
        with hub() as second:
            assert [second.recv(), second.recv()] == [b"b", b"c"]


def test_frames_that_follow_each_other_closely_go_in_one_message(tmp_path):
    with zmq.Context() as context, context.socket(zmq.PULL) as hub:
        hub.setsockopt(zmq.RCVTIMEO, 10_000)
        hub.bind(frames_address(str(tmp_path)))
        sender = FrameSender(str(tmp_path))
        sender.send(b"first, after a long time", 10**7)
        assert hub.recv_multipart() == [b"first, after a long time"]
        assert not sender.is_waiting
        sender.send(b"a", 10**7)
        sender.send(b"b", 10**7)
        assert sender.is_waiting
        sender.send(b"c", 0)
        assert hub.recv_multipart() == [b"a", b"b", b"c"]
        sender.send(b"d", 10**7)
        time.sleep(0.02)
        sender.send(b"e", 10**7)
        assert hub.recv_multipart() == [b"d", b"e"]
        sender.send(b"small", 10**7)
        large = bytes(readout_module.MAX_MESSAGE_BYTES)
        sender.send(large, 10**7)
        assert hub.recv_multipart() == [b"small", large]


def test_where_no_message_is_taken_only_the_newest_frame_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(readout_module, "SEND_QUEUE_MESSAGES", 1)
    sender = FrameSender(str(tmp_path))  # nobody is there
    while sender.send(b"x", 0):
        pass
    assert sender.send(b"waits", 10**7)
    assert not sender.send(b"lost", 0)
    with zmq.Context() as context, context.socket(zmq.PULL) as hub:
        hub.setsockopt(zmq.RCVTIMEO, 10_000)
        hub.bind(frames_address(str(tmp_path)))
        assert hub.recv_multipart() == [b"x"]
        while not sender.send(b"y", 0):
            pass
        while (message := hub.recv_multipart()) == [b"x"]:
            pass
        assert message == [b"waits", b"y"]


class Flight:
    """A device's event, as far as the readout asks it."""

    def __init__(self):
        self.is_under_way = False

    def record(self):
        self.is_under_way = True

    def synchronize(self):
        self.is_under_way = False


def test_values_under_way_from_a_gpu_are_told_before_the_next_step_begins(readout, wire):
    flight = readout._readback._event = Flight()
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
