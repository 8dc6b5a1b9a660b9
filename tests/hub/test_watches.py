"""Watches through a real hub process: frames in at one end, a gRPC client at the other."""

import contextlib
import threading
import time

import grpc
import msgspec
import numpy as np
import psutil
import pytest
from google.protobuf.duration_pb2 import Duration
from hub_world import eventually, frame, start
from steerscope.api.v1 import telemetry_pb2 as pb
from steerscope.hub import launcher
from steerscope.hub.watches import cursors
from steerscope.telemetry.frames import RequestEnd
from watch_world import (
    NUM_CUTS,
    Script,
    Seen,
    activations_from,
    calls_to,
    cut_often,
    ended,
    refusal,
    report_of,
    requests_from,
    run_request,
    signals_from,
)

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def calls(hub):
    with calls_to(hub) as calls:
        yield calls


@pytest.fixture
def hub_with(settings):
    """Starts hubs with other settings."""
    with contextlib.ExitStack() as hubs:

        def make(**changed):
            hub = msgspec.structs.replace(settings.hub, **changed)
            running = launcher.start_hub(msgspec.structs.replace(settings, hub=hub))
            hubs.callback(running.stop)
            return running

        yield make


def _bare(event):
    bare = type(event)()
    bare.CopyFrom(event)
    bare.ClearField("cursor")
    bare.ClearField("missed")
    return bare


def _first(worker, catalog, open_from):
    """A cursor to begin with: of the event that a request of one token made."""
    stream = open_from("")
    run_request(worker, catalog, "first", 0)
    cursor = next(stream).cursor
    stream.cancel()
    return cursor


@pytest.mark.parametrize(
    ("open_from", "longest"), [(requests_from, 8), (signals_from, 4), (activations_from, 60)]
)
def test_a_watch_cut_at_random_points_gets_every_event_once_and_in_order(
    calls, worker, catalog, open_from, longest
):
    script = Script(catalog, 1, 60)
    worker.send(frame(catalog))
    whole = open_from(calls)
    opening = _first(worker, catalog, lambda cursor: open_from(calls, cursor))
    expected, cut = [], []

    def last(events):
        return _tells_of(events[-1], "last")

    def read_whole():
        for event in whole:
            expected.append(event)
            if last(expected):
                return

    reader = threading.Thread(target=read_whole)
    reader.start()

    def open_again(cursor):
        return open_from(calls, cursor or opening)

    def read_cut():
        cut.extend(cut_often(open_again, last, seed=2, longest=longest))

    cutter = threading.Thread(target=read_cut)
    cutter.start()
    script.play(worker, pause=0.004)
    worker.send(frame(catalog, ("last", 0, 1), started=(start("last", 1),)))
    worker.send(ended(catalog, "last", 1))
    reader.join(60)
    cutter.join(60)
    whole.cancel()
    events, num_cuts = cut
    assert num_cuts == NUM_CUTS
    assert not any(event.missed for event in events + expected)
    assert [_bare(e) for e in events] == [_bare(e) for e in expected[1:]]
    assert len(events) > 60


def _tells_of(event, name):
    """Whether it is the event that ends a script."""
    if isinstance(event, pb.WatchRequestsResponse):
        return event.finished.name == f"requests/{name}"
    if isinstance(event, pb.WatchActivationsResponse):
        return event.request == f"requests/{name}" and event.finished
    return event.request == f"requests/{name}"


@pytest.mark.parametrize("recomputing", [False, True])
def test_one_requests_activations_are_those_of_its_report_however_often_it_is_cut(
    calls, worker, catalog, recomputing
):
    script = Script(catalog, 3 + recomputing, 24, recomputing=recomputing)
    told, total_cuts, repeated = {}, 0, 0

    def follow(name, seed):
        told[name] = cut_often(
            lambda cursor: activations_from(calls, cursor, name, ttl=30),
            lambda events: False,
            seed,
            cuts=4,
        )

    watched = script.names[::2]
    followers = [threading.Thread(target=follow, args=(n, seed)) for seed, n in enumerate(watched)]
    for follower in followers:
        follower.start()
    script.play(worker, pause=0.01)
    for follower in followers:
        follower.join(60)
    for name in watched:
        events, num_cuts = told[name]
        total_cuts += num_cuts
        seen = Seen()
        for event in events:
            seen.take(event)
        repeated += seen.repeated
        report = Seen.in_report(report_of(calls, name))
        assert seen.values == report.values, name
        assert sorted(seen.ends) == sorted(report.values)
        assert not any(event.missed for event in events)
    assert total_cuts >= NUM_CUTS
    assert (repeated > 0) is recomputing


