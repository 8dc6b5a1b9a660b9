"""What one hub can take: frames pushed to a real hub process, and what it makes of them.

    python tests/bench/hub_load.py [--quick] [--only NAME ...] [--out hub_load.json]

A second process pushes frames as a worker does, at a stated rate or as fast as it can; this one
scrapes, watches and reads the hub's processor time and memory. Prints a Markdown table; ``--out``
keeps everything. No engine and no model: what is measured is the hub.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import zmq
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import save_file
from steerscope.api.v1 import telemetry_pb2, telemetry_pb2_grpc
from steerscope.catalog import store
from steerscope.config import HubSettings, Settings
from steerscope.hub import launcher
from steerscope.hub.protocol import frames_address
from steerscope.hub.supervision import RunningHub
from steerscope.telemetry.frames import (
    FRAME_VERSION,
    Frame,
    RequestEnd,
    RequestStart,
    SiteActivations,
    encode,
)

SENDER_QUEUE = 1000
"""As the engine's own."""
NUM_SIGNALS = 4
SCRAPE_SECONDS = 5.0
D_MODEL = 8
NEVER = 1 << 20
"""Tokens of a request that does not end."""


@dataclass(frozen=True)
class Load:
    """Frames of ``num_requests``, each of which has ``num_tokens``; ``rate`` 0 is unpaced."""

    name: str
    rate: float
    """Tokens a second."""
    seconds: float = 20.0
    num_requests: int = 64
    num_features: int = 64
    num_sites: int = 1
    prompt_tokens: int = 4
    num_tokens: int = NEVER
    together: int = 1
    """Decoding steps that a frame tells of: an engine tells of all that 200 ms bring, but where
    requests come and go or a response waits. One in each is the most that a hub may have to do."""
    watched: bool = False

    @property
    def steps_per_request(self) -> int:
        """The prompt, and the generated tokens but the one that is never computed."""
        return 1 + (self.num_tokens - self.prompt_tokens) // self.together

    @property
    def steps_per_second(self) -> float:
        """What the rate takes in the long run."""
        return self.rate * self.steps_per_request / (self.num_requests * self.num_tokens)


DECODE = Load("10,000 tokens/s", 10_000)
FINISHING = Load("1,000 requests/s of 16 tokens", 16_000, num_tokens=16)
LOADS = (
    DECODE,
    replace(DECODE, name="10,000 tokens/s, 31 steps a frame", together=31),
    replace(DECODE, name="10,000 tokens/s, 16 sites", num_sites=16),
    replace(DECODE, name="10,000 tokens/s, watched and scraped", watched=True),
    replace(DECODE, name="10,000 tokens/s, 31 steps, watched", together=31, watched=True),
    replace(DECODE, name="10,000 tokens/s, 256 features", num_features=256),
    FINISHING,
    replace(FINISHING, name="1,000 requests/s, 16 sites", num_sites=16),
    replace(FINISHING, name="1,000 requests/s, watched and scraped", watched=True),
    replace(FINISHING, name="1,000 requests/s, 256 features", num_features=256),
    replace(
        FINISHING,
        name="100 requests/s of 1,024 tokens, 256 features",
        rate=102_400,
        num_requests=1,
        num_features=256,
        prompt_tokens=1024,
        num_tokens=1024,
    ),
    replace(DECODE, name="as fast as it can be sent", rate=0, seconds=5),
    replace(FINISHING, name="as fast, requests of 16 tokens", rate=0, seconds=5),
)
STEPS = tuple(
    Load(f"{n} requests a step", 200.0 * n, 5.0, num_requests=n) for n in (1, 16, 64, 256)
)


