"""The oracle: many random requests in awkward batches, each held against its run alone.

A request's solo run, in an engine without prefix caching and with room to spare, says what its
tokens and activations are. In the crowd, under small limits, everything must come out the same:
every token, every activation of every token, every change that steering made.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import miniatures
import numpy as np
import tiny
import yaml
from engine_process import EngineProcess
from steerscope.client import Client

MAX_MODEL_LEN = 256
LIMITS = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "max_model_len": MAX_MODEL_LEN,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 26,
}
"""Prompts are chunked, batches mix prefill and decode, and 26 blocks of 32 tokens are too few."""
ROOMY = {"max_num_seqs": 8, "max_num_batched_tokens": 256, "max_model_len": MAX_MODEL_LEN}
TOLERANCE = 1e-3
"""Of a feature's spread: batches of other shapes round differently."""
MAX_FLIPS = 1e-4
"""Latents per token that rounding may have put on the other side of their threshold."""

SAMPLES = {"n": 2, "temperature": 1.0, "top_k": 1}
"""Two samples that are the greedy one: vLLM wants a temperature for more than one."""

Request = dict[str, Any]


class World(NamedTuple):
    """A miniature Llama with features at all six sites."""

    folder: Path
    model: Path
    catalog: Path

    def config(self, name: str) -> Path:
        """A new config with ports of its own, and some policies."""
        path = tiny.write_config(self.folder / f"{name}.yaml", self.catalog)
        tree = json.loads(path.read_text())
        tree["steering"] = {"max_rows_per_request": 3}
        tree["policies"] = [
            {"name": f"p-{name.replace('_', '-')}", "interventions": edits}
            for name, edits in miniatures.interventions(self.catalog).items()
        ]
        path.write_text(json.dumps(tree))
        return path


def world(folder: Path) -> World:
    model = miniatures.write_model(folder / "model", "llama")
    return World(folder, model, miniatures.write_catalog(folder / "catalog", model))


def requests(
    world: World, count: int, *, seed: int = 0, max_tokens: int = 100, samples: bool = True
) -> list[Request]:
    """Random requests, arriving over time.

    Lengths from one token to the longest there can be, shared prefixes, steering inline and
    by name, aborts, stops and, unless told otherwise, several samples.
    """
    rng = np.random.default_rng(seed)
    named = miniatures.interventions(world.catalog)
    prefixes = [_tokens(rng, int(rng.integers(33, 150))) for _ in range(6)]
    made = [_request(rng, i, named, prefixes, max_tokens) for i in range(count)]
    if not samples:
        made = [{k: v for k, v in r.items() if k not in SAMPLES} for r in made]
    return made


def _request(
    rng: np.random.Generator,
    index: int,
    named: dict[str, Any],
    prefixes: list[list[int]],
    max_tokens: int,
) -> Request:
    request: Request = {
        "max_tokens": 1 if rng.random() < 0.1 else int(rng.integers(2, max_tokens)),
        "arrive_at": int(index * 3 * rng.random()),
    }
    room = MAX_MODEL_LEN - request["max_tokens"]
    kind = rng.random()
    if kind < 0.1:
        prompt = _tokens(rng, 1)
    elif kind < 0.15:
        prompt = _tokens(rng, room)
    elif kind < 0.6:
        prompt = prefixes[rng.integers(len(prefixes))] + _tokens(rng, int(rng.integers(1, 40)))
    else:
        prompt = _tokens(rng, int(rng.integers(2, 120)))
    request["prompt"] = prompt[:room]
    if (flag := _flag(rng, named, len(prompt))) is not None:
        request["extra_args"] = {"steering": flag}
    ending = rng.random()
    if ending < 0.12:
        request["abort_after"] = int(rng.integers(1, max(request["max_tokens"], 2)))
    elif ending < 0.2:
        request["stop_token_ids"] = _tokens(rng, 30)
    elif ending < 0.25:
        request |= SAMPLES
    return request


def _tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(2, tiny.VOCAB_SIZE, count).tolist()


def _flag(rng: np.random.Generator, named: dict[str, Any], length: int) -> str | None:
    kind = rng.random()
    name = list(named)[rng.integers(len(named))]
    if kind < 0.4:
        return None
    if kind < 0.55:
        return f"p-{name.replace('_', '-')}"
    if kind < 0.7:
        return json.dumps({"interventions": named[name]})
    site = miniatures.SITES[rng.integers(len(miniatures.SITES))]
    edit = dict(named[f"at_{site}"][0])
    start = int(rng.integers(0, max(length, 1)))
    edit["span"] = [start, start + int(rng.integers(1, 60))]
    return json.dumps({"interventions": [edit], "max_dose": round(float(rng.uniform(0.1, 2)), 3)})


class Seen(NamedTuple):
    """One completion's report: activations and changes [N, F], NaN where there is none."""

    acts_NF: np.ndarray
    deltas_NF: np.ndarray
    completion: Any
    asked_digest: str


