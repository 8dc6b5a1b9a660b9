"""Does editing a feature do what reading it suggests, and do random directions do it too?

An edit is compared with controls: the same encoder, gate and values, so the same tokens change by
the same amount, but along another direction of the same norm. The largest control is reported
beside their mean: one random direction that works as well is evidence too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from steerscope.catalog.model import Feature, FeatureKind, LabelSource
from steerscope.catalog.store import FeatureVectors
from steerscope.catalog.tensors import FloatArray
from steerscope.errors import LabError
from steerscope.lab.bench import Bench
from steerscope.lab.cases import Case
from steerscope.lab.judging import Judge, Outcome
from steerscope.steering.interventions import SteeringSpec

NUM_CONTROLS = 12
OWN_COSINE = 0.7
"""A dictionary's row closer than this is the feature itself, or another version of it."""


@dataclass(frozen=True, slots=True)
class Said:
    """One case's answer, and by how much its stream was changed for it."""

    text: str
    outcome: Outcome
    dose: float
    """Mean over changed tokens; 0 where none was."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What became of a set of cases under one edit, as shares of all of them."""

    num_cases: int
    answered: float
    declined: float
    malformed: float
    correct: float
    changed: float
    """Answers that differ from the unsteered ones."""
    edited: float
    """Cases in which any token was changed at all."""
    dose: float
    """Mean over the cases in which tokens were changed."""


@dataclass(frozen=True, slots=True)
class Controls:
    """One share of every control."""

    mean: float
    max: float
    each: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """An edit beside no edit and beside its controls."""

    baseline: Effect
    edit: Effect
    controls: tuple[Effect, ...]

    def control(self, share: str) -> Controls:
        """The controls' ``answered``, ``declined``, ``changed``, ..."""
        return controls(self.controls, share)


def controls(effects: Sequence[Effect], share: str) -> Controls:
    """One share of every control; zeros where there is none."""
    each = tuple(float(getattr(e, share)) for e in effects)
    return Controls(sum(each) / len(each), max(each), each) if each else Controls(0.0, 0.0, ())


def say(
    bench: Bench, cases: Sequence[Case], judge: Judge, steering: SteeringSpec | str | None = None
) -> list[Said]:
    """Ask the cases under one edit."""
    return [
        Said(a.text, judge.outcome(a.case, a.text), a.track.steered.dose_mean)
        for a in bench.ask(cases, steering)
    ]


def effect(said: Sequence[Said], unsteered: Sequence[Said]) -> Effect:
    """The shares of what was said."""

    def share(holds: Iterable[bool]) -> float:
        return sum(holds) / len(said)

    doses = [s.dose for s in said if s.dose > 0]
    return Effect(
        num_cases=len(said),
        answered=share(s.outcome.is_answer for s in said),
        declined=share(s.outcome is Outcome.DECLINED for s in said),
        malformed=share(s.outcome is Outcome.MALFORMED for s in said),
        correct=share(s.outcome is Outcome.CORRECT for s in said),
        changed=share(s.text != u.text for s, u in zip(said, unsteered, strict=True)),
        edited=share(s.dose > 0 for s in said),
        dose=sum(doses) / len(doses) if doses else 0.0,
    )


def compare(
    bench: Bench,
    cases: Sequence[Case],
    judge: Judge,
    spec: SteeringSpec,
    controls: Sequence[SteeringSpec],
) -> Comparison:
    """Ask the cases unsteered, edited, and under every control."""
    unsteered = say(bench, cases, judge)
    return Comparison(
        effect(unsteered, unsteered),
        effect(say(bench, cases, judge, spec), unsteered),
        tuple(effect(say(bench, cases, judge, control), unsteered) for control in controls),
    )


@dataclass(frozen=True, slots=True)
class Variants:
    """The edited features again, along other directions and by other amounts.

    Direction 0 is the feature's own, the others are its controls.
    """

    edited: tuple[str, ...]
    features: tuple[Feature, ...]
    vectors: Mapping[str, FeatureVectors]
    prefix: str

    def spec(self, spec: SteeringSpec, direction: int, amount: int = 0) -> SteeringSpec:
        """The same edits with another variant of each feature; gates stay as they are."""
        return msgspec.structs.replace(
            spec,
            interventions=tuple(
                msgspec.structs.replace(
                    i,
                    feature=_name(self.prefix, self.edited.index(i.feature), direction, amount),
                )
                for i in spec.interventions
            ),
        )


def variants(
    edited: Sequence[Feature],
    vectors: Mapping[str, FeatureVectors],
    decoders: Mapping[str, FloatArray],
    *,
    seed: int,
    num_controls: int = NUM_CONTROLS,
    amounts: Sequence[float] = (1.0,),
    prefix: str = "variant",
) -> Variants:
    """Make every variant of the edited features.

    ``decoders`` may give, by feature, the rows [K, D] of its dictionary to draw controls from;
    other features get Gaussian ones. Drawn by ``seed``, never chosen.
    """
    rng = np.random.default_rng(seed)
    features: list[Feature] = []
    made: dict[str, FeatureVectors] = {}
    for i, feature in enumerate(edited):
        own = vectors[feature.name]
        if own.W_dec is None:
            raise LabError(f"{feature.name!r} is read-only: it cannot be edited")
        controls = _directions(own.W_dec, decoders.get(feature.name), num_controls, rng)
        for r, W_dec in enumerate([own.W_dec, *controls]):
            for a, amount in enumerate(amounts):
                name = _name(prefix, i, r, a)
                features.append(_variant(feature, name, f"direction {r}, {amount:g} times"))
                scaled = (amount * W_dec).astype(np.float32)
                made[name] = FeatureVectors(own.W_enc, own.b_enc, own.threshold, scaled)
    return Variants(tuple(f.name for f in edited), tuple(features), made, prefix)


def _name(prefix: str, feature: int, direction: int, amount: int) -> str:
    return f"{prefix}_{feature:02}_{direction:02}_{amount:02}"


def _variant(feature: Feature, name: str, what: str) -> Feature:
    kind = feature.kind
    if kind is not FeatureKind.TRANSCODER_LATENT:  # which says where it writes
        kind = FeatureKind.DIRECTION
    return msgspec.structs.replace(
        feature,
        name=name,
        kind=kind,
        label=f"{feature.name}: {what}",
        label_source=LabelSource.AUTOMATIC,
        description="",
        source={"encoder": feature.name},
        evidence={},
    )


def _directions(
    W_dec: FloatArray, rows_KD: FloatArray | None, count: int, rng: np.random.Generator
) -> list[FloatArray]:
    """Random directions of the norm of ``W_dec``, none of them its own."""
    norm = float(np.linalg.norm(W_dec))
    if rows_KD is None:
        drawn = rng.standard_normal((count, len(W_dec)))
    else:
        lengths = np.linalg.norm(rows_KD, axis=1)
        cosines = np.abs(rows_KD @ W_dec) / np.maximum(lengths * norm, 1e-12)
        others = np.flatnonzero((cosines < OWN_COSINE) & (lengths > 0))
        if not len(others):
            raise LabError("the dictionary has no other latent to draw controls from")
        drawn = rows_KD[rng.choice(others, count, replace=len(others) < count)].astype(np.float64)
    scaled = norm * drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return [row.astype(np.float32) for row in scaled]
