"""``lab discover``: find the feature that tells two sets of cases apart, and prove it.

1. Every case is asked with the residual stream captured (``harvest``).
2. Directions, probes and latents are fitted on the fit split and ranked on dev (``candidates``).
3. The best that can be edited are turned up and down on dev, and one is chosen (``trial``).
4. On the test split, whose names and phrasings nothing above has seen: how well it reads, and what
   turning it does beside random directions of the same norm.
5. It is written to a catalog with its gate, the best probe, two policies and a calibrated signal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steerscope.catalog import authoring
from steerscope.catalog.model import SCHEMA, CatalogDocument, FeatureKind
from steerscope.catalog.store import FeatureVectors, SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.errors import LabError
from steerscope.lab import cases as case_files
from steerscope.lab.bench import Bench
from steerscope.lab.candidates import Candidate, Dictionary, Sides, directions, latents
from steerscope.lab.cases import Case
from steerscope.lab.causal import NUM_CONTROLS, Comparison, Variants, effect, say, variants
from steerscope.lab.harvest import Harvest, TokenChoice, harvest
from steerscope.lab.judging import Judge
from steerscope.lab.statistics import ScoreReport, evaluate_scores
from steerscope.lab.trial import (
    Contrast,
    Finalist,
    Turned,
    best,
    confirm,
    contrast,
    gate,
    gate_feature,
    turn_all,
)

NUM_LATENTS = 2
"""Latents of each sign that each dictionary sends on, for every choice of tokens."""
NUM_FINALISTS = 12
MAX_SIDE = 60
"""Unrelated dev cases that every edit is tried on."""
MIN_CASES = 20
"""Of each class in each split; fewer prove nothing."""

Dictionaries = Callable[[Harvest, Sequence[Candidate]], Sequence[Dictionary]]
"""Dictionaries to look into, given what was captured and the directions found so far."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a discovery."""

    model: Path
    positive: Sequence[Case]
    negative: Sequence[Case]
    side: Sequence[Case]
    """Unrelated cases that an edit should leave alone; may be empty."""
    keys: Sequence[SiteKey]
    choices: Sequence[TokenChoice] = tuple(TokenChoice)
    max_tokens: int = 32
    seed: int = 0
    num_controls: int = NUM_CONTROLS
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reading:
    """One candidate and how well it reads on the test split."""

    candidate: Candidate
    test: ScoreReport


@dataclass(frozen=True, slots=True)
class Discovery:
    """All that was found."""

    plan: Plan
    split_digest: str
    split_counts: Mapping[str, int]
    readings: tuple[Reading, ...]
    """The best candidate of each kind, and the chosen one."""
    ranked: tuple[Candidate, ...]
    """Every candidate, best on dev first."""
    turned: tuple[Turned, ...]
    chosen: tuple[Turned, Turned]
    """Toward positive, toward negative."""
    contrast: Contrast
    confirmed: tuple[Comparison, Comparison]
    side: tuple[float, ...]
    """Unrelated test answers that changed, under each of the two edits; empty without any."""
    gates: Mapping[str, FeatureVectors]
    dev: Sides

    @property
    def finalist(self) -> Finalist:
        """The feature that was chosen."""
        return self.chosen[0].finalist

    @property
    def probe(self) -> Candidate:
        """The best probe that the chosen feature's gate can point at, or that needs no pointing."""
        return _probe(self.ranked, self.finalist.candidate)