class Engine:
    """An engine with its hub's client."""

    def __init__(self, world: World, name: str, **kwargs: Any) -> None:
        config = world.config(name)
        self.process = EngineProcess(world.model, config, world.folder / f"{name}.log", **kwargs)
        self.grpc_address = json.loads(config.read_text())["hub"]["grpc_address"]
        self.client = Client(self.grpc_address)
        document = yaml.safe_load((world.catalog / "catalog.yaml").read_text())
        self.features = {f["name"]: i for i, f in enumerate(document["features"])}
        self.spread_F = np.array([f["evidence"]["spread"] for f in document["features"]])

    def run(self, *requests: Request) -> list[dict[str, Any]]:
        return self.process.run(*requests)

    def seen(self, request_id: str) -> list[Seen]:
        """What the hub's report holds of each completion."""
        report = self.client.get_request_report(request_id, wait=20.0)
        return [
            Seen(*self._matrices(c), c, report.asked_steering_digest) for c in report.completions
        ]

    def _matrices(self, completion: Any) -> tuple[np.ndarray, np.ndarray]:
        ends = [t.first_position + len(t.activations) for t in completion.features]
        acts = np.full((max(ends, default=0), len(self.features)), np.nan)
        deltas = np.zeros_like(acts)
        for track in completion.features:
            at = slice(track.first_position, track.first_position + len(track.activations))
            acts[at, self.features[track.feature]] = track.activations
            if track.deltas:
                deltas[at, self.features[track.feature]] = track.deltas
        return acts, deltas

    def stop(self) -> None:
        self.process.stop()


class Solo:
    """Runs requests alone, once each, and remembers."""

    def __init__(self, world: World) -> None:
        self.engine = Engine(world, "solo", enable_prefix_caching=False, **ROOMY)
        self._known: dict[str, tuple[list[int], Seen]] = {}

    def __call__(self, request: Request) -> tuple[list[int], Seen]:
        alone = {
            key: value
            for key, value in request.items()
            if key in ("prompt", "max_tokens", "extra_args", "stop_token_ids")
        }
        key = json.dumps(alone)
        if key not in self._known:
            (result,) = self.engine.run(alone)
            (seen,) = self.engine.seen(result["request_id"])
            self._known[key] = result["tokens"][0], seen
        return self._known[key]


def judge(engine: Engine, solo: Solo, requests: list[Request]) -> dict[str, Any]:
    """Run the requests as a crowd; what differs from their solo runs, counted."""
    before = engine.process.num_preemptions
    results = engine.run(*requests)
    faults: Counter[str] = Counter()
    counts: Counter[str] = Counter(requests=len(requests))
    for request, result in zip(requests, results, strict=True):
        expected, alone = solo(request)
        counts["aborted"] += result["aborted"]
        seen = engine.seen(result["request_id"])
        if len(seen) != request.get("n", 1):
            faults["completions"] += 1
        for tokens in result["tokens"]:
            wanted = expected[: len(tokens)] if result["aborted"] else expected
            faults["tokens"] += tokens != wanted
        for one in seen:
            _compare(one, alone, request, result, engine.spread_F, counts, faults)
    counts["preemptions"] = engine.process.num_preemptions - before
    if counts["flips"] > MAX_FLIPS * counts["observed_tokens"]:
        faults["flips"] = counts["flips"]
    return {**counts, "faults": dict(+faults), "passed": not +faults}


def _compare(
    seen: Seen,
    alone: Seen,
    request: Request,
    result: dict[str, Any],
    spread_F: np.ndarray,
    counts: Counter[str],
    faults: Counter[str],
) -> None:
    completion = seen.completion
    known_N = ~np.isnan(seen.acts_NF).any(axis=1)
    num_known = int(known_N.sum())
    counts["observed_tokens"] += num_known
    counts["cached_tokens"] += completion.num_cached_tokens
    counts["steered"] += bool(completion.policy)
    counts["steered_tokens"] += completion.steering.num_tokens
    if (n := len(seen.acts_NF)) > len(alone.acts_NF):
        faults["observed beyond the end"] += 1
        return
    off = np.abs(seen.acts_NF - alone.acts_NF[:n]) > TOLERANCE * spread_F
    counts["flips"] += int((off & _is_flip(seen, alone, n, spread_F)).sum())
    wrong_N = (off & ~_is_flip(seen, alone, n, spread_F)).any(axis=1) & known_N
    faults["misattributed tokens"] += int(wrong_N.sum())
    moved = np.abs(seen.deltas_NF - alone.deltas_NF[:n]) > TOLERANCE * spread_F
    faults["wrong changes"] += int((moved & ~off).any(axis=1).sum())
    faults["digest"] += completion.steering_digest != seen.asked_digest
    unobserved = sum(u.num_tokens for u in completion.unobserved)
    if result["aborted"]:
        at_least = len(request["prompt"]) + len(result["tokens"][0]) - 1
        faults["unaccounted tokens"] += max(at_least - num_known - unobserved, 0)
    else:
        faults["unaccounted tokens"] += abs(len(alone.acts_NF) - num_known - unobserved)
        faults["unobserved tokens"] += unobserved
        faults["incomplete"] += not completion.complete
        steered = completion.steering.num_tokens - alone.completion.steering.num_tokens
        faults["steered tokens"] += abs(steered)


def _is_flip(seen: Seen, alone: Seen, n: int, spread_F: np.ndarray) -> np.ndarray:
    """At a threshold rounding decides: zero on one side, the threshold itself on the other."""
    low = np.minimum(seen.acts_NF, alone.acts_NF[:n])
    high = np.maximum(seen.acts_NF, alone.acts_NF[:n])
    smallest_F = np.where(alone.acts_NF > 0, alone.acts_NF, np.inf).min(axis=0, initial=np.inf)
    return (low == 0.0) & (high <= smallest_F + TOLERANCE * spread_F)
