"""How well a score tells cases apart, with 95% intervals over resamples by name.

An interval is the 2.5th to the 97.5th percentile over resamples of whole groups (see
``lab.resampling``), widened where that would flatter: it holds its own value; where no resample
differs from a perfect (or worthless) value it is Wilson's, for as many trials as the smaller
class has names; and it is the whole range if a class has only one name.

Shapes: N cases with a score, B resamples, b resamples at a time, E bins of probability,
P points of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn.metrics import average_precision_score, roc_auc_score

from steerscope.errors import LabError
from steerscope.lab.proportions import wilson
from steerscope.lab.resampling import Bools, Floats, Indices, Ranking, Resamples, Sample

NUM_RESAMPLES: Final = 2000
NUM_BINS: Final = 15
"""Bins of probability, of the ECE and of the reliability diagram."""

_FPR_BOUNDS: Final = {"tpr_at_1pct_fpr": 0.01, "tpr_at_5pct_fpr": 0.05}
_OF_RANKS: Final = ("auroc", "auprc", *_FPR_BOUNDS)
_OF_PROBABILITIES: Final = ("brier", "ece")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Sample of similar probability: what was predicted, and what came true.

    The interval is Wilson's. It takes cases for independent, so it is too narrow where a name
    has several: it is for the picture.
    """

    mean_predicted: float
    observed: float
    low: float
    high: float
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreReport:
    """What a score is worth on cases with known labels.

    ``auroc``: chance that a positive scores above a negative, ties counting half.
    ``auprc``: average precision; a worthless score has the ``prevalence``.
    ``tpr_at_1pct_fpr``: the highest true positive rate over all thresholds (score at or above)
    whose false positive rate is at most 1%. Nothing is interpolated, so that fewer than 100
    negatives allow no false positive at all. Likewise 5%.
    ``brier``: mean of (p - label)².
    ``ece``: sum over bins of their share times ``|mean p - mean label|``, in 15 bins of equal
    mass; equal probabilities share a bin. Chance alone keeps it above 0, in resamples more than
    in the sample, so that its interval leans upwards.

    A metric that is not defined is None, and ``undefined`` says why.
    """

    num_cases: int
    """Sample with a score: everything below is of these."""
    num_without_score: int
    num_positive: int
    num_groups: int
    prevalence: float | None
    auroc: Estimate | None
    auprc: Estimate | None
    tpr_at_1pct_fpr: Estimate | None
    tpr_at_5pct_fpr: Estimate | None
    brier: Estimate | None
    ece: Estimate | None
    reliability: tuple[ReliabilityBin, ...]
    num_resamples: int
    num_redrawn: int
    """Resamples that lacked a class and were drawn again."""
    undefined: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedDifference:
    """How far a signal's AUROC exceeds a baseline's, on the same cases and resamples.

    Two scores that are both perfect on every resample differ by 0, with no width: that many
    cases cannot tell them apart.
    """

    num_cases: int
    """Sample that both have scored."""
    num_without_score: int
    signal: float | None
    baseline: float | None
    difference: Estimate | None
    undefined: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RocBand:
    """``tpr[i]``: the highest true positive rate at a false positive rate of at most ``fpr[i]``."""

    fpr: tuple[float, ...]
    tpr: tuple[Estimate, ...]


