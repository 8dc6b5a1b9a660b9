"""What Steerscope costs over HTTP: reports in responses, and live watches.

    python tests/bench/served.py [--model demo|medium] [--seconds 10] [--columns ...]
                                 [--concurrency 1 8 64]

Real servers, plain ones and one observing 64 features, on one core; client, hub and watchers on
the other. Streamed completions go to two of them in turn, 1, 8 or 64 at a time. Columns:
``null`` (plain beside plain: what the others' figures are worth), ``observe``, ``report`` (each
request asks for its report), ``watch`` (a client has WatchActivations, of all requests and
features, and WatchSignals open).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import ratios
import yaml
from columns import CONCURRENCY
from engine_child import PROMPT_TOKENS, place
from engine_pair import ENGINE_CORE, ENVIRONMENT, HUB_CORE
from random_model import SHAPES, write_config, write_model
from steerscope.cli import serve
from steerscope.config import CONFIG_ENV
from steerscope.demo.live import server
from steerscope.demo.paths import MODEL_DIR

COLUMNS = ("null", "observe", "report", "watch")
OUTPUT_TOKENS = 64
MODEL_NAME = "bench"
SERVER_ARGS = {"dtype": "float32", "max-model-len": 4096, "max-num-seqs": 64, "host": "127.0.0.1"}
WATCHER_NICE = 10
"""Who watches sits elsewhere: on this machine that work must not delay the client that measures."""
WARM_UP_ROUNDS, LEAST_ROUNDS = 2, 4
SIGNAL = {
    "name": "feature_0_mean",
    "terms": [{"feature": "feature_0", "reduce": "mean_generation", "weight": 1.0}],
    "bias": 0.0,
    "labels": [{"label": "low", "below": 0.5}, {"label": "high"}],
}
WATCHER = """
import os, sys, threading
from collections import Counter
from steerscope.client import Client
counts = Counter()
def follow(name, watch):
    for _ in watch:
        counts[name] += 1
with Client(sys.argv[1]) as client:
    watches = {"activations": client.watch_activations(), "signals": client.watch_signals()}
    for each in watches.items():
        threading.Thread(target=follow, args=each, daemon=True).start()
    print("ready", flush=True)
    sys.stdin.read()
    print(*(counts[name] for name in watches), flush=True)
    os._exit(0)  # threads still wait in both streams
"""


class Batch(NamedTuple):
    """Requests that were sent together, in seconds."""

    whole: float
    first_tokens: list[float]
    gaps: list[float]


def run(
    name: str,
    columns: Sequence[str],
    folder: Path,
    seconds: float,
    concurrency: Sequence[int] = CONCURRENCY,
) -> dict[str, Any]:
    """Ratios by column and number of requests at a time."""
    shape = SHAPES[name]
    model = write_model(folder / "model", name)
    for path in MODEL_DIR.glob("tokenizer*"):
        shutil.copy(path, model)
    config = write_config(folder / "observe", shape, 64, 1, signals=[SIGNAL])
    address = yaml.safe_load(config.read_text())["hub"]["grpc_address"]
    configs = {"plain": None, "null": None, "ours": config}
    found: dict[str, Any] = {}
    for each in (None, config):
        with _serving(folder, model, each):
            pass  # graphs are compiled; why that matters is told in bench.py
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(_serving(folder, model, each))
            for name, each in configs.items()
        }
        for column in columns:
            other = servers["null" if column == "null" else "ours"]
            urls = {"plain": servers["plain"], "ours": other}
            with _watching(address, column == "watch") as seen:
                found[column] = {
                    size: asyncio.run(_cell(urls, size, column == "report", shape, seconds))
                    for size in concurrency
                }
            if seen:
                found[column][concurrency[-1]]["events"] = seen
    return found


@contextmanager
def _serving(folder: Path, model: Path, config: Path | None) -> Iterator[str]:
    """A server on the engines' core; its URL."""
    (port,) = server.free_ports(1)
    arguments = {"model": model, "served-model-name": MODEL_NAME, "port": port, **SERVER_ARGS}
    environment = {**os.environ, **ENVIRONMENT}
    environment.pop(CONFIG_ENV, None)
    if config is not None:
        environment[CONFIG_ENV] = str(config)
    log = folder / f"{port}.log"
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {ENGINE_CORE})
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve.command([f"--{name}={value}" for name, value in arguments.items()]),
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    os.sched_setaffinity(0, mine)
    started = server.DemoServer(port, 0, 0, process, log)
    try:
        server._wait(started)
        place(process.pid, ENGINE_CORE, HUB_CORE)
        yield started.base_url
    finally:
        server._stop(process)