def test_a_late_watcher_gets_a_request_from_its_first_token(calls, worker, catalog):
    Script(catalog, 5, 10, recomputing=True).play(worker)
    for name in Script(catalog, 5, 10).names:
        report = report_of(calls, name)
        seen = Seen()
        for event in activations_from(calls, name=name):
            seen.take(event)
        assert seen.values == Seen.in_report(report).values


def test_all_requests_together_are_the_sum_of_their_reports(calls, worker, catalog):
    script = Script(catalog, 6, 30)
    worker.send(frame(catalog))
    stream = activations_from(calls)
    seen = Seen()
    with script.playing(worker, pause=0.001):
        for event in stream:
            assert event.missed == 0
            seen.take(event)
            if len(seen.ends) == script.num_completions:
                break
    stream.cancel()
    reports = {}
    for name in script.names:
        reports |= Seen.in_report(report_of(calls, name)).values
    assert seen.values == reports
    assert seen.repeated == 0


def test_every_completion_of_a_request_is_followed_to_its_end(calls, worker, catalog):
    stream = activations_from(calls, name="n")
    told = tuple(start(f"{i}_n", 2, external_id="n") for i in range(3))
    shares = [(f"{i}_n", 0, 2) for i in range(3)]
    worker.send(frame(catalog, *shares, started=told))
    worker.send(ended(catalog, "1_n", 2))
    worker.send(frame(catalog, ("0_n", 2, 1), ("2_n", 2, 1)))
    worker.send(ended(catalog, "0_n", 3))
    worker.send(ended(catalog, "2_n", 3))
    seen = Seen()
    for event in stream:
        assert event.num_prompt_tokens == 2
        seen.take(event)
    assert sorted(seen.ends) == ["0_n", "1_n", "2_n"]
    assert {r: len(f["late"]) for r, f in seen.values.items()} == {"0_n": 3, "1_n": 2, "2_n": 3}


def test_a_completion_that_starts_after_the_others_ended_is_there_for_who_resumes(
    calls, worker, catalog
):
    run_request(worker, catalog, "0_n", external_id="n")
    report_of(calls, "n")
    *_, last = activations_from(calls, name="n")
    assert list(activations_from(calls, last.cursor, "n")) == []
    run_request(worker, catalog, "1_n", external_id="n")
    eventually(lambda: len(report_of(calls, "n").completions) == 2)
    report_of(calls, "n")
    assert {e.request_id for e in activations_from(calls, last.cursor, "n")} == {"1_n"}


def test_the_sites_of_a_pipeline_come_as_they_come_and_none_is_lost(calls, worker, catalog):
    stream = activations_from(calls, name="p")
    told = (start("p", 2),)
    both = frame(catalog, ("p", 0, 2), acts=[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], started=told)
    first, second = (
        msgspec.structs.replace(both, rank=rank, sites=(both.sites[rank],)) for rank in (0, 1)
    )
    worker.send(first)
    event = next(stream)
    assert {t.feature: list(t.activations) for t in event.features} == {
        "known": [1.0, 4.0],
        "unknown": [2.0, 5.0],
    }
    worker.send(second)
    event = next(stream)
    assert {t.feature: list(t.activations) for t in event.features} == {"late": [3.0, 6.0]}
    stream.cancel()


def test_tokens_beyond_the_reports_limit_are_missing_from_one_request_but_not_from_all(
    hub_with, worker_of, catalog
):
    hub = hub_with(max_tokens_per_report=4)
    worker = worker_of(hub)
    with calls_to(hub) as calls:
        all_requests, seen = activations_from(calls), Seen()
        run_request(worker, catalog, "a", 5)
        while not seen.ends:
            seen.take(next(all_requests))
        all_requests.cancel()
        assert sorted(seen.values["a"]["known"]) == list(range(8))
        one = Seen()
        for event in activations_from(calls, name="a"):
            one.take(event)
        assert one.values == Seen.in_report(report_of(calls, "a")).values
        assert sorted(one.values["a"]["known"]) == list(range(4))


