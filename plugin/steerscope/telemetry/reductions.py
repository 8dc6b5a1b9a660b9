"""One number from one feature of one sequence, exact also beyond the report's limit.

Shapes: n tokens just added, F features of the catalog.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from steerscope.catalog.model import NUM_FIRST_GENERATED, Reduction
from steerscope.telemetry.columns import BoolArray, FloatArray

PROMPT, GENERATION = 0, 1


def _highest(values: npt.NDArray[np.floating]) -> float:
    return float(values.max())


def _lowest(values: npt.NDArray[np.floating]) -> float:
    return float(values.min())


def _mean(values: npt.NDArray[np.floating]) -> float:
    return float(values.mean(dtype=np.float64))


FOLDS: Mapping[Reduction, Callable[[npt.NDArray[np.floating]], float]] = MappingProxyType(
    {
        Reduction.LAST_PROMPT_TOKEN: _highest,
        Reduction.MAX_PROMPT: _highest,
        Reduction.MEAN_PROMPT: _mean,
        Reduction.MAX_GENERATION: _highest,
        Reduction.MIN_GENERATION: _lowest,
        Reduction.MEAN_GENERATION: _mean,
        Reduction.MAX_FIRST_GENERATED: _highest,
        Reduction.MIN_FIRST_GENERATED: _lowest,
    }
)
"""How the needed values become one number (the last prompt token is one value)."""

ON_GENERATION = frozenset(r for r in Reduction if "generat" in r.value)
"""Reductions that look at generated tokens."""

ON_WHOLE_PHASE = frozenset(
    {
        Reduction.MAX_PROMPT,
        Reduction.MEAN_PROMPT,
        Reduction.MAX_GENERATION,
        Reduction.MIN_GENERATION,
        Reduction.MEAN_GENERATION,
    }
)
"""Reductions that look at every token of a phase."""


def needed(reduction: Reduction, num_prompt_tokens: int, end: int) -> tuple[int, int]:
    """The positions ``[start, stop)`` that the reduction looks at; empty if there are none."""
    if reduction is Reduction.LAST_PROMPT_TOKEN:
        return num_prompt_tokens - 1, num_prompt_tokens
    if reduction not in ON_GENERATION:
        return 0, num_prompt_tokens
    if reduction in ON_WHOLE_PHASE:
        return num_prompt_tokens, end
    return num_prompt_tokens, min(num_prompt_tokens + NUM_FIRST_GENERATED, end)


class Overflow:
    """What the reductions need of positions beyond the limit, each position counted once."""

    def __init__(self, num_features: int, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._num_features = num_features
        self._counts = np.zeros((2, num_features), np.int64)
        self._sums = np.zeros((2, num_features), np.float64)
        self._highest = np.full((2, num_features), -np.inf, np.float32)
        self._lowest = np.full((2, num_features), np.inf, np.float32)
        self._rows: dict[int, FloatArray] = {}

    def add(self, columns: slice, acts_nF: FloatArray, position: int, fresh: BoolArray) -> None:
        """Fold in tokens from ``position`` on; those not ``fresh`` only renew a kept row."""
        since_prompt = np.arange(position, position + len(acts_nF)) - self._num_prompt_tokens
        generated = since_prompt >= 0
        for phase, chosen in ((PROMPT, ~generated), (GENERATION, generated)):
            self._fold(phase, columns, acts_nF[chosen & fresh])
        near = (since_prompt >= -1) & (since_prompt < NUM_FIRST_GENERATED)
        for n in np.flatnonzero(near).tolist():
            row = self._rows.setdefault(position + n, np.zeros(self._num_features, np.float32))
            row[columns] = acts_nF[n]

    def value(self, position: int, column: int) -> float:
        """The value at the last prompt token or one of the first generated ones."""
        return float(self._rows[position][column])

    def reduce(self, reduction: Reduction, kept: FloatArray, column: int) -> float:
        """Reduce a whole phase: the values ``kept`` below the limit and those beyond."""
        phase = GENERATION if reduction in ON_GENERATION else PROMPT
        fold = FOLDS[reduction]
        if fold is _mean:
            total = float(kept.sum(dtype=np.float64) + self._sums[phase, column])
            return total / int(len(kept) + self._counts[phase, column])
        rest = self._highest if fold is _highest else self._lowest
        return fold(np.append(kept, rest[phase, column]))

    def _fold(self, phase: int, columns: slice, acts_nF: FloatArray) -> None:
        if not len(acts_nF):
            return
        self._counts[phase, columns] += len(acts_nF)
        self._sums[phase, columns] += acts_nF.sum(axis=0, dtype=np.float64)
        highest, lowest = self._highest[phase, columns], self._lowest[phase, columns]
        np.maximum(highest, acts_nF.max(axis=0), out=highest)
        np.minimum(lowest, acts_nF.min(axis=0), out=lowest)
