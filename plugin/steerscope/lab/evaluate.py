"""``lab evaluate``: what the catalog's signals and policies are worth on labelled cases.

Signals are scored by the hub, as in production, and judged beside the confidences that every team
already has: token log-probabilities, the first token's entropy, what the model says of itself.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from steerscope.catalog import store
from steerscope.catalog.model import Signal, Target
from steerscope.catalog.store import Catalog, SiteKey
from steerscope.catalog.tensors import FloatArray
from steerscope.errors import LabError
from steerscope.lab import cases as case_files
from steerscope.lab import doses
from steerscope.lab.bench import Bench
from steerscope.lab.cases import Case
from steerscope.lab.causal import NUM_CONTROLS
from steerscope.lab.judging import Judge
from steerscope.lab.proportions import wilson
from steerscope.lab.sheet import Row, Scored, applying, fill
from steerscope.lab.statistics import (
    PairedDifference,
    ScoreReport,
    evaluate_scores,
    paired_difference,
)

SCHEMA = "steerscope.evaluation/v1"
DOSES = (0.25, 0.5, 0.75, 1.0, 1.5)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of an evaluation."""

    model: Path
    catalog: Path
    cases: Sequence[Case]
    """Those of one split; see ``split_digest``."""
    all_cases: Sequence[Case]
    """The whole file, for the digest."""
    policies: Sequence[str] = ()
    doses: Sequence[float] = DOSES
    num_controls: int = NUM_CONTROLS
    max_cases_per_group: int = 60
    """For steering, which asks every case under every variant."""
    side_groups: Sequence[str] = ()
    """Groups that steering should leave alone."""
    self_report: str = ""
    max_tokens: int = 64
    seed: int = 0
    decoders: Mapping[SiteKey, FloatArray] = field(default_factory=dict)
    """By site: rows [K, D] of a dictionary that controls are drawn from; else they are Gaussian."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """A baseline on the very cases of a signal."""

    score: ScoreReport
    against: PairedDifference
    """The signal's AUROC minus this one's, on the same resamples."""


@dataclass(frozen=True, slots=True)
class SignalReport:
    """A signal on the cases that its target applies to."""

    predicts: Target
    score: ScoreReport
    baselines: Mapping[str, BaselineReport]
    by_group: Mapping[str, float]
    """Mean probability in each population, whatever the target applies to."""


@dataclass(frozen=True, slots=True)
class Share:
    """A share with its 95% Wilson interval; cases of one name are taken for independent."""

    share: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The whole report, as written to JSON."""

    schema: str
    model: str
    catalog: str
    catalog_version: str
    catalog_digest: str
    split_digest: str
    split_counts: Mapping[str, int]
    num_cases: int
    outcomes: Mapping[str, Mapping[str, Share]]
    """By group, then by outcome."""
    signals: Mapping[str, SignalReport]
    steering: Mapping[str, doses.PolicyReport] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def evaluate(plan: Plan, judge: Judge, told: Callable[[str], None]) -> tuple[Evaluation, list[Row]]:
    """Ask, score and steer; return the report and the sheet behind it."""
    catalog = store.load(plan.catalog)
    groups = {case.group for case in plan.cases}
    if stray := [group for group in plan.side_groups if group not in groups]:
        raise LabError(f"no case of the split is in group {stray[0]!r}")
    signals = [signal for signal in catalog.signals if signal.predicts is not None]
    if not signals and not plan.policies:
        raise LabError("no signal of the catalog says what it predicts, and no policy was named")
    with tempfile.TemporaryDirectory() as folder:
        derived = Path(folder) / "derived"
        made = doses.write_derived_catalog(derived, catalog, plan)
        with Bench(
            plan.model, derived, max_tokens=plan.max_tokens, engine_args=plan.engine_args
        ) as bench:
            told(f"asking {len(plan.cases)} cases")
            rows = fill(bench, catalog, plan.cases, judge, plan.self_report)
            steering = {
                name: doses.steer(bench, catalog, name, plan, judge, made, told)
                for name in plan.policies
            }
    told("resampling")
    reports = {signal.name: judged(signal, rows, plan.seed) for signal in signals}
    return _evaluation(plan, catalog, rows, reports, steering), rows


