"""200 operators beside a serving engine: what they wait, and what serving loses.

    python tests/bench/control_plane.py [--clients 200] [--period 10] [--windows 150] [--seconds 2]

Windows with and without the clients alternate in one run against one real server: short ones and
many, since what else the machine does goes up and down within seconds. Serving is a closed loop
of streams of chats, counted by vLLM's own counter of generated tokens; each client has a
connection of its own and calls once in ``period`` seconds of its windows, at its own moments; some
keep a watch open throughout. One JSON object comes out.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

NUM_STREAMS = 4
NUM_WATCHING = 5
CLIENTS_NICE = 10
"""Operators sit elsewhere: on this machine their own work must not be taken for the server's."""
PAUSE_SECONDS = 0.3
"""Between windows; not measured."""


def serve_load(base_url: str, stop: Any) -> None:
    """Chats one after another in each stream."""
    from steerscope.demo import world
    from steerscope.demo.live.server import MODEL_NAME

    questions = [q.question for q in world.questions("known", "en", 64, 5)]

    async def stream(client: httpx.AsyncClient, number: int) -> None:
        turn = number
        while not stop.is_set():
            turn += NUM_STREAMS
            reply = await client.post(
                "/v1/chat/completions",
                json={
                    "model": MODEL_NAME,
                    "messages": [{"role": "user", "content": questions[turn % 64]}],
                    "temperature": 0,
                    "max_tokens": 64,
                    "ignore_eos": True,
                    "vllm_xargs": {"steering": "force-known"} if turn % 4 == 0 else {},
                },
            )
            reply.raise_for_status()

    async def body() -> None:
        async with httpx.AsyncClient(base_url=base_url, timeout=60) as client:
            await asyncio.gather(*(stream(client, i) for i in range(NUM_STREAMS)))

    asyncio.run(body())


def operate(
    address: str, num_clients: int, period: float, stop: Any, active: Any, out: Any
) -> None:
    """All clients of one process; latencies in seconds and errors go to ``out``."""
    import grpc
    from steerscope.api.v1 import catalog_pb2 as c
    from steerscope.api.v1 import catalog_pb2_grpc as cg
    from steerscope.api.v1 import steering_pb2 as s
    from steerscope.api.v1 import steering_pb2_grpc as sg
    from steerscope.api.v1 import telemetry_pb2 as t
    from steerscope.api.v1 import telemetry_pb2_grpc as tg

    os.nice(CLIENTS_NICE)
    latencies: dict[str, list[float]] = {}
    errors: Counter[str] = Counter()

    async def client(number: int) -> None:
        rng = random.Random(number)
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
        async with grpc.aio.insecure_channel(address, options) as channel:
            catalog = cg.CatalogServiceStub(channel)
            steering = sg.SteeringServiceStub(channel)
            telemetry = tg.TelemetryServiceStub(channel)
            watching = None
            if number < NUM_WATCHING:
                watching = asyncio.create_task(watch(telemetry))
            mine = s.Policy(interventions=[{"feature": "unknown_entity", "clamp": 2.0}])
            name = f"bench-{number}"
            calls = {
                "GetFeature": lambda: catalog.GetFeature(
                    c.GetFeatureRequest(name="features/known_entity")
                ),
                "ListFeatures": lambda: catalog.ListFeatures(c.ListFeaturesRequest(page_size=10)),
                "GetPolicy": lambda: steering.GetPolicy(
                    s.GetPolicyRequest(name="policies/force-known")
                ),
                "GetRules": lambda: steering.GetRules(s.GetRulesRequest()),
                "UpdatePolicy": lambda: steering.UpdatePolicy(
                    s.UpdatePolicyRequest(
                        policy=s.Policy(
                            name=f"policies/{name}",
                            description=str(rng.random()),
                            interventions=mine.interventions,
                        ),
                        allow_missing=True,
                    )
                ),
                "SteerRequest": lambda: steering.SteerRequest(
                    s.SteerRequestRequest(
                        name=f"requests/{name}", policy="policies/force-known", ttl={"seconds": 1}
                    )
                ),
                "GetRequestReport": lambda: telemetry.GetRequestReport(
                    t.GetRequestReportRequest(name="requests/nobody")
                ),
            }
            weights = [20, 10, 20, 10, 5, 5, 30]
            while not stop.is_set():
                await asyncio.sleep(rng.expovariate(1 / period))
                if not active.is_set() or stop.is_set():
                    continue
                (kind,) = rng.choices(list(calls), weights)
                began = time.perf_counter()
                try:
                    await calls[kind]()
                except grpc.RpcError as error:
                    code = error.code()
                    if kind != "GetRequestReport" or code is not grpc.StatusCode.NOT_FOUND:
                        errors[f"{kind} {code.name}: {error.details()}"] += 1
                latencies.setdefault(kind, []).append(time.perf_counter() - began)
            if watching is not None:
                watching.cancel()

    async def watch(telemetry: Any) -> None:
        async for _ in telemetry.WatchRequests(t.WatchRequestsRequest()):
            pass

    async def body() -> None:
        await asyncio.gather(*(client(i) for i in range(num_clients)))

    asyncio.run(body())
    out.put((latencies, dict(errors)))


