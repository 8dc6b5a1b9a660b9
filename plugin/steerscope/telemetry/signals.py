"""Signals: a calibrated probability for each finished sequence, or none.

    z     = bias + sum of weight * reduced activation
    score = map(z)

The lab fits the map on the ``z`` of ``weighted_sum``, and the hub serves through the very
same functions. A signal that needs a token which was not observed has no score, and neither
has one that looks for a span where the prompt has none: they are labelled, never guessed.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import assert_never

from steerscope.catalog.model import Isotonic, Platt, Signal
from steerscope.telemetry.reductions import Missing, reduce
from steerscope.telemetry.tracks import RequestTrack, Score


def evaluate(signal: Signal, track: RequestTrack) -> Score:
    """Score one sequence, as far as it has been observed."""
    z = weighted_sum(signal, track)
    if isinstance(z, Missing):
        return Score(signal.name, None, z.value)
    score = calibrated(signal.calibration.map if signal.calibration else None, z)
    return Score(signal.name, score, label_of(signal, score))


def weighted_sum(signal: Signal, track: RequestTrack) -> float | Missing:
    """The signal's ``z``, or why there is none.

    One term whose span is nowhere in the prompt settles it, whatever else was not observed.
    """
    z, missing = signal.bias, None
    for term in signal.terms:
        reduced = reduce(term, track)
        if reduced is Missing.NOT_APPLICABLE:
            return reduced
        if isinstance(reduced, Missing):
            missing = reduced
        else:
            z += term.weight * reduced
    return z if missing is None else missing


def calibrated(calibration_map: Platt | Isotonic | None, z: float) -> float:
    """The probability for ``z``; through the logistic function where there is no map."""
    match calibration_map:
        case None:
            return sigmoid(z)
        case Platt(scale=scale, offset=offset):
            return sigmoid(scale * z + offset)
        case Isotonic():
            return _interpolated(calibration_map, z)
        case _:
            assert_never(calibration_map)


def sigmoid(logit: float) -> float:
    """The logistic function, without overflow and exact in both tails."""
    if logit >= 0.0:
        return 1.0 / (1.0 + math.exp(-logit))
    odds = math.exp(logit)
    return odds / (1.0 + odds)


def label_of(signal: Signal, score: float) -> str:
    """The first band that the score is below; the last band has no bound."""
    return next(
        label.label for label in signal.labels if label.below is None or score < label.below
    )


def _interpolated(knots: Isotonic, z: float) -> float:
    above = bisect_right(knots.z, z)
    if above in (0, len(knots.z)) or z == knots.z[above - 1]:
        return knots.p[max(above - 1, 0)]
    # Halved, so that the distance of two finite numbers is finite, too.
    low, high, at = knots.z[above - 1] / 2, knots.z[above] / 2, z / 2
    p, next_p = knots.p[above - 1], knots.p[above]
    return min(p + (next_p - p) * (at - low) / (high - low), next_p)
