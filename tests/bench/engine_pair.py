"""Engines side by side: the same work in turn, a few steps here, a few steps there.

All engines are pinned to one core and only one of them works at a time, so that whatever else the
machine does hits them alike. vLLM's core and worker share a process (see docs/measurements.md for
what happens otherwise on few cores).
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE_CORE, HUB_CORE = 1, 0
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}


class Child:
    """A handle on one engine process; ``config`` None is vLLM without Steerscope's config."""

    def __init__(
        self, name: str, model: Path, config: Path | None, log: Path, engine_args: Mapping[str, Any]
    ) -> None:
        self.name = name
        environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERSCOPE")}
        environment |= ENVIRONMENT
        if config is not None:
            environment["STEERSCOPE_CONFIG"] = str(config)
        arguments = {
            "model": str(model),
            "core": ENGINE_CORE,
            "hub_core": HUB_CORE,
            "engine_args": dict(engine_args),
        }
        self._log = log
        script = Path(__file__).with_name("engine_child.py")
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(script), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        self.info = self._read()

    def ask(self, name: str, **arguments: Any) -> Any:
        """One command, and its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": name, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(b"RESULT "):
                return json.loads(line[7:])
        tail = self._log.read_text(errors="replace")[-3000:]
        raise RuntimeError(f"the engine {self.name!r} ended:\n{tail}")


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much of plain vLLM's throughput is left: 1 is all of it. 95% interval over rounds."""

    value: float
    low: float
    high: float
    rounds: int


def ratio(plain: Sequence[float], ours: Sequence[float]) -> Ratio:
    """Of the rounds' times, pair by pair: geometric mean, normal interval of the logarithms."""
    logs = [math.log(a / b) for a, b in zip(plain, ours, strict=True)]
    mean = statistics.mean(logs)
    half = 1.96 * statistics.stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), len(logs))


def in_turn(
    children: Sequence[Child], command: str, rounds: int, **arguments: Any
) -> dict[str, list[Any]]:
    """Give every child the same command, once a round, in another order each time."""
    rng = random.Random(0)
    answers: dict[str, list[Any]] = {child.name: [] for child in children}
    for _ in range(rounds):
        for child in rng.sample(children, len(children)):
            answers[child.name].append(child.ask(command, **arguments))
    return answers
