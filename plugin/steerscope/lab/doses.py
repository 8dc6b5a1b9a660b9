"""Steering by dose: what a policy does to answers as it grows, beside its controls, and what else.

The amounts scale the decoder, so that at 0.5 exactly half of the change is made at every token; the
dose that goes with each is measured, not assumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from steerscope.catalog import authoring
from steerscope.catalog.model import Feature
from steerscope.catalog.store import Catalog, SiteKey
from steerscope.errors import LabError
from steerscope.lab.bench import Bench
from steerscope.lab.cases import Case
from steerscope.lab.causal import (
    Controls,
    Effect,
    Said,
    Variants,
    controls,
    effect,
    say,
    variants,
)
from steerscope.lab.judging import Judge
from steerscope.steering.interventions import Policy

if TYPE_CHECKING:
    from steerscope.lab.evaluate import Plan


@dataclass(frozen=True, slots=True)
class Point:
    """A policy at one amount, on one population."""

    amount: float
    effect: Effect
    controls: Mapping[str, Controls]
    """By share: answered, declined, changed, malformed, correct."""


@dataclass(frozen=True, slots=True)
class GroupCurve:
    """One population: unsteered, and at each amount."""

    unsteered: Effect
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Collateral:
    """Unrelated cases under the policy as declared."""

    changed: float
    correct_before: float
    correct_after: float
    controls_changed: Controls
    num_cases: int


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """One policy."""

    features: tuple[str, ...]
    groups: Mapping[str, GroupCurve]
    collateral: Mapping[str, Collateral]


_SHARES = ("answered", "declined", "malformed", "correct", "changed")


def write_derived_catalog(folder: Path, catalog: Catalog, plan: Plan) -> Mapping[str, Variants]:
    """The catalog with every variant of what its policies edit; the variants by policy."""
    features: list[Feature] = []
    vectors = dict(catalog.vectors)
    made: dict[str, Variants] = {}
    for n, name in enumerate(plan.policies):
        policy = policy_of(catalog, name)
        edited = [
            catalog.feature(f) for f in dict.fromkeys(i.feature for i in policy.interventions)
        ]
        own = variants(
            edited,
            catalog.vectors,
            {f.name: rows for f in edited if (rows := plan.decoders.get(_read_at(f))) is not None},
            seed=plan.seed,
            num_controls=plan.num_controls,
            amounts=_amounts(plan),
            prefix=f"policy_{n:02}",
        )
        made[name] = own
        features += own.features
        vectors |= own.vectors
    document = msgspec.structs.replace(
        catalog.document, features=(*catalog.document.features, *features)
    )
    dictionaries = {
        d.name: authoring.stored_encoder(catalog, d.name) for d in document.dictionaries
    }
    authoring.write_catalog(folder, document, vectors, dictionaries)
    return made


def _read_at(feature: Feature) -> SiteKey:
    return SiteKey(feature.layer, feature.site)


def steer(
    bench: Bench,
    catalog: Catalog,
    name: str,
    plan: Plan,
    judge: Judge,
    made: Mapping[str, Variants],
    told: Callable[[str], None],
) -> PolicyReport:
    """One policy on every population."""
    policy = policy_of(catalog, name)
    study = _Study(bench, policy, made[name], plan, judge)
    groups: dict[str, GroupCurve] = {}
    collateral: dict[str, Collateral] = {}
    for group, cases in _populations(plan).items():
        told(f"{name} on {group}: {len(cases)} cases, {len(_amounts(plan))} amounts")
        if group in plan.side_groups:
            collateral[group] = study.collateral(cases)
        else:
            groups[group] = study.curve(cases)
    return PolicyReport(made[name].edited, groups, collateral)


def policy_of(catalog: Catalog, name: str) -> Policy:
    """The catalog's policy; ``LabError`` if there is none."""
    for policy in catalog.policies:
        if policy.name == name:
            return policy
    known = ", ".join(policy.name for policy in catalog.policies) or "none"
    raise LabError(f"no policy {name!r} in the catalog (it has: {known})")


class _Study:
    """One policy on a running bench."""

    def __init__(
        self, bench: Bench, policy: Policy, made: Variants, plan: Plan, judge: Judge
    ) -> None:
        self._bench, self._policy, self._made = bench, policy, made
        self._plan, self._judge = plan, judge

    def curve(self, cases: Sequence[Case]) -> GroupCurve:
        unsteered = say(self._bench, cases, self._judge)
        points = []
        for index, amount in enumerate(_amounts(self._plan)):
            seen, others = self._at(cases, unsteered, index)
            shares = {share: controls(others, share) for share in _SHARES if others}
            points.append(Point(amount, seen, shares))
        return GroupCurve(effect(unsteered, unsteered), tuple(points))

    def collateral(self, cases: Sequence[Case]) -> Collateral:
        unsteered = say(self._bench, cases, self._judge)
        seen, others = self._at(cases, unsteered, _amounts(self._plan).index(1.0))
        return Collateral(
            changed=seen.changed,
            correct_before=effect(unsteered, unsteered).correct,
            correct_after=seen.correct,
            controls_changed=controls(others, "changed"),
            num_cases=len(cases),
        )

    def _at(
        self, cases: Sequence[Case], unsteered: Sequence[Said], index: int
    ) -> tuple[Effect, list[Effect]]:
        effects = []
        for direction in range(1 + self._plan.num_controls):
            spec = self._made.spec(self._policy.spec, direction, index)
            effects.append(effect(say(self._bench, cases, self._judge, spec), unsteered))
        return effects[0], effects[1:]


def _amounts(plan: Plan) -> list[float]:
    return sorted({*plan.doses, 1.0})


def _populations(plan: Plan) -> dict[str, list[Case]]:
    """At most ``max_cases_per_group`` of each group, drawn by seed."""
    groups: dict[str, list[Case]] = {}
    for case in plan.cases:
        groups.setdefault(case.group or "all", []).append(case)
    rng = random.Random(plan.seed)
    limit = plan.max_cases_per_group
    return {
        group: cases if len(cases) <= limit else rng.sample(cases, limit)
        for group, cases in sorted(groups.items())
    }