def test_only_the_features_asked_for_are_sent(calls, worker, catalog):
    every = activations_from(calls, features=["features/late"])
    one = activations_from(calls, name="a", features=["late", "known"])
    run_request(worker, catalog, "a")
    told = Seen()
    while not told.ends:
        told.take(next(every))
    every.cancel()
    assert set(told.values["a"]) == {"late"}
    assert {t.feature for event in one for t in event.features} == {"late", "known"}


def test_signals_tell_scores_with_their_time_and_are_filtered(calls, worker, catalog):
    before = time.time()
    every = signals_from(calls)
    some = signals_from(calls, signals=["in_answer", "at_question"], labels=["high"])
    missing = signals_from(calls, labels=["not_applicable"])
    run_request(worker, catalog, "low", 0)
    run_request(worker, catalog, "high", 2, policy="force-known")
    low, high = next(every), next(every)
    assert [s.signal for s in low.signals] == [s.name for s in catalog.signals]
    assert before <= low.finish_time.ToNanoseconds() * 1e-9 <= time.time()
    assert (high.request, high.request_id, high.model_name, high.engine, high.policy) == (
        "requests/high",
        "high",
        "demo",
        "0",
        "force-known",
    )
    report = report_of(calls, "high")
    assert list(high.signals) == list(report.completions[0].signals)
    (only,) = next(some).signals
    assert (only.signal, only.label) == ("in_answer", "high")
    told = next(missing)
    assert (told.request, {s.signal for s in told.signals}) == ("requests/low", {"about_entity"})
    for stream in (every, some, missing):
        stream.cancel()


def test_a_cursor_from_before_the_ring_is_told_exactly_what_it_missed(calls, worker, catalog):
    stream = requests_from(calls)
    run_request(worker, catalog, "first", 0)
    begun = next(stream)
    signals = signals_from(calls)
    count = 6000
    names = [f"{'n' * 900}{i}" for i in range(count)]
    for at in range(0, count, 50):
        told = tuple(start(name, 1) for name in names[at : at + 50])
        shares = [(t.request_id, 0, 1) for t in told]
        worker.send(frame(catalog, *shares, started=told))
        ends = tuple(RequestEnd(t.request_id, 1) for t in told)
        worker.send(msgspec.structs.replace(frame(catalog), finished=ends))
    run_request(worker, catalog, "last", 0)
    report_of(calls, "last")
    stream.cancel()
    received = missed = 0
    for event in requests_from(calls, begun.cursor):
        received, missed = received + 1, missed + event.missed
        assert received == 1 or not event.missed
        if event.finished.name == "requests/last":
            break
    assert missed > 0
    assert received + missed == 1 + 2 * count + 2
    received = missed = 0
    for event in signals:
        received, missed = received + 1, missed + event.missed
        if event.request == "requests/last":
            break
    signals.cancel()
    assert missed > 0
    assert received + missed == count + 1


def _flood(worker, catalog, calls, names, num_frames, num_tokens):
    """Frames of one request each, so large that a few hundred overflow the ring.

    One request at a time, so that none waits for the hub for long: it would be shed.
    """
    num_sent = 0
    for name in names:
        made = frame(catalog, (name, 0, num_tokens), started=(start(name, 1),))
        for _ in range(num_frames):
            worker.send(msgspec.structs.replace(made, monotonic_ns=time.monotonic_ns()))
            num_sent += 1
            made = msgspec.structs.replace(made, started=())
        worker.send(ended(catalog, name, num_tokens))
        num_sent += 1
        report_of(calls, name)
    return num_sent


def test_consumers_that_never_read_cost_no_memory_and_lose_what_the_ring_overwrites(
    hub, calls, worker, catalog
):
    process = psutil.Process(hub.process.pid)
    fast = activations_from(calls, features=["late"])
    fast_told = {"received": 0, "missed": 0}

    def read_fast():
        for event in fast:
            fast_told["received"] += 1
            fast_told["missed"] += event.missed
            if event.request == "requests/last" and event.finished:
                return

    reader = threading.Thread(target=read_fast)
    reader.start()
    stalled = [activations_from(calls) for _ in range(8)]
    sent = _flood(worker, catalog, calls, ["warm"], 200, 8000)  # 19 MB of arrays; 30% of the ring
    before = process.memory_info().rss
    sent += _flood(worker, catalog, calls, [f"f{i}" for i in range(16)], 200, 8000)
    run_request(worker, catalog, "last", 0)
    report_of(calls, "last")
    sent += 2
    grown = process.memory_info().rss - before
    assert grown < 160 << 20, f"grew by {grown >> 20} MiB while 307 MB went by 8 consumers"
    reader.join(30)
    assert fast_told["received"] + fast_told["missed"] == sent
    slow = stalled.pop()
    received = missed = 0
    for event in slow:
        received, missed = received + 1, missed + event.missed
        if event.request == "requests/last" and event.finished:
            break
    assert missed > 1000
    assert received + missed == sent
    for stream in (slow, *stalled):
        stream.cancel()


