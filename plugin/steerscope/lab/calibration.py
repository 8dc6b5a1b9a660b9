"""From a signal's weighted sum ``z`` to a probability, and to thresholds with a bound on errors.

Serving evaluates the maps (``telemetry.signals.calibrated``); here they are only fitted.

Shapes: N cases, K knots, n negative names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold

from steerscope.catalog.model import Calibration, Isotonic, Platt, Threshold
from steerscope.errors import LabError
from steerscope.lab.resampling import Bools, Floats, Indices, Sample
from steerscope.telemetry.signals import calibrated

Method = Literal["logistic", "platt", "isotonic"]
"""``logistic`` keeps the weighted sum as the log-odds it is, and fits nothing."""

MAX_KNOTS: Final = 32
MAX_FOLDS: Final = 5
_WRONG_WAY: Final = "the signal points the wrong way: its positives have the lower z"


class TooFewNegativesError(LabError):
    """No threshold can keep the bound.

    Attributes:
        needed: how many negative names would do.
        present: how many there are.
    """

    def __init__(self, max_fpr: float, needed: int, present: int) -> None:
        super().__init__(f"max_fpr {max_fpr:g}: needs {needed} negative names, there are {present}")
        self.needed = needed
        self.present = present


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How one method does on names it was not fitted on, over all folds."""

    log_loss: float
    brier: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """A calibration, and what was weighed up for it."""

    calibration: Calibration
    held_out: dict[str, HeldOut]
    """Method -> losses; methods that could not be fitted in every fold are missing."""
    without_threshold: dict[str, str] = field(default_factory=dict)
    """Bound on the false positive rate -> why there is no threshold for it."""


def apply(calibration_map: Platt | Isotonic, z: npt.ArrayLike) -> Floats:
    """The probabilities [N] that serving gives."""
    return np.array([calibrated(calibration_map, float(v)) for v in np.asarray(z)], np.float64)


def fit_platt(z: npt.ArrayLike, labels: npt.ArrayLike) -> Platt:
    """Fit a logistic function, not regularised, to Platt's smoothed labels.

    The labels are ``(N+ + 1) / (N+ + 2)`` and ``1 / (N- + 2)`` rather than 1 and 0 (Platt 1999),
    so that the fit is finite also where z separates the classes.

    Raises:
        LabError: a class is missing, z does not vary, or z falls as positives get likelier.
    """
    z_N, labels_N = _checked(z, labels)
    num_positive, num_negative = int(labels_N.sum()), int((~labels_N).sum())
    soft_N = np.where(labels_N, (num_positive + 1) / (num_positive + 2), 1 / (num_negative + 2))
    mean, spread = float(z_N.mean()), float(z_N.std())
    # scikit-learn takes no soft labels: each case is a positive and a negative one, weighed.
    model = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(
        np.tile((z_N - mean) / spread, 2)[:, None],
        np.repeat([1, 0], len(z_N)),
        np.concatenate([soft_N, 1 - soft_N]),
    )
    scale = float(model.coef_[0, 0]) / spread
    if scale < 0:
        raise LabError(_WRONG_WAY)
    return Platt(scale=scale, offset=float(model.intercept_[0]) - scale * mean)


def fit_isotonic(z: npt.ArrayLike, labels: npt.ArrayLike) -> Isotonic:
    """Fit a map that never falls, with at most 32 knots.

    Knots are dropped where that moves the map least. Probabilities are kept at least
    ``1 / (N + 2)`` away from 0 and 1: N cases cannot rule anything out.

    Raises:
        LabError: as for ``fit_platt``.
    """
    z_N, labels_N = _checked(z, labels)
    if float(roc_auc_score(labels_N, z_N)) < 0.5:
        raise LabError(_WRONG_WAY)
    margin = 1 / (len(z_N) + 2)
    model = IsotonicRegression(y_min=margin, y_max=1 - margin).fit(z_N, labels_N)
    z_K, p_K = model.X_thresholds_.tolist(), model.y_thresholds_.tolist()
    while len(z_K) > MAX_KNOTS:
        drop = 1 + int(np.argmin(np.abs(_bends(np.array(z_K), np.array(p_K)))))
        del z_K[drop], p_K[drop]
    return Isotonic(z=tuple(z_K), p=tuple(p_K))


def conformal_threshold(
    scores_of_negatives: npt.ArrayLike, groups: npt.ArrayLike, max_fpr: float, seed: int
) -> Threshold:
    """A threshold that at most ``max_fpr`` of negatives score above: split conformal.

    The guarantee: draw a new name as the names here were drawn, and one of its negative cases;
    the chance that its score is strictly above the threshold is at most ``max_fpr``. It is
    marginal, on average over which names this calibration happened to see: for one calibration
    with n names the rate scatters around the bound, with standard deviation about
    ``sqrt(max_fpr / n)``. It rests on names being exchangeable (not on cases, which is why one
    case is drawn of each name), and says nothing about other populations. The scores must not
    have been fitted to these cases, save through a map that never falls, which keeps their order.

    The threshold is the ``ceil((n + 1)(1 - max_fpr))``-th smallest score. Whoever writes it down
    with fewer digits must round up.

    Raises:
        TooFewNegativesError: that many scores there are not.
        LabError: a bound not between 0 and 1, or scores that are not finite.
    """
    if not 0 < max_fpr < 1:
        raise LabError(f"max_fpr: {max_fpr} is not between 0 and 1")
    scores_N = np.asarray(scores_of_negatives, np.float64)
    if not np.isfinite(scores_N).all():
        raise LabError("scores of negatives: must all be finite")
    scores_n = np.sort(_one_of_each(scores_N, np.asarray(groups), seed))
    bound = Fraction(repr(float(max_fpr)))  # in floats (n + 1)(1 - 0.05) may miss a whole number
    rank = math.ceil((len(scores_n) + 1) * (1 - bound))
    if rank > len(scores_n):
        raise TooFewNegativesError(max_fpr, math.ceil(1 / bound) - 1, len(scores_n))
    return Threshold(score=float(scores_n[rank - 1]), max_fpr=max_fpr, num_negatives=len(scores_n))