def write_catalog(folder: Path, num_features: int, num_sites: int) -> Path:
    """Relu features spread over sites; signals, and baselines of what they read."""
    names = [f"feature_{i}" for i in range(num_features)]
    tensors = {f"{n}.{part}": np.ones(D_MODEL, np.float32) for n in names for part in _PARTS}
    tensors |= {f"{name}.b_enc": np.zeros(1, np.float32) for name in names}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "features.safetensors")
    feature = {"kind": "sae_latent", "site": "resid_post", "activation": "relu"}
    bins = {"edges": [0.25 * i for i in range(1, 10)], "shares": [0.1] * 10, "num_tokens": 5000}
    document = {
        "schema": "steerscope.catalog/v1",
        "name": "load",
        "version": "1",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": D_MODEL,
            "num_hidden_layers": 32,
            "vocab_size": 8,
        },
        "features": [
            {"name": name, "layer": i * num_sites // num_features, **feature}
            for i, name in enumerate(names)
        ],
        "signals": [_signal(i, names) for i in range(NUM_SIGNALS)],
        "baselines": [
            {"feature": name, "phase": phase, **bins}
            for name in names
            for phase in ("prompt", "generation")
        ],
    }
    (folder / "catalog.yaml").write_text(json.dumps(document))
    return folder


_PARTS = ("W_enc", "W_dec")
_REDUCTIONS = ("last_prompt_token", "mean_prompt", "max_generation", "mean_first_generated")


def _signal(i: int, names: Sequence[str]) -> dict[str, Any]:
    terms = [
        {"feature": names[(7 * i + j) % len(names)], "reduce": _REDUCTIONS[i], "weight": 0.5}
        for j in range(2)
    ]
    if "first" in _REDUCTIONS[i]:
        terms = [{**term, "first": 8} for term in terms]
    labels = [{"label": "low", "below": 0.5}, {"label": "high"}]
    return {"name": f"signal_{i}", "terms": terms, "bias": -1.0, "labels": labels}


@dataclass(slots=True)
class Slot:
    """A place in the batch: the request in it, its next position, and its number of tokens."""

    request_id: str
    position: int
    end: int


class Traffic:
    """A worker's side of a load: its steps, and what it has told and lost so far."""

    def __init__(self, load: Load, digest: str) -> None:
        self._load = load
        self._digest = digest
        rng = np.random.default_rng(3)
        width = load.num_features // load.num_sites
        longest = load.num_requests * max(load.prompt_tokens, load.together)
        acts = np.maximum(rng.normal(0.5, 1.0, (4, longest, width)), 0.0).astype(np.float32)
        self._acts = [each.tobytes() for each in acts]
        self._width = width
        self._ids = itertools.count()
        self._started: list[RequestStart] = []
        self._finished: list[RequestEnd] = []
        self._slots = [self._slot(i % load.steps_per_request) for i in range(load.num_requests)]
        self._counts = {"step": 0, "dropped": 0, "dropped_tokens": 0, "told_tokens": 0}
        self.num_finished = 0

    @property
    def num_tokens(self) -> int:
        """So far, those that were lost included."""
        return self._counts["told_tokens"] + self._counts["dropped_tokens"]

    def push(self, socket: zmq.Socket[bytes], *, waits: bool) -> None:
        """Make a step and send it; unless it waits, one that cannot be sent is lost."""
        frame = self._frame()
        try:
            socket.send(encode(frame), 0 if waits else zmq.DONTWAIT, copy=False)
        except zmq.Again:
            self._counts["dropped"] += 1
            self._counts["dropped_tokens"] += frame.query_start_loc[-1]
        else:
            self._counts["told_tokens"] += frame.query_start_loc[-1]
            self.num_finished += len(frame.finished)
            self._started.clear()
            self._finished.clear()
        self._counts["step"] += 1
        for place, slot in enumerate(self._slots):
            slot.position += self._length(slot)
            if slot.position >= slot.end:
                self._finished.append(RequestEnd(slot.request_id, slot.end))
                self._slots[place] = self._slot(0)

    def _slot(self, steps_less: int) -> Slot:
        """A new request; the first ones end one after the other."""
        request_id, prompt = f"request-{next(self._ids):08d}", self._load.prompt_tokens
        self._started.append(RequestStart(request_id, request_id, prompt, 0, "", "", b""))
        return Slot(request_id, 0, self._load.num_tokens - steps_less)

    def _length(self, slot: Slot) -> int:
        return self._load.together if slot.position else self._load.prompt_tokens

    def _frame(self) -> Frame:
        bounds = (0, *itertools.accumulate(map(self._length, self._slots)))
        acts = self._acts[self._counts["step"] % len(self._acts)][: 4 * self._width * bounds[-1]]
        return Frame(
            version=FRAME_VERSION,
            catalog_digest=self._digest,
            model_name="load",
            engine="0",
            rank=0,
            monotonic_ns=time.monotonic_ns(),
            overhead_ns=(50_000,),
            started=tuple(self._started),
            finished=tuple(self._finished),
            changed=(),
            request_ids=tuple(slot.request_id for slot in self._slots),
            query_start_loc=bounds,
            positions=tuple(slot.position for slot in self._slots),
            sites=tuple(
                SiteActivations(f"resid_post.{layer}", self._width, acts)
                for layer in range(self._load.num_sites)
            ),
            **self._counts,
        )


