"""Is every signal well formed: its features there, its numbers finite, its bands in order?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from steerscope.catalog.model import (
    Baseline,
    Calibration,
    CatalogDocument,
    Feature,
    Isotonic,
    Reduction,
    Signal,
    Term,
)
from steerscope.errors import CatalogError

ON_ENTITY = frozenset(r for r in Reduction if "entity" in r.value)
"""Reductions that look at a span of the prompt."""

RESERVED_LABELS = frozenset({"unobserved", "not_applicable"})
"""What a sequence without a score is labelled."""


def check(document: CatalogDocument) -> None:
    """Raise ``CatalogError`` naming the signal or baseline and what is wrong with it."""
    features = {feature.name: feature for feature in document.features}
    for signal in document.signals:
        try:
            _check_signal(signal, features)
        except ValueError as error:
            raise CatalogError(f"signal {signal.name!r}: {error}") from None
    for baseline in document.baselines:
        try:
            _check_baseline(baseline, features)
        except ValueError as error:
            raise CatalogError(f"baseline of {baseline.feature!r}: {error}") from None


def _check_signal(signal: Signal, features: dict[str, Feature]) -> None:
    _check_finite(_numbers(signal))
    for i, term in enumerate(signal.terms):
        _check_term(f"terms[{i}]", term, features)
    _check_labels(signal)
    if signal.calibration is not None:
        _check_calibration(signal.calibration)


def _check_term(where: str, term: Term, features: dict[str, Feature]) -> None:
    if term.feature not in features:
        raise ValueError(f"{where}.feature: no feature {term.feature!r} in the catalog")
    if (term.reduce in ON_ENTITY) != (term.span is not None):
        raise ValueError(f"{where}.span: needed by reductions over an entity, and only by them")
    if term.span is None:
        return
    span = features.get(term.span.feature)
    if span is None:
        raise ValueError(f"{where}.span.feature: no feature {term.span.feature!r} in the catalog")
    here = features[term.feature]
    if (span.layer, span.site) != (here.layer, here.site):
        raise ValueError(f"{where}.span.feature: {span.name!r} is not at the site of {here.name!r}")


def _check_labels(signal: Signal) -> None:
    if not signal.labels:
        raise ValueError("labels: must not be empty")
    bounds = [label.below for label in signal.labels]
    if bounds[-1] is not None or None in bounds[:-1]:
        raise ValueError("labels: all but the last need 'below', the last has none")
    if not _ascend([b for b in bounds if b is not None]):
        raise ValueError("labels: bounds must ascend")
    for label in signal.labels:
        if label.label in RESERVED_LABELS:
            raise ValueError(f"labels: {label.label!r} is reserved")


def _check_calibration(calibration: Calibration) -> None:
    if isinstance(calibration.map, Isotonic):
        z, p = calibration.map.z, calibration.map.p
        if not z or len(z) != len(p):
            raise ValueError("calibration.map: z and p need the same length, at least 1")
        if not _ascend(z) or list(p) != sorted(p) or not all(0 <= value <= 1 for value in p):
            raise ValueError("calibration.map: z must ascend, p must not descend, 0 <= p <= 1")
    elif calibration.map.scale < 0:
        raise ValueError("calibration.map.scale: a calibration must not turn the signal around")
    for i, threshold in enumerate(calibration.thresholds):
        if not 0 < threshold.max_fpr < 1:
            raise ValueError(f"calibration.thresholds[{i}].max_fpr: must lie between 0 and 1")


def _check_baseline(baseline: Baseline, features: dict[str, Feature]) -> None:
    if baseline.feature not in features:
        raise ValueError("no such feature in the catalog")
    _check_finite([*baseline.edges, *baseline.shares])
    if not _ascend(baseline.edges) or len(baseline.shares) != len(baseline.edges) + 1:
        raise ValueError("edges must ascend, with one more share than edges")
    if min(baseline.shares) < 0 or not math.isclose(sum(baseline.shares), 1.0, abs_tol=1e-3):
        raise ValueError("shares must not be negative and must sum to 1")


def _check_finite(numbers: Sequence[float] | Iterator[float]) -> None:
    for number in numbers:
        if not math.isfinite(number):
            raise ValueError(f"{number} is not a finite number")


def _numbers(signal: Signal) -> Iterator[float]:
    yield signal.bias
    yield from (term.weight for term in signal.terms)
    yield from (term.span.above for term in signal.terms if term.span is not None)
    yield from (label.below for label in signal.labels if label.below is not None)
    if signal.calibration is not None:
        yield from _map_numbers(signal.calibration)
        yield from (threshold.score for threshold in signal.calibration.thresholds)


def _map_numbers(calibration: Calibration) -> Iterator[float]:
    if isinstance(calibration.map, Isotonic):
        yield from (*calibration.map.z, *calibration.map.p)
    else:
        yield from (calibration.map.scale, calibration.map.offset)


def _ascend(numbers: Sequence[float]) -> bool:
    return all(a < b for a, b in pairwise(numbers))
