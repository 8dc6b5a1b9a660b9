"""``lab calibrate``: make weighted sums probabilities, pick thresholds, remember what is normal.

The map and the thresholds are fitted on one split and judged on another, before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from steerscope.catalog import authoring, store
from steerscope.catalog.model import Baseline, Calibration, Label, Signal
from steerscope.catalog.store import Catalog
from steerscope.errors import LabError
from steerscope.lab import calibration as calibrations
from steerscope.lab import cases as case_files
from steerscope.lab.bench import Bench
from steerscope.lab.calibration import HeldOut
from steerscope.lab.cases import Case, Split
from steerscope.lab.drift import baseline
from steerscope.lab.judging import Judge
from steerscope.lab.sheet import Row, Scored, applying, fill
from steerscope.lab.statistics import ScoreReport, evaluate_scores
from steerscope.telemetry.tracks import RequestTrack

Phase = Literal["prompt", "generation"]

LOW, ELEVATED, HIGH = "low", "elevated", "high"


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a calibration."""

    model: Path
    catalog: Path
    cases: Sequence[Case]
    fit_split: Split = "dev"
    judge_split: Split = "test"
    method: Literal["logistic", "platt", "isotonic", "auto"] = "auto"
    max_fprs: Sequence[float] = (0.01, 0.05)
    relabel: Sequence[str] = ()
    """Signals whose bands become low, elevated and high, at their thresholds."""
    max_tokens: int = 64
    seed: int = 0
    engine_args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fitted:
    """One signal before and after, on cases that the map never saw."""

    calibration: Calibration
    held_out: Mapping[str, HeldOut]
    """By method: losses on names left out of the fit."""
    without_threshold: Mapping[str, str]
    """By promised bound: why there is no threshold for it."""
    before: ScoreReport
    after: ScoreReport
    fpr_at_thresholds: Mapping[str, float]
    """By the promised bound: the share of judged negatives that score above the threshold."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """All signals, and the catalog that holds them."""

    signals: Mapping[str, Fitted]
    num_baselines: int


def calibrate(plan: Plan, out: Path, judge: Judge, told: Callable[[str], None]) -> Calibrated:
    """Fit every signal that says what it predicts; write the catalog to ``out``."""
    catalog = store.load(plan.catalog)
    wanted = [signal for signal in catalog.signals if signal.predicts is not None]
    if not wanted:
        raise LabError("no signal of the catalog says what it predicts")
    splits = [case_files.in_split(plan.cases, s) for s in (plan.fit_split, plan.judge_split)]
    case_files.check_held_out(plan.cases)
    seen = _Activations(catalog)
    with Bench(
        plan.model, plan.catalog, max_tokens=plan.max_tokens, engine_args=plan.engine_args
    ) as bench:
        told(f"asking {sum(map(len, splits))} cases")
        fitting = fill(bench, catalog, splits[0], judge, visit=seen.add)
        judging = fill(bench, catalog, splits[1], judge)
    told("fitting")
    fitted = {signal.name: _fitted(signal, fitting, judging, plan) for signal in wanted}
    baselines = seen.baselines()
    _write(catalog, fitted, baselines, plan, out)
    return Calibrated(fitted, len(baselines))


def _fitted(signal: Signal, fitting: Sequence[Row], judging: Sequence[Row], plan: Plan) -> Fitted:
    assert signal.predicts is not None
    learn, judge = (applying(rows, signal.predicts) for rows in (fitting, judging))
    found = calibrations.fit(
        learn.z(signal.name),
        learn.labels,
        learn.names,
        method=plan.method,
        max_fprs=plan.max_fprs,
        split=f"{plan.fit_split} {case_files.digest(plan.cases)}",
        seed=plan.seed,
    )
    calibration = found.calibration
    z_N = judge.z(signal.name)
    scored_N = ~np.isnan(z_N)
    after_N = np.full(len(z_N), np.nan)
    after_N[scored_N] = calibrations.apply(calibration.map, z_N[scored_N])
    negatives_n = after_N[scored_N & ~judge.labels]
    return Fitted(
        calibration,
        found.held_out,
        found.without_threshold,
        before=_judged(judge, judge.probability(signal.name), plan.seed),
        after=_judged(judge, after_N, plan.seed),
        fpr_at_thresholds={
            f"{t.max_fpr:g}": float(np.mean(negatives_n > t.score)) for t in calibration.thresholds
        },
    )


def _judged(scored: Scored, p_N: np.ndarray[Any, np.dtype[np.float64]], seed: int) -> ScoreReport:
    return evaluate_scores(p_N, scored.labels, scored.names, probabilities=True, seed=seed)


class _Activations:
    """Every activation of the fitting cases, by feature and phase."""

    def __init__(self, catalog: Catalog) -> None:
        self._names = [f.name for features in catalog.sites.values() for f in features]
        self._seen: dict[Phase, list[np.ndarray[Any, np.dtype[np.float32]]]] = {
            "prompt": [],
            "generation": [],
        }

    def add(self, track: RequestTrack) -> None:
        acts_NF = track.activations()
        split = track.start.num_prompt_tokens
        self._seen["prompt"].append(acts_NF[:split])
        self._seen["generation"].append(acts_NF[split:])

    def baselines(self) -> list[Baseline]:
        """One of every feature in every phase that was seen."""
        made = []
        for phase, parts in self._seen.items():
            acts_NF = np.concatenate(parts)
            if len(acts_NF):
                made += [baseline(acts_NF[:, i], n, phase) for i, n in enumerate(self._names)]
        return made


def _write(
    catalog: Catalog,
    fitted: Mapping[str, Fitted],
    baselines: Sequence[Baseline],
    plan: Plan,
    out: Path,
) -> None:
    signals = tuple(
        _calibrated_signal(signal, fitted.get(signal.name), plan) for signal in catalog.signals
    )
    document = msgspec.structs.replace(
        catalog.document, signals=signals, baselines=tuple(baselines)
    )
    dictionaries = {
        d.name: authoring.stored_encoder(catalog, d.name) for d in document.dictionaries
    }
    authoring.write_catalog(out, document, catalog.vectors, dictionaries, overwrite=True)


def _calibrated_signal(signal: Signal, fitted: Fitted | None, plan: Plan) -> Signal:
    if fitted is None:
        return signal
    labels = signal.labels
    if signal.name in plan.relabel:
        labels = _bands(signal.name, fitted.calibration)
    return msgspec.structs.replace(signal, calibration=fitted.calibration, labels=labels)


def _bands(name: str, calibration: Calibration) -> tuple[Label, ...]:
    """low, elevated above the loosest threshold, high above the strictest."""
    bounds = sorted({t.score for t in calibration.thresholds})
    if not bounds:
        raise LabError(f"signal {name!r}: too few negatives for any threshold; it keeps its bands")
    names = (LOW, HIGH) if len(bounds) == 1 else (LOW, ELEVATED, HIGH)
    cuts = (bounds[0], bounds[-1])[: len(names) - 1]
    # A score on the threshold is not above it; bands say "below".
    uppers = [float(np.nextafter(cut, np.inf)) for cut in cuts]
    return tuple(
        Label(label=label, below=below) for label, below in zip(names, [*uppers, None], strict=True)
    )