def push(load: Load, endpoint: str, digest: str, told: Connection) -> None:
    """What the second process does; tells how many tokens it sent and how many requests ended."""
    traffic = Traffic(load, digest)
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.SNDHWM, SENDER_QUEUE)
        socket.connect(frames_address(endpoint))
        began = time.perf_counter()
        for number in itertools.count(1):
            traffic.push(socket, waits=not load.rate)
            elapsed = time.perf_counter() - began
            if elapsed >= load.seconds:
                break
            if load.rate:
                time.sleep(max(number / load.steps_per_second - elapsed, 0.0))
        told.send((traffic.num_tokens, traffic.num_finished, time.perf_counter() - began))
        told.recv()


class Scrape:
    """One page, by name summed over the labels that are not asked about."""

    def __init__(self, http_port: int) -> None:
        text = httpx.get(f"http://127.0.0.1:{http_port}/metrics", timeout=30).text
        self._families = list(text_string_to_metric_families(text))

    def total(self, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in self._families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def buckets(self, name: str) -> dict[float, float]:
        """Of a histogram of one series: how many are at most each bound."""
        samples = (s for family in self._families for s in family.samples)
        return {float(s.labels["le"]): s.value for s in samples if s.name == f"{name}_bucket"}


def quantile(q: float, buckets: Mapping[float, float]) -> float:
    """By the buckets, linear within one, as Prometheus has it."""
    low, below, wanted = 0.0, 0.0, q * max(buckets.values(), default=0.0)
    for bound, count in sorted(buckets.items()):
        if count >= wanted and count > below:
            high = low if bound == float("inf") else bound
            return low + (high - low) * (wanted - below) / (count - below)
        low, below = bound, count
    return low


@contextlib.contextmanager
def watching(hub: RunningHub) -> Iterator[Counter[str]]:
    """Read every activation as it comes, and scrape now and then, as long as the block lasts."""
    seen: Counter[str] = Counter()
    stopping = threading.Event()

    def scrape() -> None:
        while not stopping.wait(SCRAPE_SECONDS):
            httpx.get(f"http://127.0.0.1:{hub.http_port}/metrics", timeout=30)

    def read() -> None:
        with contextlib.suppress(grpc.RpcError):
            for event in stream:
                seen["messages"] += 1
                seen["missed"] += event.missed

    with grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel:
        calls = telemetry_pb2_grpc.TelemetryServiceStub(channel)
        asked = telemetry_pb2.WatchActivationsRequest(name="requests/-", features=["feature_0"])
        stream = calls.WatchActivations(asked)
        stream.initial_metadata()
        threads = [threading.Thread(target=work, daemon=True) for work in (scrape, read)]
        for thread in threads:
            thread.start()
        yield seen
        stopping.set()
        stream.cancel()
        for thread in threads:
            thread.join()


def settings_for(load: Load, folder: Path) -> tuple[Settings, str]:
    """Of a hub on any ports, and its catalog's digest."""
    path = folder / f"{load.num_features}x{load.num_sites}"
    if not path.exists():
        write_catalog(path, load.num_features, load.num_sites)
    hub = HubSettings(grpc_address="127.0.0.1:0", http_address="127.0.0.1:0")
    return Settings(catalog=str(path), hub=hub), store.load(path).digest


def measure(load: Load, folder: Path) -> dict[str, Any]:
    """A hub of its own, under the load."""
    settings, digest = settings_for(load, folder)
    hub = launcher.start_hub(settings)
    try:
        process = psutil.Process(hub.process.pid)
        empty = process.memory_info().rss
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        sender = context.Process(target=push, args=(load, hub.endpoint, digest, theirs))
        with watching(hub) if load.watched else contextlib.nullcontext(Counter()) as seen:
            before = process.cpu_times()
            sender.start()
            num_tokens, num_finished, seconds = ours.recv()
            scrape = _settled(hub.http_port, num_tokens)
            after = process.cpu_times()
        ours.send("enough")
        sender.join()
        cpu = after.user - before.user + after.system - before.system
        lag = scrape.buckets("steerscope_readout_lag_seconds")
        frames = scrape.total("steerscope_frames_total")
        return {
            "tokens_per_second": round(num_tokens / seconds),
            "requests_per_second": round(num_finished / seconds),
            "core": round(cpu / seconds, 3),
            "us_per_frame": round(1e6 * cpu / frames, 1),
            "frames": frames,
            "frames_lost": scrape.total("steerscope_frames_dropped_total"),
            "observed": scrape.total("steerscope_observed_tokens_total"),
            "unobserved": scrape.total("steerscope_unobserved_tokens_total"),
            "unaccounted": num_tokens - _counted(scrape),
            "observed_per_second": round(
                scrape.total("steerscope_observed_tokens_total") / seconds
            ),
            "lag_p50_ms": round(1e3 * quantile(0.5, lag), 2),
            "lag_p99_ms": round(1e3 * quantile(0.99, lag), 2),
            "resident_mb": [round(b / 1e6, 1) for b in (empty, process.memory_info().rss)],
            "watched": dict(seen),
        }
    finally:
        hub.stop()


def _counted(scrape: Scrape) -> float:
    names = ("steerscope_observed_tokens_total", "steerscope_unobserved_tokens_total")
    return sum(scrape.total(name) for name in names)


def _settled(http_port: int, num_tokens: int) -> Scrape:
    """A page that has all tokens, or no more than the one before."""
    scrape = Scrape(http_port)
    while (counted := _counted(scrape)) < num_tokens:
        time.sleep(0.2)
        scrape = Scrape(http_port)
        if _counted(scrape) == counted:
            break
    return scrape


def slope(found: Mapping[int, float]) -> tuple[float, float]:
    """Least squares: what a frame takes, and each request more."""
    more, fixed = np.polyfit(list(found), list(found.values()), 1)
    return round(float(fixed), 1), round(float(more), 2)


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a line for each load."""
    head = "tokens/s", "requests/s", "of a core", "µs a frame", "frames lost", "tokens unobserved"
    head += "lag p50, p99 (ms)", "resident MB before, after"
    lines = [f"| | {' | '.join(head)} |", "| --- " * (len(head) + 1) + "|"]
    for name, of in results.items():
        cells = [
            of["tokens_per_second"],
            of["requests_per_second"],
            f"{100 * of['core']:.0f}%",
            of["us_per_frame"],
            f"{of['frames_lost']:.0f}",
            f"{of['unobserved']:.0f}",
            f"{of['lag_p50_ms']}, {of['lag_p99_ms']}",
            ", ".join(map(str, of["resident_mb"])),
        ]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="loads whose names contain one of these")
    parser.add_argument("--quick", action="store_true", help="a quarter of the time")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    loads = [
        replace(load, seconds=load.seconds / (4 if arguments.quick and load.rate else 1))
        for load in (*LOADS, *STEPS)
        if not arguments.only or any(part in load.name for part in arguments.only)
    ]
    with tempfile.TemporaryDirectory(prefix="hub-load-") as folder:
        for load in loads:
            results[load.name] = measure(load, Path(folder)) | {"load": asdict(load)}
            print(json.dumps({load.name: results[load.name]}), file=sys.stderr, flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1))
    print(table(results))
    steps = {s.num_requests: results[s.name]["us_per_frame"] for s in STEPS if s.name in results}
    if len(steps) > 1:
        print("\nA frame takes {} µs, and {} µs more for each request.".format(*slope(steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