def judged(signal: Signal, rows: Sequence[Row], seed: int) -> SignalReport:
    """One signal beside every baseline."""
    assert signal.predicts is not None
    scored = applying(rows, signal.predicts)
    if not scored.rows:
        raise LabError(f"signal {signal.name!r}: no case has the label {signal.predicts.label!r}")
    p_N = scored.probability(signal.name)
    score = evaluate_scores(p_N, scored.labels, scored.names, probabilities=True, seed=seed)
    return SignalReport(
        predicts=signal.predicts,
        score=score,
        baselines={
            name: _baseline(scored, signal, name, seed) for name in scored.rows[0].baselines
        },
        by_group=_by_group(signal.name, rows),
    )


def _baseline(scored: Scored, signal: Signal, name: str, seed: int) -> BaselineReport:
    assert signal.predicts is not None
    ours, theirs = scored.probability(signal.name), scored.baseline(name, signal.predicts)
    labels, names = scored.labels, scored.names
    return BaselineReport(
        evaluate_scores(theirs, labels, names, probabilities=False, seed=seed),
        paired_difference(ours, theirs, labels, names, seed=seed),
    )


def _by_group(signal: str, rows: Sequence[Row]) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for row in rows:
        if not np.isnan(row.probability[signal]):
            groups.setdefault(row.case.group or "all", []).append(row.probability[signal])
    return {group: float(np.mean(values)) for group, values in sorted(groups.items())}


def _outcomes(rows: Sequence[Row]) -> dict[str, dict[str, Share]]:
    found: dict[str, Counter[str]] = {}
    for row in rows:
        found.setdefault(row.case.group or "all", Counter())[row.outcome.value] += 1
    return {
        group: {outcome: _share(count, sum(counts.values())) for outcome, count in counts.items()}
        for group, counts in sorted(found.items())
    }


def _share(count: int, n: int) -> Share:
    interval = wilson(count, n)
    return Share(count / n, interval.low, interval.high, n)


def _evaluation(
    plan: Plan,
    catalog: Catalog,
    rows: Sequence[Row],
    signals: Mapping[str, SignalReport],
    steering: Mapping[str, doses.PolicyReport],
) -> Evaluation:
    document = catalog.document
    return Evaluation(
        schema=SCHEMA,
        model=document.model.architecture,
        catalog=document.name,
        catalog_version=document.version,
        catalog_digest=catalog.digest,
        split_digest=case_files.digest(plan.all_cases),
        split_counts=case_files.counts(plan.all_cases),
        num_cases=len(rows),
        outcomes=_outcomes(rows),
        signals=signals,
        steering=steering,
        notes=_notes(plan, signals),
    )


def _notes(plan: Plan, signals: Mapping[str, SignalReport]) -> tuple[str, ...]:
    notes = []
    for name, report in signals.items():
        own = report.baselines.get("self_report")
        if own is not None and own.score.num_cases == 0:
            notes.append(f"{name}: the model gave no number when asked how sure it is")
    if not plan.self_report:
        notes.append("self-reported confidence was not asked for (--self-report)")
    return tuple(dict.fromkeys(notes))


def requirement_tree(evaluation: Evaluation) -> dict[str, Any]:
    """What ``--require`` looks into: signals by name, their metrics directly under them."""
    tree: dict[str, Any] = msgspec.to_builtins(evaluation)
    flat: dict[str, Any] = {"steering": tree["steering"], "outcomes": tree["outcomes"]}
    for name, report in tree["signals"].items():
        flat[name] = {**report.pop("score"), **report}
    return flat
