"""Signals: a calibrated probability for each finished sequence, or none.

    score = sigmoid(bias + sum of weight * reduced activation)

A signal that needs a token which was not observed has no score: it is labelled
``unobserved``, never guessed.
"""

from __future__ import annotations

import math

from steerscope.catalog.model import Signal
from steerscope.telemetry.tracks import RequestTrack, Score

UNOBSERVED_LABEL = "unobserved"


def evaluate(signal: Signal, track: RequestTrack) -> Score:
    """Score one sequence, as far as it has been observed."""
    logit = signal.bias
    for term in signal.terms:
        reduced = track.reduce(term.feature, term.reduce)
        if reduced is None:
            return Score(signal.name, None, UNOBSERVED_LABEL)
        logit += term.weight * reduced
    score = sigmoid(logit)
    return Score(signal.name, score, label_of(signal, score))


def sigmoid(logit: float) -> float:
    """The logistic function, without overflow."""
    return 0.5 * (1.0 + math.tanh(0.5 * logit))


def label_of(signal: Signal, score: float) -> str:
    """The first band that the score is below; the last band has no bound."""
    return next(
        label.label for label in signal.labels if label.below is None or score < label.below
    )