def discover(
    plan: Plan, judge: Judge, dictionaries: Dictionaries, told: Callable[[str], None]
) -> Discovery:
    """Run the whole study; raise ``LabError`` or ``CaseError`` where it would prove nothing."""
    everything = [c for c in (*plan.positive, *plan.negative) if case_files.split_of(c)]
    case_files.check_apart(plan.positive, plan.negative)
    case_files.check_held_out(everything)
    fit_cases = case_files.in_split(everything, "fit")
    told(f"asking {len(everything)} cases, capturing {len(plan.keys)} sites")
    seen = harvest(
        plan.model,
        everything,
        fit_cases,
        plan.keys,
        judge,
        max_tokens=plan.max_tokens,
        seed=plan.seed,
        engine_args=plan.engine_args,
    )
    fit, dev, test = (_sides(plan, seen, split) for split in ("fit", "dev", "test"))
    told("fitting directions and probes")
    choices = _present(plan, everything)
    found = [c for k in plan.keys for choice in choices for c in directions(fit, dev, k, choice)]
    known = dictionaries(seen, found)
    for dictionary in known:
        for choice in choices:
            found += latents(dictionary, dev, choice, NUM_LATENTS)
    ranked = sorted(found, key=lambda c: -c.strength)
    finalists, gates = _finalists(ranked, seen, fit)
    told(f"turning {len(finalists)} finalists up and down")
    return _tried(plan, judge, told, ranked, finalists, gates, known, fit, dev, test)


def _tried(
    plan: Plan,
    judge: Judge,
    told: Callable[[str], None],
    ranked: Sequence[Candidate],
    finalists: Sequence[Finalist],
    gates: Mapping[str, FeatureVectors],
    known: Sequence[Dictionary],
    fit: Sides,
    dev: Sides,
    test: Sides,
) -> Discovery:
    distinct = contrast(fit)
    with tempfile.TemporaryDirectory() as folder:
        catalog = Path(folder) / "trial"
        made = _write_trial(catalog, plan, finalists, gates, known)
        with Bench(
            plan.model, catalog, max_tokens=plan.max_tokens, engine_args=plan.engine_args
        ) as bench:
            aside = case_files.in_split(plan.side, "dev")[:MAX_SIDE]
            turned = turn_all(bench, finalists, dev, aside, distinct, judge)
            chosen = best(turned)
            told(f"confirming {chosen[0].finalist.name} beside {plan.num_controls} controls")
            confirmed = [
                confirm(bench, t, made, [h.case for h in side], judge, plan.num_controls)
                for t, side in zip(chosen, (test.negative, test.positive), strict=True)
            ]
            rest = case_files.in_split(plan.side, "test")
            side = tuple(_side_damage(bench, rest, t, judge) for t in chosen if rest)
    return Discovery(
        plan=plan,
        split_digest=case_files.digest([*plan.positive, *plan.negative]),
        split_counts=case_files.counts([*plan.positive, *plan.negative]),
        readings=tuple(
            Reading(c, _read(c, test, plan.seed))
            for c in _reported(ranked, chosen[0].finalist.candidate)
        ),
        ranked=tuple(ranked),
        turned=tuple(turned),
        chosen=chosen,
        contrast=distinct,
        confirmed=(confirmed[0], confirmed[1]),
        side=side,
        gates=gates,
        dev=dev,
    )


def _sides(plan: Plan, seen: Harvest, split: case_files.Split) -> Sides:
    sides = [seen.of(case_files.in_split(cases, split)) for cases in (plan.positive, plan.negative)]
    for name, side in zip(("positive", "negative"), sides, strict=True):
        if len(side) < MIN_CASES:
            raise LabError(f"{name}: {len(side)} cases in the {split} split, {MIN_CASES} needed")
    return Sides(*sides)


def _present(plan: Plan, everything: Sequence[Case]) -> list[TokenChoice]:
    """The choices that every case has a token for."""
    named = all(case.entity for case in everything)
    return [c for c in plan.choices if named or c is TokenChoice.LAST_PROMPT]


def _reported(ranked: Sequence[Candidate], chosen: Candidate) -> list[Candidate]:
    firsts = [
        next((c for c in ranked if c.kind is kind), None)
        for kind in dict.fromkeys(c.kind for c in ranked)
    ]
    probe = _probe(ranked, chosen)
    return list(dict.fromkeys([chosen, probe, *(c for c in firsts if c is not None)]))