def fit(
    z: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    method: Method | Literal["auto"] = "auto",
    max_fprs: Sequence[float] = (0.01, 0.05),
    split: str,
    seed: int,
) -> Fitted:
    """Fit a map and thresholds on its probabilities; cases without a z (NaN) are left out.

    ``auto`` takes the method of the lowest log loss on held-out names, the simpler one where they
    are equal, and Platt, which has two numbers to learn, where names are too few to hold any out.

    Raises:
        LabError: no method can be fitted.
    """
    sample = Sample.read(labels, groups, z=z)
    z_N, labels_N = sample.scores["z"], sample.labels
    _checked(z_N, labels_N)
    held_out = _held_out(sample, seed)
    chosen = _choose(held_out) if method == "auto" else method
    fitted = _FITS[chosen](z_N, labels_N)
    negatives_N = apply(fitted, z_N[~labels_N])
    thresholds: list[Threshold] = []
    missing: dict[str, str] = {}
    names_N = sample.groups[~labels_N]
    for max_fpr in max_fprs:
        try:
            thresholds.append(conformal_threshold(negatives_N, names_N, max_fpr, seed))
        except TooFewNegativesError as error:
            missing[f"{max_fpr:g}"] = str(error)
    calibration = Calibration(
        map=fitted, num_cases=len(z_N), split=split, thresholds=tuple(thresholds)
    )
    return Fitted(calibration, held_out, missing)


def _as_it_is(z: npt.ArrayLike, labels: npt.ArrayLike) -> Platt:
    return Platt(scale=1.0, offset=0.0)


_FITS: Final[Mapping[Method, Callable[[npt.ArrayLike, npt.ArrayLike], Platt | Isotonic]]] = {
    "logistic": _as_it_is,
    "platt": fit_platt,
    "isotonic": fit_isotonic,
}


def _checked(z: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Floats, Bools]:
    z_N, labels_N = np.asarray(z, np.float64), np.asarray(labels)
    if z_N.ndim != 1 or z_N.shape != labels_N.shape or labels_N.dtype != np.bool_:
        raise LabError("z and labels: need one z and one true or false per case")
    if not np.isfinite(z_N).all():
        raise LabError("z: must be finite")
    if not labels_N.any() or labels_N.all():
        raise LabError("labels: need a positive and a negative case")
    if z_N.min() == z_N.max():
        raise LabError("z: is the same for every case, so nothing can be learned from it")
    return z_N, labels_N


def _bends(z_K: Floats, p_K: Floats) -> Floats:
    """How far each inner knot lies from the line between its neighbours [K - 2]."""
    part = (z_K[1:-1] - z_K[:-2]) / (z_K[2:] - z_K[:-2])
    bends: Floats = p_K[1:-1] - (p_K[:-2] + part * (p_K[2:] - p_K[:-2]))
    return bends


def _one_of_each(scores_N: Floats, names_N: npt.NDArray[np.generic], seed: int) -> Floats:
    """One score of each name, each case as likely; the order of the cases does not matter."""
    order_N = np.lexsort((scores_N, names_N))
    _, starts_n, counts_n = np.unique(names_N[order_N], return_index=True, return_counts=True)
    drawn_n = np.random.default_rng(seed).integers(counts_n)
    picked: Floats = scores_N[order_N][starts_n + drawn_n]
    return picked


def _held_out(sample: Sample, seed: int) -> dict[str, HeldOut]:
    """Each method's losses on names left out of its fit, where it can be fitted in every fold."""
    z_N, labels_N = sample.scores["z"], sample.labels
    folds = list(_folds(sample, seed))
    losses: dict[str, HeldOut] = {}
    for name, fit_map in _FITS.items():
        p_N = np.full(len(z_N), np.nan)
        for train, test in folds:
            try:
                p_N[test] = apply(fit_map(z_N[train], labels_N[train]), z_N[test])
            except LabError:
                break  # then the method has no losses to compare
        if folds and not np.isnan(p_N).any():
            losses[name] = HeldOut(
                float(log_loss(labels_N, p_N)), float(brier_score_loss(labels_N, p_N))
            )
    return losses


def _folds(sample: Sample, seed: int) -> Iterator[tuple[Indices, Indices]]:
    num = min(MAX_FOLDS, sample.groups_of_smaller_class())
    if num >= 2:
        splitter = StratifiedGroupKFold(num, shuffle=True, random_state=seed)
        yield from splitter.split(sample.labels, sample.labels, sample.groups)


def _choose(held_out: Mapping[str, HeldOut]) -> Method:
    known = [method for method in _FITS if method in held_out]
    if "platt" not in known:
        return "platt"
    return min(known, key=lambda method: held_out[method].log_loss)
