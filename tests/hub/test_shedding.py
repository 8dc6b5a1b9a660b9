"""A real hub that cannot keep up with the frames it gets."""

import signal
import time

import httpx
import msgspec
import numpy as np
import pytest
import wide_world
from hub_world import ENGINE, eventually, frame, scrape, start
from steerscope.catalog import store
from steerscope.hub import launcher
from steerscope.telemetry.frames import RequestEnd, SiteActivations, encode
from watch_world import activations_from, calls_to, requests_from

pytestmark = pytest.mark.timeout(120)

NUM_REQUESTS = 64
STEPS_PER_SECOND = 200
"""More than 333 would fill the worker's queue while the hub is away."""
MAX_WAIT_SECONDS = 2.0
AWAY_SECONDS = MAX_WAIT_SECONDS + 1.0
REASONS = ("dropped_frame", "unknown_request", "not_finite", "prefix_cache")


def counted(page, name, **labels):
    return page.value(f"steerscope_{name}", **ENGINE, **labels) or 0.0


def num_observed(page):
    return sum(
        counted(page, "observed_tokens_total", phase=phase) for phase in ("prompt", "generation")
    )


def num_unobserved(page):
    return sum(counted(page, "unobserved_tokens_total", reason=reason) for reason in REASONS)


@pytest.fixture(scope="module")
def wide_catalog(tmp_path_factory):
    return store.load(wide_world.write_catalog(tmp_path_factory.mktemp("shed") / "catalog"))


@pytest.fixture
def settings(settings):
    hub = msgspec.structs.replace(settings.hub, max_frame_wait_seconds=MAX_WAIT_SECONDS)
    return msgspec.structs.replace(settings, hub=hub)


@pytest.fixture
def wide_hub(settings, wide_catalog):
    keeping = msgspec.structs.replace(settings.hub, max_tokens_per_report=50_000)
    wide = msgspec.structs.replace(settings, catalog=str(wide_catalog.folder), hub=keeping)
    running = launcher.start_hub(wide)
    yield running
    running.stop()


class Flood:
    """Steps of many requests, each of which has a token in each."""

    def __init__(self, catalog):
        self.names = tuple(f"r{i}" for i in range(NUM_REQUESTS))
        self.steps = 0
        self._empty = msgspec.structs.replace(frame(catalog), sites=())
        acts = np.ones((NUM_REQUESTS, wide_world.PER_SITE), np.float32).tobytes()
        self._fields = {
            "request_ids": self.names,
            "query_start_loc": tuple(range(NUM_REQUESTS + 1)),
            "sites": tuple(
                SiteActivations(f"resid_post.{layer}", wide_world.PER_SITE, acts)
                for layer in wide_world.LAYERS
            ),
        }

    def go_on(self, worker, seconds):
        for _ in range(int(seconds * STEPS_PER_SECOND)):
            self.send(worker)
            time.sleep(1 / STEPS_PER_SECOND)

    def send(self, worker):
        started = () if self.steps else tuple(start(name, 1) for name in self.names)
        positions = (self.steps,) * NUM_REQUESTS
        self._tell(worker, started=started, positions=positions, **self._fields)
        self.steps += 1

    def finish(self, worker):
        self._tell(worker, finished=tuple(RequestEnd(name, self.steps) for name in self.names))

    def _tell(self, worker, **fields):
        counts = {"step": self.steps, "told_tokens": self.steps * NUM_REQUESTS}
        now = time.monotonic_ns()
        made = msgspec.structs.replace(self._empty, monotonic_ns=now, **counts, **fields)
        worker.send(encode(made))


def test_a_hub_that_falls_behind_sheds_whole_frames_and_is_live_again_and_counts_every_token(
    wide_hub, worker_of, wide_catalog
):
    hub, worker = wide_hub, worker_of(wide_hub)
    time.sleep(MAX_WAIT_SECONDS)  # until then, all that waits is what a hub before left
    flood = Flood(wide_catalog)
    with calls_to(hub) as calls:
        told = requests_from(calls)
        live = activations_from(calls, name="r0", features=["feature_0"], ttl=30)
        flood.go_on(worker, 0.5)
        hub.process.send_signal(signal.SIGSTOP)
        flood.go_on(worker, AWAY_SECONDS)
        hub.process.send_signal(signal.SIGCONT)
        flood.go_on(worker, 2.0)
        flood.finish(worker)
        *events, last = live
        report = next(event.finished for event in told if event.finished.name == "requests/r0")
    assert last.finished
    page = eventually(lambda: settled(hub, flood), seconds=30)
    shed = counted(page, "frames_dropped_total", reason="shed")
    assert 0 < shed < flood.steps
    for reason in ("lost", "not_sent"):
        assert counted(page, "frames_dropped_total", reason=reason) == 0
    assert num_unobserved(page) == counted(page, "unobserved_tokens_total", reason="dropped_frame")
    assert num_unobserved(page) == shed * NUM_REQUESTS
    lag = "readout_lag_seconds"
    late = counted(page, f"{lag}_count") - counted(page, f"{lag}_bucket", le="2.5")
    assert late <= shed
    newest = max(t.first_position + len(t.activations) for e in (*events, last) for t in e.features)
    assert newest > 0.9 * flood.steps
    (completion,) = report.completions
    (missing,) = completion.unobserved
    assert missing.num_tokens == shed
    assert completion.num_observed_tokens == flood.steps - shed


def settled(hub, flood):
    """The page, once it has all tokens and ends."""
    page = scrape(hub.http_port)
    scored = sum(
        counted(page, "signal_requests_total", signal="signal_0", label=label)
        for label in ("low", "high", "unobserved")
    )
    is_whole = num_observed(page) + num_unobserved(page) == flood.steps * NUM_REQUESTS
    return page if is_whole and scored == NUM_REQUESTS else None


def test_what_waited_while_no_hub_was_there_is_not_shed(hub, worker, catalog):
    time.sleep(MAX_WAIT_SECONDS)
    old = time.monotonic_ns() - int(2 * MAX_WAIT_SECONDS * 1e9)
    hub.process.kill()
    hub.process.wait()
    for step in range(10):
        made = frame(catalog, (f"a{step}", 0, 1), started=(start(f"a{step}", 1),))
        told = {"step": step, "told_tokens": step, "monotonic_ns": old}
        worker.send(msgspec.structs.replace(made, **told))

    def all_there():
        try:
            page = scrape(hub.http_port)
        except httpx.TransportError:
            return None
        return page if num_observed(page) == 10 else None

    page = eventually(all_there, seconds=20)
    assert counted(page, "frames_dropped_total", reason="shed") == 0