@contextmanager
def _watching(address: str, is_asked: bool) -> Iterator[dict[str, int]]:
    """Both streams open in another process; at the end, how many events came."""
    seen: dict[str, int] = {}
    if not is_asked:
        yield seen
        return
    with subprocess.Popen(
        ["nice", "-n", str(WATCHER_NICE), sys.executable, "-c", WATCHER, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("the watcher did not start")
        yield seen
        counts, _ = process.communicate(timeout=30)
        seen |= dict(zip(("activations", "signals"), map(int, counts.split()), strict=True))


async def _cell(
    urls: Mapping[str, str], size: int, with_report: bool, shape: Mapping[str, int], seconds: float
) -> dict[str, Any]:
    rng, order = np.random.default_rng(3), random.Random(0)
    told: dict[str, list[Batch]] = {name: [] for name in urls}
    async with httpx.AsyncClient(timeout=120) as client:
        ends_at = 0.0
        while len(told["plain"]) < WARM_UP_ROUNDS + LEAST_ROUNDS or time.monotonic() < ends_at:
            if len(told["plain"]) == WARM_UP_ROUNDS:
                ends_at = time.monotonic() + seconds * len(urls)
            prompts = rng.integers(4, shape["vocab_size"], (size, PROMPT_TOKENS)).tolist()
            for name in order.sample(list(urls), len(urls)):
                flags = {"steerscope_report": 1} if with_report and name == "ours" else {}
                told[name].append(await _batch(client, urls[name], prompts, flags))
    return _compared(told["plain"][WARM_UP_ROUNDS:], told["ours"][WARM_UP_ROUNDS:])


async def _batch(
    client: httpx.AsyncClient, url: str, prompts: Sequence[list[int]], flags: Mapping[str, int]
) -> Batch:
    began = time.perf_counter()
    arrivals = await asyncio.gather(*(_arrivals(client, url, prompt, flags) for prompt in prompts))
    whole = time.perf_counter() - began
    gaps = [gap for times in arrivals for gap in np.diff(times).tolist()]
    return Batch(whole, [times[0] - began for times in arrivals], gaps)


async def _arrivals(
    client: httpx.AsyncClient, url: str, prompt: list[int], flags: Mapping[str, int]
) -> list[float]:
    """When each token came; a report must come too if it was asked for."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "temperature": 0,
        "max_tokens": OUTPUT_TOKENS,
        "ignore_eos": True,
        "stream": True,
        **({"vllm_xargs": flags} if flags else {}),
    }
    times, has_report = [], False
    async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if '"choices":[{' in line:
                times.append(time.perf_counter())
            has_report |= '"steerscope"' in line
    assert len(times) > OUTPUT_TOKENS // 2, f"{len(times)} chunks for {OUTPUT_TOKENS} tokens"
    assert has_report == bool(flags), "a report was lost, or came unasked"
    return times


def _compared(plain: Sequence[Batch], ours: Sequence[Batch]) -> dict[str, Any]:
    def of(field: str) -> tuple[list[ratios.Array], list[ratios.Array]]:
        return tuple([np.atleast_1d(getattr(b, field)) for b in side] for side in (plain, ours))  # type: ignore[return-value]

    found: dict[str, Any] = {
        "throughput": asdict(ratios.throughput(*of("whole"))),
        "trimmed": asdict(ratios.trimmed_throughput(*of("whole"))),
    }
    for kind, field in (("itl", "gaps"), ("ttft", "first_tokens")):
        found |= ratios.latencies(kind, *of(field), to_us=1e6)
    return found


def main() -> int:
    """Run it alone; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--columns", nargs="*", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--concurrency", nargs="*", type=int, default=CONCURRENCY)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {HUB_CORE})
    with tempfile.TemporaryDirectory(prefix="served-") as folder:
        found = run(
            arguments.model,
            arguments.columns,
            Path(folder),
            arguments.seconds,
            arguments.concurrency,
        )
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