def test_a_request_that_does_not_come_in_time_is_not_found(calls):
    begun = time.monotonic()
    code, told = refusal(activations_from(calls, name="nobody", ttl=0.3))
    assert (code, told["ErrorInfo"].reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert time.monotonic() - begun < 5.0


def test_a_forgotten_request_is_not_found_and_a_cursor_of_it_is_lost(hub_with, worker_of, catalog):
    hub = hub_with(report_ttl_seconds=1.0)
    worker = worker_of(hub)
    with calls_to(hub) as calls:
        run_request(worker, catalog, "a")
        event = next(activations_from(calls, name="a"))
        silent = activations_from(calls, name="b", ttl=10)
        worker.send(frame(catalog, ("b", 0, 2), started=(start("b", 2),)))
        assert next(silent).request_id == "b"

        def lost():
            try:
                return list(activations_from(calls, event.cursor, "a")) and None
            except grpc.RpcError:
                return refusal(activations_from(calls, event.cursor, "a"))

        code, told = eventually(lost)
        assert (code, told["ErrorInfo"].reason) == (grpc.StatusCode.OUT_OF_RANGE, "CURSOR_LOST")
        assert refusal(activations_from(calls, name="a", ttl=0.1))[0] is grpc.StatusCode.NOT_FOUND
        assert refusal(silent)[0] is grpc.StatusCode.OUT_OF_RANGE


def test_a_request_is_read_to_its_end_by_who_began_before_it_was_forgotten(
    hub_with, worker_of, catalog
):
    hub = hub_with(max_reports=1, max_tokens_per_report=100_000)
    worker = worker_of(hub)
    with calls_to(hub) as calls:
        acts = np.arange(300_000, dtype=np.float32).reshape(100_000, 3)
        worker.send(frame(catalog, ("a", 0, 100_000), acts=acts, started=(start("a", 1),)))
        worker.send(ended(catalog, "a", 100_000))
        stream = activations_from(calls, name="a")
        first = next(stream)
        run_request(worker, catalog, "b", 0)
        report_of(calls, "b")
        seen = Seen().take(first)
        for event in stream:
            seen.take(event)
    assert [v for v, _ in seen.values["a"]["late"].values()] == acts[:, 2].tolist()
    assert (seen.ends, seen.repeated) == (["a"], 0)


def _forged(cursor, kind, **changed):
    known = cursors.decode(cursor, kind)
    return cursors.encode(msgspec.structs.replace(known, **changed))


def test_a_cursor_of_another_hub_or_of_the_future_is_out_of_range(calls, worker, catalog):
    streams = {
        requests_from: requests_from(calls),
        signals_from: signals_from(calls),
        activations_from: activations_from(calls),
    }
    run_request(worker, catalog, "a")
    for open_from, stream in streams.items():
        cursor = next(stream).cursor
        stream.cancel()
        for changed in ({"hub": "another"}, {"number": 1000}):
            forged = _forged(cursor, cursors.FeedCursor, **changed)
            code, told = refusal(open_from(calls, forged))
            assert (code, told["ErrorInfo"].reason) == (
                grpc.StatusCode.OUT_OF_RANGE,
                "CURSOR_LOST",
            )
    *_, last = activations_from(calls, name="a")
    reached = cursors.decode(last.cursor, cursors.RequestCursor).completions[0]
    for changed in (
        {"hub": "another"},
        {"completions": (msgspec.structs.replace(reached, stops=(1000,)),)},
        {"completions": (msgspec.structs.replace(reached, stops=(5, 5)),)},
        {"completions": (msgspec.structs.replace(reached, serial=99, is_finished=False),)},
    ):
        forged = _forged(last.cursor, cursors.RequestCursor, **changed)
        assert refusal(activations_from(calls, forged, "a"))[0] is grpc.StatusCode.OUT_OF_RANGE


def test_a_cursor_of_one_hub_means_nothing_to_the_next(settings, worker_of, catalog):
    first, second = launcher.start_hub(settings), launcher.start_hub(settings)
    try:
        with calls_to(first) as calls:
            stream = requests_from(calls)
            run_request(worker_of(first), catalog, "a", 0)
            cursor = next(stream).cursor
        with calls_to(second) as calls:
            assert refusal(requests_from(calls, cursor))[0] is grpc.StatusCode.OUT_OF_RANGE
    finally:
        first.stop()
        second.stop()


@pytest.mark.parametrize(
    "garbage", ["nonsense", "ünïcode", "k6FmoXg", "=", "AAAA" * 30_000], ids=len
)
def test_a_cursor_that_is_none_is_refused_by_name(calls, garbage):
    for stream in (
        requests_from(calls, garbage),
        signals_from(calls, garbage),
        activations_from(calls, garbage),
        activations_from(calls, garbage, "a"),
    ):
        assert _field(stream) == "cursor"


def test_a_cursor_of_another_watch_is_refused_by_name(calls, worker, catalog):
    requests, activations = requests_from(calls), activations_from(calls)
    run_request(worker, catalog, "a")
    of_requests, of_activations = next(requests).cursor, next(activations).cursor
    of_one = next(activations_from(calls, name="a")).cursor
    requests.cancel()
    activations.cancel()
    for stream in (
        signals_from(calls, of_requests),
        requests_from(calls, of_activations),
        activations_from(calls, of_one),
        activations_from(calls, of_activations, "a"),
    ):
        assert _field(stream) == "cursor"


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "requests/"}, "name"),
        ({"name": "policies/a"}, "name"),
        ({"name": "requests/" + "a" * 257}, "name"),
        ({"name": "requests/-", "features": ["known", "nobody"]}, "features[1]"),
        ({"name": "requests/a", "features": ["policies/known"]}, "features[0]"),
        ({"name": "requests/a", "ttl": Duration()}, "ttl"),
        ({"name": "requests/a", "ttl": Duration(seconds=-1)}, "ttl"),
        ({"name": "requests/a", "ttl": Duration(seconds=3601)}, "ttl"),
    ],
)
def test_what_activations_cannot_be_watched_is_refused_by_field(calls, asked, field):
    assert _field(calls.WatchActivations(pb.WatchActivationsRequest(**asked))) == field


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        ({"signals": ["in_answer", "nobody"]}, "signals[1]"),
        ({"signals": [""]}, "signals[0]"),
        ({"labels": ["unobserved", "highest"]}, "labels[1]"),
    ],
)
def test_what_signals_cannot_be_watched_is_refused_by_field(calls, asked, field):
    assert _field(calls.WatchSignals(pb.WatchSignalsRequest(**asked))) == field


