"""Is a request steered inside vLLM what plain Transformers makes of the same intervention?

``check`` serves one miniature with Steerscope and compares tokens, activations and receipts
of a mixed batch with ``Reference``, which runs the stored weights in float32. Where vLLM too
runs in float32 the greedy tokens must be the same, and every activation at every token.

bfloat16 rounds away near-ties, so there tokens cannot be the same and nothing after the first
of them could be compared. Instead prompts of random tokens are the text, one token is
generated, and the activations at the prompt's tokens are compared, unsteered and steered.

Error of an activation: ``|a - b|`` over the spread of its feature, which is the root mean square
of ``b`` over the request's tokens, and not less than what the catalog measured on unsteered
text (an idle latent has none of its own). Relative error of a request: the root mean square of
the errors of all its activations. No single one may be off by more than ``POINTWISE`` times
the tolerance: the tail of the same rounding (Transformers in bfloat16 strays from itself in
float32 by as much), and far less than a wrong token would make.

A jumprelu latent close to its threshold, or a topk latent close to the k-th largest of its
dictionary, may be active for one and silent for the other. This is a flip: counted, not compared,
and a fault unless the active one is, by the pointwise limit, at that edge. Where the steering
itself depends on what flipped (it edits the latent, or is gated by it), the two are different
computations from there on: such a request is compared up to that token, and what is left out is
counted, and may not be much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import miniatures
import numpy as np
import numpy.typing as npt
import tiny
import torch
from engine_process import EngineProcess
from hf_reference import Reference
from steerscope.api.v1.telemetry_pb2 import REQUEST_STATE_FINISHED
from steerscope.client import Client

Floats = npt.NDArray[np.float64]

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
"""Small limits: prompts are chunked, requests queue, batches mix prefill and decode."""

MAX_TOKENS = 64
TRACED = MappingProxyType({"VLLM_CPU_CI_ENV": "1"})
"""Environment that has vLLM trace the whole graph but run it without inductor: quicker."""

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
POINTWISE = 8
MAX_SHARE_LEFT_OUT = 0.15
ROUNDING = 1e-5
"""Of a delta, relative to the two numbers whose difference it is."""

UNSTEERED = 5
MAX_DOSE = 0.3
CAPPED = ("every_site", "transcoder_beside_its_sites", "topk_beside_others")
"""Interventions asked once more with ``MAX_DOSE``, which is less than their dose."""


class Asked(NamedTuple):
    """One request of the round."""

    name: str
    prompt: list[int]
    max_tokens: int
    interventions: list[dict[str, Any]]
    max_dose: float | None = None

    @property
    def num_fed(self) -> int:
        """How many tokens enter the model: the last one sampled does not."""
        return len(self.prompt) + self.max_tokens - 1

    def request(self) -> dict[str, Any]:
        """The request as an engine takes it."""
        request = {"prompt": self.prompt, "max_tokens": self.max_tokens}
        if not self.interventions:
            return request
        spec: dict[str, Any] = {"interventions": self.interventions}
        if self.max_dose is not None:
            spec["max_dose"] = self.max_dose
        return request | {"extra_args": {"steering": json.dumps(spec)}}


@dataclasses.dataclass
class Tally:
    """What was compared, and what was wrong."""

    tokens_compared: int = 0
    tokens_different: int = 0
    activations: int = 0
    max_relative_error: float = 0.0
    max_pointwise_error: float = 0.0
    threshold_flips: int = 0
    activations_left_out: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)

    def expect(self, holds: bool, *told: object) -> None:
        """Note a fault unless ``holds``."""
        if not holds:
            self.faults.append(" ".join(map(str, told)))


def check(
    architecture: str,
    folder: Path,
    *,
    compiled: bool = True,
    names: Sequence[str] | None = None,
    max_tokens: int = MAX_TOKENS,
    with_topk: bool = False,
    environment: Mapping[str, str] = MappingProxyType({}),
    **engine_args: Any,
) -> dict[str, Any]:
    """One round of requests on the miniature ``architecture``: a summary, with ``passed``.

    Args:
        architecture: of ``miniatures.ARCHITECTURES``.
        folder: where model, catalog, config and log are written.
        compiled: whether vLLM compiles the model; see also ``TRACED``.
        names: which of ``miniatures.interventions``; all of them if None.
        max_tokens: how many to generate; 1 in bfloat16, whatever is given.
        with_topk: whether the catalog has TopK dictionaries too.
        environment: added to the engine's, such as ``TRACED`` or ``engine_process.V2``.
        **engine_args: vLLM's.
    """
    model = miniatures.write_model(folder / "model", architecture)
    catalog = miniatures.write_catalog(folder / "catalog", model)
    if with_topk:
        miniatures.add_topk(catalog, model)
    dtype = engine_args.setdefault("dtype", _stored_dtype(architecture))
    asked = _round(catalog, names, 1 if dtype == "bfloat16" else max_tokens)
    engine_args |= {"enforce_eager": not compiled}
    with _serving(folder, environment, engine_args) as (engine, client):
        results = engine.run(*(each.request() for each in asked))
        reports = [client.get_request_report(r["request_id"], wait=10.0) for r in results]
        info = engine.info
    compare = _Comparison(Reference(model, catalog), dtype)
    for each, result, report in zip(asked, results, reports, strict=True):
        compare.one(each, result["tokens"][0], report)
    tally = compare.tally
    tally.expect(info["enforce_eager"] is not compiled, "compiled otherwise than asked")
    most = MAX_SHARE_LEFT_OUT * (tally.activations + tally.activations_left_out)
    tally.expect(tally.activations_left_out <= most, "too little is left to compare")
    return {
        "suite": "parity",
        "architecture": architecture,
        "runner": "v2" if info["v2_model_runner"] else "v1",
        "compiled": compiled,
        "dtype": dtype,
        "requests": len(asked),
        **dataclasses.asdict(tally),
        "passed": not tally.faults,
    }


def _stored_dtype(architecture: str) -> str:
    is_half = miniatures.ARCHITECTURES[architecture]().dtype is torch.bfloat16
    return "bfloat16" if is_half else "float32"


def _round(catalog: Path, names: Sequence[str] | None, max_tokens: int) -> list[Asked]:
    """Each named intervention once, those of ``CAPPED`` also capped, and some unsteered."""
    named = miniatures.interventions(catalog)
    chosen = list(named) if names is None else list(names)
    plans = [(name, named[name], None) for name in chosen]
    plans += [(f"{name} capped", named[name], MAX_DOSE) for name in CAPPED if name in chosen]
    every = max(len(plans) // UNSTEERED, 1)
    for at in range(0, len(plans) + UNSTEERED, every + 1):
        plans.insert(at, ("unsteered", [], None))
    prompts = tiny.prompts(len(plans), seed=71, low=4, high=100)
    return [
        Asked(name, prompt, max_tokens, interventions, max_dose)
        for prompt, (name, interventions, max_dose) in zip(prompts, plans, strict=True)
    ]


@contextlib.contextmanager
def _serving(
    folder: Path, environment: Mapping[str, str], engine_args: dict[str, Any]
) -> Iterator[tuple[EngineProcess, Client]]:
    config = tiny.write_config(folder / "steerscope.yaml", folder / "catalog")
    engine = EngineProcess(
        folder / "model",
        config,
        folder / "engine.log",
        environment=environment,
        **LIMITS | engine_args,
    )
    try:
        with Client(json.loads(config.read_text())["hub"]["grpc_address"]) as client:
            yield engine, client
    finally:
        engine.stop()


class _Comparison:
    """Puts what vLLM and the hub said of a request beside the reference."""

    def __init__(self, reference: Reference, dtype: str) -> None:
        self.reference = reference
        self.is_exact = dtype == "float32"
        self.tolerance = TOLERANCES[dtype]
        self.tally = Tally()

    def one(self, asked: Asked, tokens: list[int], report: Any) -> None:
        """Compare one request."""
        (completion,) = report.completions
        steering = (asked.interventions, asked.max_dose)
        expected, acts = self.reference.generate(asked.prompt, asked.max_tokens, *steering)
        end = self._tokens(asked, tokens, expected) if self.is_exact else asked.num_fed
        if self._tracks(asked, completion):
            want = {name: np.array(values) for name, values in acts.items()}
            got = {t.feature: np.array(t.activations) for t in completion.features}
            self._activations(asked, got, want, end)
            self._receipt(asked, completion, report.asked_steering_digest)
            self._deltas(asked, completion, got)

    def _tokens(self, asked: Asked, tokens: list[int], expected: list[int]) -> int:
        """Compare the generated tokens; the position from which they differ, if they do."""
        different = np.flatnonzero(np.array(tokens) != np.array(expected))
        self.tally.tokens_compared += len(expected)
        self.tally.tokens_different += len(different)
        if not len(different):
            return asked.num_fed
        self.tally.expect(False, asked.name, "differs from token", different[0])
        return min(len(asked.prompt) + int(different[0]), asked.num_fed)

    def _tracks(self, asked: Asked, completion: Any) -> bool:
        """Whether every feature was observed at every token."""
        found = [(t.feature, t.first_position, len(t.activations)) for t in completion.features]
        whole = [(name, 0, asked.num_fed) for name in self.reference.features]
        holds = sorted(found) == sorted(whole)
        self.tally.expect(holds, asked.name, "was not observed whole:", found)
        return holds

    def _activations(
        self, asked: Asked, got: dict[str, Floats], want: dict[str, Floats], end: int
    ) -> None:
        """Compare what every feature read at the tokens before ``end``."""
        spreads = {name: self._spread(name, values) for name, values in want.items()}
        parting = self._parting(asked, got, want, end)
        if parting is not None:
            end, name, edge = parting
            nearest = max(got[name][end], want[name][end]) - edge[end]
            self._flips(asked, name, np.array([nearest / spreads[name]]))
        self.tally.activations_left_out += len(want) * (asked.num_fed - end)
        errors = [
            self._compared(asked, name, got[name][:end], want[name][:end], spread)
            for name, spread in spreads.items()
        ]
        self._judge(asked, np.concatenate(errors))

    def _compared(self, asked: Asked, name: str, a: Floats, b: Floats, spread: float) -> Floats:
        """One feature's errors, flips left out."""
        errors = np.abs(a - b) / spread
        flipped = np.zeros(len(a), bool)
        if (edge := self._edge(name)) is not None:
            flipped = (a > 0.0) != (b > 0.0)
            self._flips(asked, name, (np.maximum(a, b) - edge[: len(a)])[flipped] / spread)
        worst = errors[~flipped].max(initial=0.0)
        limit = POINTWISE * self.tolerance
        self.tally.expect(worst <= limit, asked.name, name, "is once off by", worst)
        return errors[~flipped]

    def _judge(self, asked: Asked, errors: Floats) -> None:
        error = float(np.sqrt(np.mean(errors**2))) if len(errors) else 0.0
        tally = self.tally
        tally.activations += len(errors)
        tally.max_relative_error = max(tally.max_relative_error, error)
        tally.max_pointwise_error = max(tally.max_pointwise_error, float(errors.max(initial=0.0)))
        tally.expect(error <= self.tolerance, asked.name, "is off by", error)

    def _parting(
        self, asked: Asked, got: dict[str, Floats], want: dict[str, Floats], end: int
    ) -> tuple[int, str, Floats] | None:
        """Where what the steering depends on flips first: position, feature, edge it crosses."""
        first = None
        for name in self.reference.features:  # in forward order
            for value, edge in self._edges(asked, name):
                crossed = np.flatnonzero((got[name][:end] > value) != (want[name][:end] > value))
                if len(crossed):
                    end = int(crossed[0])
                    first = (end, name, edge)
        return first

    def _edges(self, asked: Asked, name: str) -> list[tuple[float, Floats]]:
        """Values at which the request's steering jumps; by token, where the feature gets there."""
        values, edge = [], self._edge(name)
        for edit in asked.interventions:
            if edit["feature"] == name and (edge is not None or edit.get("only_if_active")):
                values.append(0.0)
            when = edit.get("when", {})
            if when.get("feature") == name:
                values += [when[side] for side in ("above", "below") if side in when]
        reached = np.full(asked.num_fed, -np.inf) if edge is None else edge
        return [(value, np.maximum(value, reached)) for value in values]

    def _edge(self, name: str) -> Floats | None:
        """What the feature must exceed at each token to be active at all, if it jumps there."""
        edge = self.reference.edges[name]
        return np.array(edge) if edge else None

    def _spread(self, name: str, values: Floats) -> float:
        measured = self.reference.features[name]["evidence"]["spread"]
        return max(float(np.sqrt(np.mean(values**2))), measured)

    def _flips(self, asked: Asked, name: str, distances: Floats) -> None:
        self.tally.threshold_flips += len(distances)
        far = distances[np.abs(distances) > POINTWISE * self.tolerance]
        self.tally.expect(not len(far), asked.name, name, "flips far from its threshold:", far)

    def _receipt(self, asked: Asked, completion: Any, asked_digest: str) -> None:
        """The report says that all of it was seen, and applied as asked."""

        def expect(holds: bool, *told: object) -> None:
            self.tally.expect(holds, asked.name, *told)

        expect(completion.state == REQUEST_STATE_FINISHED, "is not finished")
        expect(completion.complete, "is not complete")
        expect(completion.num_observed_tokens == asked.num_fed, "was not observed whole")
        expect(completion.steering_digest == asked_digest, "was not steered as asked")
        expect(bool(asked_digest) == bool(asked.interventions), "has the digest", asked_digest)
        expect(completion.policy == ("inline" if asked.interventions else ""), "has a policy")
        if asked.max_dose is not None:
            # Some dose is above the cap, so the largest is the cap.
            dose = completion.steering.dose_max
            expect(abs(dose / asked.max_dose - 1) < ROUNDING, "has dose", dose)

    def _deltas(self, asked: Asked, completion: Any, got: dict[str, Floats]) -> None:
        """The reported changes are those that the equation makes of the reported activations."""
        changed = np.zeros(asked.num_fed, bool)
        edits = {edit["feature"]: edit for edit in asked.interventions}
        for track in completion.features:
            told = np.array(track.deltas or np.zeros(asked.num_fed))
            edit = edits.get(track.feature)
            want = _delta(edit, got, len(asked.prompt)) if edit else np.zeros(asked.num_fed)
            changed |= want != 0.0
            slack = ROUNDING * (2 * np.abs(got[track.feature]) + np.abs(want))
            if asked.max_dose is None:
                holds = np.abs(told - want) <= slack
            else:  # shrunk
                holds = (np.abs(told) <= np.abs(want) + slack) & (told * want >= 0.0)
            self.tally.expect(bool(holds.all()), asked.name, track.feature, "has other deltas")
        num_steered = completion.steering.num_tokens
        self.tally.expect(num_steered == changed.sum(), asked.name, "steered", num_steered)


