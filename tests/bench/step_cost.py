"""What a step costs Steerscope on the host, with no model around it: µs by part and batch size.

    python tests/bench/step_cost.py [--features 64] [--layers 1] [--steps 2000]

Decode steps of R running requests: ``begin`` (follow the scheduler), ``plan`` (rows, staging),
``finish`` (read out, keep, encode, send to another process). Means, since most steps only put
aside what one in a while tells, and a slope by request.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from random_model import SHAPES, write_config
from steerscope.catalog import store
from steerscope.engine.plan import RequestInfo, StepLayout
from steerscope.engine.readout import Source
from steerscope.engine.roster import Arrival
from steerscope.engine.runtime import Capacity, EngineRuntime, StepNews
from steerscope.engine.scheduling import StepNote
from steerscope.engine.sender import FrameSender
from steerscope.engine.slots import KvGeometry
from steerscope.steering import segments
from steerscope.steering.interventions import Intervention
from steerscope.steering.stamp import Stamp

SIZES = (1, 8, 64, 256)
BLOCK_SIZE, NUM_BLOCKS = 16, 40_000
PROMPT_TOKENS = 32
WARM_UP_STEPS = 50
SINK = """
import sys, zmq
from steerscope.hub.protocol import frames_address
socket = zmq.Context().socket(zmq.PULL)
socket.bind(frames_address(sys.argv[1]))
print("ready", flush=True)
while True:
    socket.recv()
"""
NOTHING = StepNote({}, {}, {}, {})


class Layer(torch.nn.Module):
    """A decoder layer without anything in it."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The stream, as it came."""
        return hidden


@contextmanager
def sink(folder: str) -> Iterator[None]:
    """Takes frames as a hub does, and drops them."""
    process = subprocess.Popen([sys.executable, "-c", SINK, folder], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    try:
        yield
    finally:
        process.kill()
        process.wait()


def runtime(catalog: store.Catalog, endpoint: str, depth: int) -> EngineRuntime:
    """A worker's half on the CPU."""
    return EngineRuntime(
        catalog,
        {i: Layer() for i in range(depth)},
        Capacity(2048, max(SIZES), 4, 1 << 30),
        torch.device("cpu"),
        Source(catalog.digest, "bench", "0", 0),
        FrameSender(endpoint, max_frame_bytes=1 << 20),
        lambda: KvGeometry(0, BLOCK_SIZE, NUM_BLOCKS),
    )


def stamp(catalog: store.Catalog, i: int, num_policies: int) -> Stamp | None:
    """The steering of request ``i``; None for none."""
    if not num_policies:
        return None
    edits = (Intervention(feature="feature_0", add=1.0 + i % num_policies),)
    built = segments.build(catalog.digest, edits, PROMPT_TOKENS)
    return Stamp(f"chatcmpl-{i:032x}", "inline", "d", edits, built)


def measure(
    catalog: store.Catalog, endpoint: str, depth: int, num_requests: int, num_policies: int, n: int
) -> dict[str, float]:
    """Means in µs."""
    made = runtime(catalog, endpoint, depth)
    made._canary._left = 0  # no forward pass writes what it looks for
    assert made.kv_geometry is not None
    ids = [f"chatcmpl-{i:032x}-{i:08x}" for i in range(num_requests)]
    per_request = NUM_BLOCKS // max(SIZES)
    arrivals = [
        Arrival(
            req_id,
            RequestInfo(stamp(catalog, i, num_policies), PROMPT_TOKENS),
            list(range(i * per_request, (i + 1) * per_request)),
        )
        for i, req_id in enumerate(ids)
    ]
    starts = np.arange(num_requests + 1)
    taken: dict[str, list[int]] = {"begin": [], "plan": [], "finish": []}
    for step in range(WARM_UP_STEPS + n):
        news = StepNews((), arrivals if not step else (), (), (), NOTHING)
        layout = StepLayout(tuple(ids), starts, np.full(num_requests, PROMPT_TOKENS + step % 1000))
        began = time.perf_counter_ns()
        made.begin(news)
        begun = time.perf_counter_ns()
        made.plan(layout, None)
        planned = time.perf_counter_ns()
        made.finish()
        finished = time.perf_counter_ns()
        if step >= WARM_UP_STEPS:
            for part, spent in zip(
                taken, (begun - began, planned - begun, finished - planned), strict=True
            ):
                taken[part].append(spent)
    found = {part: statistics.fmean(each) / 1e3 for part, each in taken.items()}
    return {**found, "total": sum(found.values())}


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    shape = SHAPES["demo"]
    with tempfile.TemporaryDirectory(prefix="step-") as name:
        write_config(Path(name), shape, arguments.features, arguments.layers)
        catalog = store.load(Path(name) / "catalog")
        with sink(name):
            for num_policies in (0, 1, 64):
                totals = []
                for size in SIZES:
                    depth = shape["num_hidden_layers"]
                    found = measure(catalog, name, depth, size, num_policies, arguments.steps)
                    totals.append(found["total"])
                    parts = "  ".join(f"{part} {spent:6.1f}" for part, spent in found.items())
                    print(f"policies {num_policies:3d}  requests {size:3d}:  {parts}", flush=True)
                slope = (totals[-1] - totals[0]) / (SIZES[-1] - SIZES[0])
                print(f"policies {num_policies:3d}: {slope:.2f} µs a request", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
