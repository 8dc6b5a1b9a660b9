"""One number from one feature of one sequence, or why there is none.

Shapes: n tokens that a reduction looks at.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from steerscope.catalog.model import Reduction, Span, Term
from steerscope.telemetry.columns import BoolArray, FloatArray
from steerscope.telemetry.tracks import RequestTrack


class Missing(enum.StrEnum):
    """Why a sequence has no number; also the label of a signal without a score."""

    UNOBSERVED = "unobserved"
    """A token that is needed was not observed."""
    NOT_APPLICABLE = "not_applicable"
    """The whole prompt was observed, and none of its tokens is in the span."""


def _highest(values_n: FloatArray) -> float:
    return float(np.maximum.reduce(values_n))


def _lowest(values_n: FloatArray) -> float:
    return float(np.minimum.reduce(values_n))


def _mean(values_n: FloatArray) -> float:
    return float(np.add.reduce(values_n, dtype=np.float64)) / len(values_n)


def _last(values_n: FloatArray) -> float:
    return float(values_n[-1])


_FOLDS: Mapping[Reduction, Callable[[FloatArray], float]] = MappingProxyType(
    {
        Reduction.LAST_PROMPT_TOKEN: _last,
        Reduction.MAX_PROMPT: _highest,
        Reduction.MEAN_PROMPT: _mean,
        Reduction.MAX_GENERATION: _highest,
        Reduction.MIN_GENERATION: _lowest,
        Reduction.MEAN_GENERATION: _mean,
        Reduction.MAX_FIRST_GENERATED: _highest,
        Reduction.MIN_FIRST_GENERATED: _lowest,
        Reduction.MEAN_FIRST_GENERATED: _mean,
        Reduction.LAST_ENTITY_TOKEN: _last,
        Reduction.MAX_ENTITY_SPAN: _highest,
        Reduction.MEAN_ENTITY_SPAN: _mean,
    }
)

ON_GENERATION = frozenset(r for r in Reduction if "generat" in r.value)
"""Reductions that look at generated tokens."""

ON_FIRST_GENERATED = frozenset(r for r in Reduction if r.value.endswith("first_generated"))
"""Of those, the ones that look at no more than ``Term.first`` of them."""


def reduce(term: Term, track: RequestTrack) -> float | Missing:
    """The term's number, without its weight."""
    start, stop = _needed(term, track)
    if not 0 <= start < stop or (track.tail_lost and _may_grow(term, stop - start)):
        return Missing.UNOBSERVED
    values_n = track.values(term.feature, start, stop)
    if values_n is None:
        return Missing.UNOBSERVED
    if term.span is not None:
        inside_n = track.values(term.span.feature, start, stop)
        if inside_n is None:
            return Missing.UNOBSERVED
        values_n = values_n[_above(inside_n, term.span)]
    return _FOLDS[term.reduce](values_n) if len(values_n) else Missing.NOT_APPLICABLE


def _needed(term: Term, track: RequestTrack) -> tuple[int, int]:
    """The positions ``[start, stop)`` that must all be known; empty if there are none."""
    num_prompt_tokens, end = track.start.num_prompt_tokens, track.end
    if term.reduce in ON_FIRST_GENERATED:
        return num_prompt_tokens, min(num_prompt_tokens + term.first, end)
    if term.reduce in ON_GENERATION:
        return num_prompt_tokens, end
    if term.reduce is Reduction.LAST_PROMPT_TOKEN:
        return num_prompt_tokens - 1, num_prompt_tokens
    return 0, num_prompt_tokens


def _may_grow(term: Term, num_tokens: int) -> bool:
    """Whether the term would look at a further token, if there was one."""
    if term.reduce in ON_FIRST_GENERATED:
        return num_tokens < term.first
    return term.reduce in ON_GENERATION


def _above(acts_n: FloatArray, span: Span) -> BoolArray:
    # In float64, which holds both sides exactly: numpy would round the bound to float32.
    inside_n: BoolArray = acts_n.astype(np.float64) > span.above
    return inside_n