def _delta(edit: dict[str, Any], acts: dict[str, Floats], num_prompt: int) -> Floats:
    """``(f' - f) * gate`` of the reported activations, at every token."""
    f = acts[edit["feature"]]
    holds = _covered(edit, len(f), num_prompt)
    if edit.get("only_if_active"):
        holds &= f > 0.0
    if (when := edit.get("when")) is not None:
        gating = acts[when["feature"]]
        holds &= (gating > when.get("above", -np.inf)) & (gating < when.get("below", np.inf))
    return np.where(holds, _edited(edit, f) - f, 0.0)


def _covered(edit: dict[str, Any], num_tokens: int, num_prompt: int) -> npt.NDArray[np.bool_]:
    position = np.arange(num_tokens)
    start, end = edit.get("span", (0, num_tokens))
    covered = (position >= start) & (position < end)
    match edit.get("phase", "all"):
        case "prompt":
            covered &= position < num_prompt
        case "generation":
            covered &= position >= num_prompt
    return covered


def _edited(edit: dict[str, Any], f: Floats) -> Floats:
    if "clamp" in edit:
        return np.full_like(f, edit["clamp"])
    if "ablate" in edit:
        return np.zeros_like(f)
    if "at_least" in edit:
        return np.maximum(f, edit["at_least"])
    if "at_most" in edit:
        return np.minimum(f, edit["at_most"])
    if "scale" in edit:
        return f * edit["scale"]
    return f + edit["add"]
