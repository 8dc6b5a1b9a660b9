"""Frames of whole requests, and consumers that watch them."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import grpc
import msgspec
import numpy as np
import pytest
from auth_world import details
from google.protobuf.duration_pb2 import Duration
from hub_world import frame, start
from steerscope.api.v1 import telemetry_pb2 as pb
from steerscope.api.v1 import telemetry_pb2_grpc
from steerscope.telemetry.frames import CachedActivations, RequestEnd

FEATURES = ("known", "unknown", "late")
NUM_CUTS = 30


@contextlib.contextmanager
def calls_to(hub):
    with grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel:
        yield telemetry_pb2_grpc.TelemetryServiceStub(channel)


def requests_from(calls, cursor=""):
    return _opened(calls.WatchRequests(pb.WatchRequestsRequest(cursor=cursor)))


def signals_from(calls, cursor="", **asked):
    return _opened(calls.WatchSignals(pb.WatchSignalsRequest(cursor=cursor, **asked)))


def activations_from(calls, cursor="", name="-", ttl=5.0, features=()):
    wait = Duration()
    wait.FromNanoseconds(int(ttl * 1e9))
    asked = pb.WatchActivationsRequest(
        name=f"requests/{name}", cursor=cursor, ttl=wait, features=features
    )
    return _opened(calls.WatchActivations(asked))


def _opened(stream):
    stream.initial_metadata()  # from here on it misses nothing
    return stream


def refusal(stream):
    """How a watch ends that is refused, and the details; it sends nothing before."""
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    return caught.value.code(), details(caught.value)


def report_of(calls, name):
    wait = Duration(seconds=10)
    return calls.GetRequestReport(
        pb.GetRequestReportRequest(name=f"requests/{name}", wait=wait)
    ).report


def run_request(worker, catalog, name, num_generated=2, **told):
    """A whole request: 3 tokens of prompt, then some, one frame each."""
    worker.send(frame(catalog, (name, 0, 3), acts=0.5, started=(start(name, 3, **told),)))
    for position in range(3, 3 + num_generated):
        worker.send(frame(catalog, (name, position, 1), acts=float(position)))
    worker.send(ended(catalog, name, 3 + num_generated))


def ended(catalog, name, end):
    return msgspec.structs.replace(frame(catalog), finished=(RequestEnd(name, end),))


class Script:
    """Frames of many requests: mixed batches, chunks of prompt, cached tokens, gaps, edits.

    Args:
        recomputing: whether requests are preempted now and then, and computed again.
    """

    def __init__(self, catalog, seed, num_requests, *, recomputing=False):
        self._random = random.Random(seed)
        self._values = np.random.default_rng(seed)
        self._catalog = catalog
        self._recomputing = recomputing
        self.frames = []
        self.names = [f"s{seed}-{i}" for i in range(num_requests)]
        waiting = [f"{n}_{name}" for i, name in enumerate(self.names) for n in range(1 + i % 2)]
        self.num_completions = len(waiting)
        running = {}
        while waiting or running:
            told = []
            while waiting and len(running) < 4 and (not running or self._random.random() < 0.5):
                request_id = waiting.pop(0)
                told.append(self._start(request_id))
                running[request_id] = [told[-1].first_position, self._random.randint(8, 40)]
            self._step(running, tuple(told))

    def _start(self, request_id):
        external_id = request_id.partition("_")[2]
        policy = "force-known" if self._random.random() < 0.3 else ""
        told = start(request_id, 6, external_id=external_id, policy=policy)
        if self._random.random() < 0.3:
            kept = frame(self._catalog, ("x", 0, 3), acts=self._acts(3)).sites
            known = bytes([1, self._random.randint(0, 1), 1])
            cached = CachedActivations(known, kept)
            told = msgspec.structs.replace(told, first_position=3, cached=cached)
        return told

    def _step(self, running, told):
        shares, ended = [], []
        for request_id, progress in running.items():
            position, end = progress
            if position >= end:
                ended.append(RequestEnd(request_id, end))
                continue
            if self._recomputing and self._random.random() < 0.05:
                position = self._random.randrange(position + 1)
            if self._random.random() < 0.1 and position + 1 < end:
                position += 1  # a frame that was dropped had it
            num_tokens = min(self._random.randint(1, 5) if position < 6 else 1, end - position)
            shares.append((request_id, position, num_tokens))
            progress[0] = position + num_tokens
        num_tokens = sum(length for *_, length in shares)
        edited = {row: 2.0 for row in range(num_tokens) if self._random.random() < 0.1}
        made = frame(
            self._catalog, *shares, acts=self._acts(num_tokens), started=told, edited=edited
        )
        self.frames.append(msgspec.structs.replace(made, finished=tuple(ended)))
        for end in ended:
            del running[end.request_id]

    def _acts(self, num_tokens):
        acts_TF = self._values.random((num_tokens, len(FEATURES)), np.float32)
        if not self._recomputing:  # what was sent is not taken back
            acts_TF[self._values.random(num_tokens) < 0.03, 0] = np.nan
        return acts_TF

    def play(self, worker, pause=0.0):
        for each in self.frames:
            worker.send(msgspec.structs.replace(each, monotonic_ns=time.monotonic_ns()))
            time.sleep(pause)

    @contextlib.contextmanager
    def playing(self, worker, pause):
        player = threading.Thread(target=self.play, args=(worker, pause))
        player.start()
        try:
            yield
        finally:
            player.join()


class Seen:
    """Activations put together, by completion, feature and position: (value, change)."""

    def __init__(self):
        self.values = {}
        self.repeated = 0
        self.ends = []

    def take(self, event):
        of_request = self.values.setdefault(event.request_id, {})
        self._add(of_request, event.features)
        if event.finished:
            self.ends.append(event.request_id)
        return self

    def _add(self, of_request, tracks):
        for track in tracks:
            of_feature = of_request.setdefault(track.feature, {})
            deltas = track.deltas or [0.0] * len(track.activations)
            for i, pair in enumerate(zip(track.activations, deltas, strict=True)):
                self.repeated += track.first_position + i in of_feature
                of_feature[track.first_position + i] = pair

    @classmethod
    def in_report(cls, report):
        seen = cls()
        for completion in report.completions:
            seen._add(seen.values.setdefault(completion.request_id, {}), completion.features)
        return seen


def cut_often(open_from, is_last, seed, cuts=NUM_CUTS, longest=4):
    """All events until the last, hanging up and resuming at random; also how often."""
    choose = random.Random(seed)
    events, cursor, num_cuts = [], "", 0
    while True:
        stream = open_from(cursor)
        to_read = choose.randint(0, longest) if num_cuts < cuts else 1 << 30
        for event in stream if to_read else ():
            events.append(event)
            cursor = event.cursor
            if is_last(events):
                stream.cancel()
                return events, num_cuts
            to_read -= 1
            if not to_read:
                break
        else:
            if to_read and stream.code() is grpc.StatusCode.OK:
                return events, num_cuts
        stream.cancel()
        num_cuts += 1