def evaluate_scores(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    probabilities: bool,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> ScoreReport:
    """Judge a score [N] by labels [N]; NaN is no score: left out and counted.

    The report depends on the cases and the seed, not on the order of the cases.

    Raises:
        LabError: the arguments do not fit together, or a probability is outside 0 to 1.
    """
    sample = Sample.read(labels, groups, scores=scores)
    scores_N = sample.scores["scores"]
    bins = _Bins.of(scores_N, sample.labels) if probabilities else None
    resamples = Resamples.draw(sample, num_resamples, seed)
    undefined = _undefined(sample, probabilities)
    estimates = _estimates(sample, bins, resamples)
    num_cases, num_positive = len(scores_N), int(sample.labels.sum())
    return ScoreReport(
        num_cases=num_cases,
        num_without_score=sample.num_without_score,
        num_positive=num_positive,
        num_groups=sample.num_groups,
        prevalence=num_positive / num_cases if num_cases else None,
        reliability=bins.reliability() if bins else (),
        num_resamples=len(resamples.counts_BG),
        num_redrawn=resamples.num_redrawn,
        undefined=undefined,
        **{name: estimates.get(name) for name in (*_OF_RANKS, *_OF_PROBABILITIES)},
    )


def paired_difference(
    signal: npt.ArrayLike,
    baseline: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
) -> PairedDifference:
    """Compare the AUROCs of two scores [N] on the cases that both have scored."""
    sample = Sample.read(labels, groups, signal=signal, baseline=baseline)
    num_cases, unscored = len(sample.labels), sample.num_without_score
    if (reason := sample.missing_class()) is not None:
        return PairedDifference(
            num_cases=num_cases,
            num_without_score=unscored,
            signal=None,
            baseline=None,
            difference=None,
            undefined=dict.fromkeys(("signal", "baseline", "difference"), reason),
        )
    ours, theirs = (float(roc_auc_score(sample.labels, s)) for s in sample.scores.values())
    return PairedDifference(
        num_cases=num_cases,
        num_without_score=unscored,
        signal=ours,
        baseline=theirs,
        difference=_difference(sample, ours - theirs, Resamples.draw(sample, num_resamples, seed)),
    )


def roc_band(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    num_points: int = 101,
) -> RocBand:
    """The ROC curve at evenly spaced false positive rates, with pointwise percentile intervals.

    Those have no width where no resample misses a positive: see the AUROC's interval instead.

    Raises:
        LabError: the arguments do not fit together, or a class is missing.
    """
    sample = Sample.read(labels, groups, scores=scores)
    if (reason := sample.missing_class()) is not None:
        raise LabError(f"no ROC curve: {reason}")
    ranking = Ranking(sample.scores["scores"], sample.labels)
    fpr_P = np.linspace(0.0, 1.0, num_points)

    def tpr_bP(weights_bN: Floats) -> Floats:
        curves = ranking.curves(weights_bN)
        return np.stack([curves.tpr_at(bound) for bound in fpr_P], axis=1)

    values_P = tpr_bP(sample.ones())[0]
    weights = Resamples.draw(sample, num_resamples, seed).weights(sample)
    resampled_BP = np.concatenate([tpr_bP(weights_bN) for weights_bN in weights])
    low_P, high_P = np.percentile(resampled_BP, (2.5, 97.5), axis=0)
    if sample.groups_of_smaller_class() < 2:
        low_P, high_P = np.zeros(num_points), np.ones(num_points)
    bounds = np.stack([values_P, np.minimum(low_P, values_P), np.maximum(high_P, values_P)], 1)
    return RocBand(tuple(fpr_P.tolist()), tuple(Estimate(*point) for point in bounds.tolist()))


@dataclass(frozen=True, slots=True)
class _Bins:
    """Probabilities in bins of equal mass."""

    p_N: Floats
    labels_N: Bools
    of_N: Indices
    """Which bin a case is in: by how many cases have a lower probability."""

    @classmethod
    def of(cls, p_N: Floats, labels_N: Bools) -> _Bins:
        if ((p_N < 0) | (p_N > 1)).any():
            raise LabError("scores: a probability is outside 0 to 1")
        num_lower_N = np.searchsorted(np.sort(p_N), p_N, side="left")
        return cls(p_N, labels_N, num_lower_N * NUM_BINS // max(1, len(p_N)))

    def brier(self, weights_bN: Floats) -> Floats:
        """Return the Brier score [b] of weighed sample."""
        brier_b: Floats = weights_bN @ (self.p_N - self.labels_N) ** 2 / weights_bN.sum(axis=1)
        return brier_b

    def ece(self, weights_bN: Floats) -> Floats:
        """Return the ECE [b] of weighed cases; the bins stay those of the sample."""
        gap_NE = np.zeros((len(self.p_N), NUM_BINS))
        gap_NE[np.arange(len(self.p_N)), self.of_N] = self.p_N - self.labels_N
        ece_b: Floats = np.abs(weights_bN @ gap_NE).sum(axis=1) / weights_bN.sum(axis=1)
        return ece_b

    def reliability(self) -> tuple[ReliabilityBin, ...]:
        """Return the bins that hold a case, by rising probability."""
        return tuple(self._bin(self.of_N == e) for e in np.unique(self.of_N))

    def _bin(self, inside_N: Bools) -> ReliabilityBin:
        true, count = int(self.labels_N[inside_N].sum()), int(inside_N.sum())
        mean = float(self.p_N[inside_N].mean())
        return ReliabilityBin(mean, true / count, *wilson(true, count), count)


def _undefined(sample: Sample, probabilities: bool) -> dict[str, str]:
    reasons: dict[str, str] = {}
    if (reason := sample.missing_class()) is not None:
        reasons |= dict.fromkeys(_OF_RANKS, reason)
    if not probabilities:
        reasons |= dict.fromkeys(_OF_PROBABILITIES, "the score is not a probability")
    elif reason is not None and not len(sample.labels):
        reasons |= dict.fromkeys(_OF_PROBABILITIES, reason)
    return reasons


@dataclass(frozen=True, slots=True)
class _Metrics:
    """What is defined of a sample: metrics of ranks, of probabilities, both or none."""

    ranking: Ranking | None
    bins: _Bins | None

    def of(self, weights_bN: Floats) -> dict[str, Floats]:
        """Return each metric [b] of weighed sample."""
        found: dict[str, Floats] = {}
        if self.ranking is not None:
            curves = self.ranking.curves(weights_bN)
            found |= {"auroc": curves.auroc(), "auprc": curves.auprc()}
            found |= {name: curves.tpr_at(bound) for name, bound in _FPR_BOUNDS.items()}
        if self.bins is not None:
            found |= {"brier": self.bins.brier(weights_bN), "ece": self.bins.ece(weights_bN)}
        return found

    def values(self, sample: Sample) -> dict[str, float]:
        """Return each metric of the sample itself: scikit-learn's word where it has one.

        It weighs one resample at a time, too slow for thousands; the tests hold both to be equal.
        """
        (scores_N,) = sample.scores.values()
        values = {name: float(m[0]) for name, m in self.of(sample.ones()).items()}
        if self.ranking is not None:
            values["auroc"] = float(roc_auc_score(sample.labels, scores_N))
            values["auprc"] = float(average_precision_score(sample.labels, scores_N))
        return values


def _estimates(sample: Sample, bins: _Bins | None, resamples: Resamples) -> dict[str, Estimate]:
    (scores_N,) = sample.scores.values()
    if not len(scores_N):
        return {}
    comparable = sample.missing_class() is None
    metrics = _Metrics(Ranking(scores_N, sample.labels) if comparable else None, bins)
    chunks = [metrics.of(weights_bN) for weights_bN in resamples.weights(sample)]
    num_names = dict.fromkeys(_OF_RANKS, sample.groups_of_smaller_class())
    return {
        name: _estimate(
            value,
            np.concatenate([chunk[name] for chunk in chunks]),
            num_names.get(name, sample.num_groups),
        )
        for name, value in metrics.values(sample).items()
    }


def _difference(sample: Sample, value: float, resamples: Resamples) -> Estimate:
    ours, theirs = (Ranking(scores_N, sample.labels) for scores_N in sample.scores.values())
    resampled_B = np.concatenate(
        [
            ours.curves(w_bN).auroc() - theirs.curves(w_bN).auroc()
            for w_bN in resamples.weights(sample)
        ]
    )
    if sample.groups_of_smaller_class() < 2:
        return Estimate(value, -1.0, 1.0)
    low, high = np.percentile(resampled_B, (2.5, 97.5))
    return Estimate(value, min(float(low), value), max(float(high), value))


def _estimate(value: float, resampled_B: Floats, num_names: int) -> Estimate:
    if num_names < 2:
        return Estimate(value, 0.0, 1.0)
    low, high = np.percentile(resampled_B, (2.5, 97.5))
    if low == high:  # the resamples cannot say how near to the edge the truth is
        low = min(low, wilson(num_names, num_names).low) if value >= 1 else low
        high = max(high, wilson(0, num_names).high) if value <= 0 else high
    return Estimate(value, min(float(low), value), max(float(high), value))