def _field(stream):
    code, told = refusal(stream)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert told["ErrorInfo"].reason == "INVALID_FIELD"
    (violation,) = told["BadRequest"].field_violations
    return violation.field


def test_an_event_tells_what_was_so_when_it_happened(calls, worker, catalog):
    """A start and an end told by one frame, read after the end."""
    stream = requests_from(calls)
    made = frame(catalog, ("a", 0, 2), started=(start("a", 2),))
    worker.send(msgspec.structs.replace(made, finished=(RequestEnd("a", 2),)))
    report_of(calls, "a")
    started, finished = next(stream).started, next(stream).finished
    stream.cancel()
    assert started.state == started.completions[0].state == pb.REQUEST_STATE_RUNNING
    assert not started.completions[0].signals
    assert finished.completions[0].state == pb.REQUEST_STATE_FINISHED
    assert len(finished.completions[0].signals) == len(catalog.signals)


def test_watchers_that_hang_up_are_gone(calls, worker, catalog):
    """An identity may have 32 streams open."""
    for _ in range(40):
        for open_from in (requests_from, signals_from, activations_from):
            open_from(calls).cancel()
    stream = requests_from(calls)
    run_request(worker, catalog, "a", 0)
    assert next(stream).started.name == "requests/a"
    stream.cancel()


def test_a_frame_with_an_impossible_prompt_length_is_refused(calls, worker, catalog):
    stream = requests_from(calls)
    worker.send(frame(catalog, ("bad", 0, 1), started=(start("bad", 1 << 40),)))
    run_request(worker, catalog, "good", 0)
    assert next(stream).started.name == "requests/good"
    stream.cancel()