def generated_tokens(base_url: str) -> float:
    """vLLM's own count since it started."""
    page = httpx.get(f"{base_url}/metrics", timeout=60).text
    name = "vllm:generation_tokens_total{"
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


def processor_seconds(names: dict[int, str]) -> Counter[str]:
    """What each process below this one has used so far, by what it is."""
    used: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used[names.get(process.pid) or _role(process.cmdline())] += times.user + times.system
    return used


def _role(cmdline: list[str]) -> str:
    words = " ".join(cmdline)
    roles = {"steerscope.hub": "hub", "EngineCore": "engine", "serve": "front end"}
    return next((role for word, role in roles.items() if word in words), "other")


def ratio_interval(with_clients: list[float], without: list[float]) -> tuple[float, float, float]:
    """Geometric mean of neighbouring windows' ratios, 95% interval (normal, over the pairs)."""
    logs = [math.log(a / b) for a, b in zip(with_clients, without, strict=True)]
    mean, half = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--period", type=float, default=10.0)
    parser.add_argument("--windows", type=int, default=150, help="of each kind")
    parser.add_argument("--seconds", type=float, default=2.0)
    arguments = parser.parse_args()
    from steerscope.demo.live import server

    context = get_context("spawn")
    folder = Path(tempfile.mkdtemp(prefix="control-"))
    with server.running(folder) as running:
        stop, active = context.Event(), context.Event()
        out = context.Queue()
        processes = [
            context.Process(target=serve_load, args=(running.base_url, stop)),
            context.Process(
                target=operate,
                args=(running.grpc_address, arguments.clients, arguments.period, stop, active, out),
            ),
        ]
        for process in processes:
            process.start()
        time.sleep(10)  # warm
        rates: dict[bool, list[float]] = {True: [], False: []}
        used = {True: Counter[str](), False: Counter[str]()}
        names = {p.pid: n for p, n in zip(processes, ("load", "clients"), strict=True) if p.pid}
        order = random.Random(0)
        for _ in range(arguments.windows):
            for is_on in order.sample((True, False), 2):
                (active.set if is_on else active.clear)()
                time.sleep(PAUSE_SECONDS)
                used_before = processor_seconds(names)
                before, began = generated_tokens(running.base_url), time.perf_counter()
                time.sleep(arguments.seconds)
                count = generated_tokens(running.base_url) - before
                rates[is_on].append(count / (time.perf_counter() - began))
                used[is_on] += processor_seconds(names) - used_before
        stop.set()
        active.set()
        latencies, errors = out.get(timeout=120)
        for process in processes:
            process.join(60)
    every = np.array([each for kind in latencies.values() for each in kind])
    mean, low, high = ratio_interval(rates[True], rates[False])
    print(
        json.dumps(
            {
                "clients": arguments.clients,
                "period_seconds": arguments.period,
                "calls": len(every),
                "calls_per_second": len(every) / (arguments.windows * arguments.seconds),
                "errors": errors,
                "p50_ms": 1e3 * float(np.quantile(every, 0.5)),
                "p99_ms": 1e3 * float(np.quantile(every, 0.99)),
                "max_ms": 1e3 * float(every.max()),
                "p99_ms_by_call": {
                    kind: round(1e3 * float(np.quantile(values, 0.99)), 2)
                    for kind, values in sorted(latencies.items())
                },
                "tokens_per_second": {
                    "without": round(statistics.mean(rates[False]), 1),
                    "with": round(statistics.mean(rates[True]), 1),
                },
                "cores_used": {
                    word: {
                        name: round(seconds / (arguments.windows * arguments.seconds), 3)
                        for name, seconds in sorted(used[is_on].items())
                    }
                    for word, is_on in (("without", False), ("with", True))
                },
                "throughput_ratio": [round(each, 4) for each in (mean, low, high)],
            },
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
