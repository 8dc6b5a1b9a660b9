"""`make oracle`: every exactness suite in full, one JSON line each, the last line a summary.

`python tests/engine/suites.py [SUITE...]` runs some of them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import miniatures
import mutations
import oracle
import parity
from engine_process import V2, EngineProcess
from oracle import LIMITS, ROOMY, Engine, Solo, World

Line = dict[str, Any]

TWO_WORKERS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 1,
        "prompt_lookup_max": 3,
    }
}
MODES: dict[str, dict[str, Any]] = {
    "v1 compiled": {},
    "v1 eager": {"enforce_eager": True},
    "tensor parallel 2": {"tensor_parallel_size": 2, "environment": TWO_WORKERS},
    "pipeline parallel 2": {"pipeline_parallel_size": 2, "environment": TWO_WORKERS},
    "speculative decoding (ngram)": NGRAM,
    # Interpreted kernels are slow, so it is asked for less, and has fewer blocks to do it with.
    "v2 eager": {"enforce_eager": True, "environment": V2, "num_gpu_blocks_override": 12},
}


def crowd(world: World, solo: Solo, mode: str, count: int, **kwargs: Any) -> Line:
    """The oracle on ``count`` random requests in one engine mode."""
    # A top_k breaks vLLM's rejection sampler on a CPU, and its kernel in Triton's interpreter.
    samples = MODES[mode] != NGRAM and "v2" not in mode
    engine = Engine(world, _slug(mode), **{**LIMITS, **MODES[mode]})
    try:
        requests = oracle.requests(world, count, samples=samples, **kwargs)
        verdict = oracle.judge(engine, solo, requests)
    finally:
        engine.stop()
    return {"suite": "oracle", "mode": mode, **verdict}


def mutation(world: World, solo: Solo, name: str, count: int = 60) -> Line:
    """A planted bug: passed if the oracle, or the engine itself, noticed."""
    mode = {**LIMITS, "enforce_eager": True, **(NGRAM if name in mutations.SPECULATIVE else {})}
    engine = Engine(world, _slug(name), mutation=name, **mode)
    try:
        requests = oracle.requests(world, count, seed=3, samples=False)
        noticed = oracle.judge(engine, solo, requests)["faults"]
    except RuntimeError as error:
        noticed = {"the engine stopped": str(error).strip().splitlines()[-1][-200:]}
    finally:
        engine.stop()
    return {"suite": "mutation", "bug": name, "noticed": noticed, "passed": bool(noticed)}


def unsteered(world: World, count: int = 60) -> Line:
    """Requests without steering, with the plugin and without: tokens, and bits of logits."""
    exact = {**ROOMY, "max_logprobs": -1, "logprobs_mode": "raw_logits"}
    requests = [
        {"prompt": prompt, "max_tokens": 8, "logprobs": -1}
        for prompt in miniatures.prompts(count, seed=7, high=120)
    ]
    answers = []
    for name, config in (("plain", None), ("observing", world.config("observing"))):
        engine = EngineProcess(world.model, config, world.folder / f"{name}.log", **exact)
        try:
            answers.append(engine.run(*requests))
        finally:
            engine.stop()
    plain, observing = answers
    same_tokens = [a["tokens"] == b["tokens"] for a, b in zip(plain, observing, strict=True)]
    same_bits = [a["logprobs"] == b["logprobs"] for a, b in zip(plain, observing, strict=True)]
    return {
        "suite": "unsteered",
        "requests": count,
        "logits": sum(len(step) for a in plain for step in a["logprobs"]),
        "same_tokens": sum(same_tokens),
        "same_bits": sum(same_bits),
        "passed": all(same_tokens) and all(same_bits),
    }


def _parity() -> Iterator[Line]:
    for architecture in miniatures.ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            yield parity.check(architecture, Path(folder))


def _oracle() -> Iterator[Line]:
    with _solo() as (world, solo):
        for mode, count in (
            ("v1 compiled", 450),
            ("v1 eager", 100),
            ("tensor parallel 2", 300),
            ("pipeline parallel 2", 300),
            ("speculative decoding (ngram)", 150),
        ):
            yield crowd(world, solo, mode, count)
        yield crowd(world, solo, "v2 eager", 30, max_tokens=24)
        yield unsteered(world)


def _mutations() -> Iterator[Line]:
    with _solo() as (world, solo):
        for name in mutations.MUTATIONS:
            yield mutation(world, solo, name)


class _solo:  # noqa: N801 - a context manager, read as one
    """A world and the engine that runs its requests alone."""

    def __enter__(self) -> tuple[World, Solo]:
        self._folder = tempfile.TemporaryDirectory()
        world = oracle.world(Path(self._folder.name))
        self._solo = Solo(world)
        return world, self._solo

    def __exit__(self, *error: object) -> None:
        self._solo.engine.stop()
        self._folder.cleanup()


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


SUITES: dict[str, Callable[[], Iterator[Line]]] = {
    "parity": _parity,
    "oracle": _oracle,
    "mutations": _mutations,
}


def main(names: list[str]) -> int:
    """Run the suites named, or all; 0 if every line passed."""
    lines = []
    for name in names or SUITES:
        began = time.monotonic()
        for line in SUITES[name]():
            lines.append({**line, "seconds": round(time.monotonic() - began, 1)})
            began = time.monotonic()
            print(json.dumps(lines[-1]), flush=True)
    failed = [line for line in lines if not line["passed"]]
    observed = sum(line.get("observed_tokens", 0) for line in lines)
    print(
        json.dumps(
            {
                "suite": "summary",
                "lines": len(lines),
                "failed": len(failed),
                "observed_tokens": observed,
                "passed": not failed,
            }
        )
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
