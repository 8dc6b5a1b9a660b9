"""Engines side by side: the same work in turn, a few steps here, a few steps there.

All engines are pinned to one core and only one of them works at a time, so that whatever else the
machine does hits them alike. vLLM's core and worker share a process (see docs/measurements.md for
what happens otherwise on few cores).
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerscope.demo.live.server import SERVER_SETTINGS

ENGINE_CORE, HUB_CORE = 1, 0
ENVIRONMENT = {
    **SERVER_SETTINGS,
    "VLLM_LOGGING_LEVEL": "WARNING",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""With PyTorch's memory in huge pages: where a process's small pages happened to lie made it up to
14% slower than its twin, alone with the medium model; with huge ones 3%, and 0.5% in batches."""
TURN_SECONDS = 0.25
"""As much work as one engine does before it is another's turn: what it tells of its steps every
tenth of a second is to lie within."""
LEAD_IN_SECONDS = 0.05
"""Steps shorter than this notice what other engines left in the caches."""


def enter_environment() -> None:
    """Begin anew with the engines' environment: OpenMP and PyTorch read theirs when loaded."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ENVIRONMENT})


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine under test is; without ``config`` it is vLLM as it comes."""

    name: str
    model: Path
    config: Path | None = None
    steering: dict[str, list[str]] = field(default_factory=lambda: {"all": [], "generation": []})
    engine_args: dict[str, Any] = field(default_factory=dict)


class Child:
    """A handle on one engine process. It starts on ``start_core``; all work on the same."""

    def __init__(self, spec: EngineSpec, folder: Path, start_core: int = ENGINE_CORE) -> None:
        self.name, self.config = spec.name, spec.config
        environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERSCOPE")}
        environment |= ENVIRONMENT
        if spec.config is not None:
            environment["STEERSCOPE_CONFIG"] = str(spec.config)
        arguments = {
            "model": str(spec.model),
            "core": ENGINE_CORE,
            "hub_core": HUB_CORE,
            "start_core": start_core,
            "steering": spec.steering,
            "engine_args": spec.engine_args,
        }
        self._log = folder / f"{spec.name}.log"
        script = Path(__file__).with_name("engine_child.py")
        with self._log.open("wb") as errors:
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
        code = self._process.wait()
        raise RuntimeError(f"the engine {self.name!r} ended with code {code}:\n{tail}")


def turn(children: Sequence[Child], command: str, trial: int, **arguments: Any) -> dict[str, Any]:
    """How much work a turn is, by a trial of so many steps, which also warms everybody up."""
    answers = [c.ask(command, count=trial, lead_in=False, **arguments) for c in children]
    one = min(statistics.median(answer["ns"][trial // 2 :]) for answer in answers) / 1e9
    count = max(1, round(TURN_SECONDS / one))
    return {"count": count, "lead_in": one < LEAD_IN_SECONDS, **arguments}


def in_turn(
    children: Sequence[Child], command: str, seconds: float, **arguments: Any
) -> dict[str, list[dict[str, Any]]]:
    """Give every child the same command once a round, in another order each time.

    ``seconds`` are for each child; there are four rounds at least.
    """
    answers: dict[str, list[dict[str, Any]]] = {child.name: [] for child in children}
    for order in _orders(children, seconds * len(children)):
        for child in order:
            answers[child.name].append(child.ask(command, **arguments))
    return answers


def _orders(children: Sequence[Child], seconds: float) -> Iterator[list[Child]]:
    rng = random.Random(0)
    ends_at = time.monotonic() + seconds
    rounds = 0
    while rounds < 4 or time.monotonic() < ends_at:
        rounds += 1
        yield rng.sample(children, len(children))