def _probe(ranked: Sequence[Candidate], chosen: Candidate) -> Candidate:
    for candidate in ranked:
        if candidate.kind is not FeatureKind.PROBE or not candidate.is_positive:
            continue
        pointed = (candidate.key, candidate.choice) == (chosen.key, chosen.choice)
        if candidate.choice is TokenChoice.LAST_PROMPT or pointed:
            return candidate
    raise LabError("no probe reads the cases better than chance")


def _read(candidate: Candidate, test: Sides, seed: int) -> ScoreReport:
    scores = candidate.scores(test.all)
    return evaluate_scores(
        scores if candidate.is_positive else -scores,
        test.labels,
        np.array(test.names),
        probabilities=False,
        seed=seed,
    )


def _finalists(
    ranked: Sequence[Candidate], seen: Harvest, fit: Sides
) -> tuple[list[Finalist], dict[str, FeatureVectors]]:
    """The best that can be edited, at most two of a kind at a site, each with its gate."""
    finalists: list[Finalist] = []
    gates: dict[str, FeatureVectors] = {}
    for candidate in ranked:
        alike = [f for f in finalists if _kin(f.candidate, candidate)]
        if candidate.vectors.W_dec is None or len(alike) >= 2 or len(finalists) == NUM_FINALISTS:
            continue
        choice = candidate.choice
        if choice is TokenChoice.MAX_SPAN or any(_same(f.candidate, candidate) for f in finalists):
            continue
        name = f"gate_{candidate.key.site.value}_{candidate.key.layer}_{choice.value}"
        if name not in gates:
            gates[name] = gate(seen, fit, candidate.key, choice)
        side = fit.positive if candidate.is_positive else fit.negative
        high = float(np.nanmean(candidate.scores(side)))
        finalists.append(Finalist(f"finalist_{len(finalists):02}", name, candidate, high))
    return finalists, gates


def _kin(a: Candidate, b: Candidate) -> bool:
    return (a.kind, a.key, a.choice) == (b.kind, b.key, b.choice)


def _same(a: Candidate, b: Candidate) -> bool:
    return (
        a.key == b.key and a.choice == b.choice and np.array_equal(a.vectors.W_enc, b.vectors.W_enc)
    )


def _write_trial(
    folder: Path,
    plan: Plan,
    finalists: Sequence[Finalist],
    gates: Mapping[str, FeatureVectors],
    known: Sequence[Dictionary],
) -> Variants:
    features = [finalist.feature for finalist in finalists]
    vectors = {f.name: f.candidate.vectors for f in finalists}
    made = variants(
        features,
        vectors,
        _decoders(finalists, known),
        seed=plan.seed,
        num_controls=plan.num_controls,
    )
    for name, of in {f.gate: f.candidate for f in finalists}.items():
        features.append(gate_feature(name, of.key, of.choice))
    document = CatalogDocument(
        schema=SCHEMA,
        name="trial",
        version="1",
        model=authoring.fingerprint_of(plan.model),
        features=(*features, *made.features),
    )
    authoring.write_catalog(folder, document, {**vectors, **gates, **made.vectors})
    return made


def _decoders(finalists: Sequence[Finalist], known: Sequence[Dictionary]) -> dict[str, FloatArray]:
    """The decoder rows that a latent's controls are drawn from: those of its own dictionary."""
    rows: dict[str, FloatArray] = {}
    for finalist in finalists:
        for dictionary in known:
            source = finalist.candidate.source
            if dictionary.source.items() <= source.items() and dictionary.columns.W_dec is not None:
                rows[finalist.name] = dictionary.columns.W_dec
    return rows


def _side_damage(bench: Bench, side: Sequence[Case], turned: Turned, judge: Judge) -> float:
    unsteered = say(bench, side, judge)
    spec = turned.finalist.spec(turned.toward_positive, turned.strength)
    return effect(say(bench, side, judge, spec), unsteered).changed
