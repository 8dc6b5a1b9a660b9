"""Fuzz the targets, guided by coverage, one process at a time; needs atheris.

    python tests/fuzz/fuzz_run.py                      # every target, for its share of the runs
    python tests/fuzz/fuzz_run.py --runs 20000 spec frames

What libFuzzer keeps goes to ``.cache/fuzz/<target>``, findings to ``.cache/fuzz/findings``, and
the table of executions to ``.cache/fuzz/table.md``. A finding is an exception, more than a second
of CPU time, or memory that grows by a gigabyte; ``tests/fuzz/corpus`` keeps it, made small.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
CACHE = Path(os.environ.get("STEERSCOPE_FUZZ_CACHE", ROOT / ".cache" / "fuzz"))

MAX_CPU_SECONDS = 1.0
MAX_GROWTH_KIB = 1 << 20
MAX_ADDRESS_BYTES = 24 << 30
MAX_INPUT_BYTES = 4096
HANG_SECONDS = 20
"""Of wall clock, for what never returns to be measured."""
TREES_OF_TEN = 8
"""How many mutations of ten change a tree; libFuzzer changes bytes in the others."""

SHARES = {
    "spec": 7.5, "stamps": 2.5, "admission": 2.0, "filters": 2.5, "from_hub": 1.5,
    "cursors": 1.2, "requirements": 1.2, "tensors": 1.2, "frames": 0.8, "control": 0.8,
    "kept_answers": 0.8, "npz": 0.8, "rpcs": 0.5, "cases": 0.5, "directions": 0.5,
    "linear_probe": 0.5, "model": 0.5, "engines": 0.25, "audit": 0.25, "catalog_tensors": 0.1,
    "identities": 0.1, "dictionary_config": 0.1, "config": 0.1, "catalog_yaml": 0.05,
}  # fmt: skip
"""Executions, as a multiple of ``--runs``: what is slow gets fewer (YAML most of all)."""


class Result(NamedTuple):
    """What one target's process told."""

    name: str
    executions: int
    seconds: float
    edges: int
    features: int
    accepted: int
    findings: int


def main() -> int:
    """Fuzz what was named; 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--runs", type=int, default=400_000)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, rest = parser.parse_known_args()
    if args.child:
        _fuzz(args.targets[0], rest)
        return 0
    results = []
    for name in args.targets or _names():
        results.append(_run(name, int(args.runs * SHARES.get(name, 1.0))))
        print(_row(results[-1]), flush=True)
        (CACHE / "table.json").write_text(json.dumps([r._asdict() for r in results], indent=1))
    print(f"{sum(r.executions for r in results):,} executions in {len(results)} targets")
    return int(any(result.findings for result in results))


def _names() -> list[str]:
    """Every target, by its folder of seeds: the parent imports nothing of ours."""
    return sorted(path.name for path in CORPUS.iterdir())


def _run(name: str, runs: int) -> Result:
    """One target in a process of its own; its crash is a finding, not ours."""
    kept, findings = CACHE / name, CACHE / "findings"
    for folder in (kept, findings):
        folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in findings.iterdir()}
    told = kept.with_suffix(".accepted")
    told.unlink(missing_ok=True)
    options = (
        f"-runs={runs}",
        f"-max_len={MAX_INPUT_BYTES}",
        f"-timeout={HANG_SECONDS}",
        f"-artifact_prefix={findings}/{name}-",
        "-rss_limit_mb=4096",
        "-len_control=0",
        "-mutate_depth=2",
        "-seed=1",
        str(kept),
        str(CORPUS / name),
    )
    began = time.monotonic()
    with kept.with_suffix(".log").open("wb") as log:
        command = [sys.executable, __file__, "--child", name, *options]
        subprocess.run(command, stdout=log, stderr=log, check=False, preexec_fn=_yield_to_others)
    text = kept.with_suffix(".log").read_text(errors="replace")
    found = len({path.name for path in findings.iterdir()} - before)
    counts = re.findall(r"#(\d+)\s", text)
    accepted = int(told.read_text()) if told.exists() else 0
    return Result(
        name,
        max(map(int, counts), default=0),
        time.monotonic() - began,
        _last(r"cov: (\d+)", text),
        _last(r"ft: (\d+)", text),
        accepted,
        found or int("Done" not in text and "DONE" not in text),
    )


def _yield_to_others() -> None:
    os.nice(10)


def _last(pattern: str, text: str) -> int:
    return int((re.findall(pattern, text) or ["0"])[-1])


def _row(result: Result) -> str:
    share = result.accepted / max(result.executions, 1)
    return (
        f"| {result.name} | {result.executions:,} | {result.seconds:.0f} s | {result.edges:,} "
        f"| {share:.0%} | {result.findings} |"
    )


def _fuzz(name: str, options: list[str]) -> None:
    """The child: libFuzzer's loop, which never returns."""
    import atheris

    with atheris.instrument_imports(include=["steerscope"]):
        import fuzz_targets

    import logging

    import fuzz_trees

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_BYTES, MAX_ADDRESS_BYTES))
    target = fuzz_targets.TARGETS[name]
    pool = _pool(target.codec, fuzz_targets.seeds(name))
    measured = _Measured(target.run, CACHE / f"{name}.accepted")

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if target.codec is not None and rng.randrange(10) < TREES_OF_TEN:
            made = fuzz_trees.mutated(data, target.codec, pool, rng)
            if made is not None and len(made) <= max_size:
                return made
        return bytes(atheris.Mutate(data, max_size))

    atheris.Setup([sys.argv[0], *options], measured, custom_mutator=mutate)
    atheris.Fuzz()


def _pool(codec: Any, paths: list[Path]) -> list[Any]:
    """Everything in the seeds: what a mutation may put elsewhere."""
    import fuzz_trees

    pool: list[Any] = []
    for path in paths if codec is not None else ():
        try:
            pool += fuzz_trees.subtrees(codec.read(path.read_bytes()))
        except Exception:
            continue  # seeds that are not even a tree
    return pool or [None]


class _Measured:
    """Runs an input; raises on one that took too long or too much."""

    def __init__(self, run: Any, told: Path) -> None:
        self._run, self._told = run, told
        self._accepted = self._count = 0
        self._peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, data: bytes) -> None:
        began = time.thread_time()
        self._accepted += bool(self._run(data))
        seconds = time.thread_time() - began
        if seconds > MAX_CPU_SECONDS:
            raise TimeoutError(f"{seconds:.1f} s of CPU time")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if peak - self._peak > MAX_GROWTH_KIB:
            raise MemoryError(f"{peak - self._peak} KiB more")
        self._peak = peak
        self._count += 1
        if self._count % 1000 == 0:
            self._told.write_text(str(self._accepted))


if __name__ == "__main__":
    sys.exit(main())
