"""Sliding windows of feature activations, counted in the bins of the catalog's baselines.

Shapes: n tokens, K baselines, B bins of the one that has most, P panes of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from steerscope.catalog.model import Baseline
from steerscope.telemetry import drift
from steerscope.telemetry.columns import Columns, FloatArray, IntArray

NUM_PANES: Final = 12
"""A window moves on by one pane at a time."""
MIN_TOKENS: Final = 1000
"""Fewer say nothing: ten bins of 500 tokens have moved by 0.02 when nothing has."""


class WindowedDrift(NamedTuple):
    """How far one feature is from its baseline; ``None`` while too few tokens are known."""

    feature: str
    phase: str
    num_tokens: int
    psi: float | None
    ks: float | None


class _Inside(NamedTuple):
    """The baselines of one phase of some columns: which, their columns there, their edges."""

    which_k: npt.NDArray[np.intp]
    columns_k: npt.NDArray[np.intp]
    edges_Ek: FloatArray


class DriftWindow:
    """The newest ``seconds`` of every feature that has a baseline."""

    def __init__(self, baselines: Sequence[Baseline], columns: Columns, seconds: float) -> None:
        self._series = tuple((b.feature, b.phase) for b in baselines)
        self._pane_seconds = seconds / NUM_PANES
        self._column_K = np.array([columns.index[b.feature] for b in baselines], np.intp)
        self._phase_K = np.array([b.phase == "generation" for b in baselines], np.intp)
        width = max((len(b.edges) for b in baselines), default=0)
        self._edges_KE = np.full((len(baselines), width), np.inf)
        for row, of in zip(self._edges_KE, baselines, strict=True):
            row[: len(of.edges)] = of.edges
        self._shares_KB = np.zeros((len(baselines), width + 1))
        for row, of in zip(self._shares_KB, baselines, strict=True):
            row[: len(of.shares)] = of.shares
        self._known: dict[tuple[int, int, int], _Inside] = {}
        """By phase and columns, as they come: the sites of a rank."""
        self._counts_PKB = np.zeros((NUM_PANES, len(baselines), width + 1), np.int64)
        self._pane = 0

    def add(self, phase: int, columns: slice, acts_nF: FloatArray, now: float) -> None:
        """Count finite activations of the columns, all of one phase (0 prompt, 1 generation)."""
        inside = self._inside(phase, columns.start, columns.stop)
        if not len(inside.which_k) or not len(acts_nF):
            return
        self._move_on(now)
        values_nk = acts_nF[:, inside.columns_k]
        above_Enk = values_nk >= inside.edges_Ek[:, None]
        above_Ek = np.add.reduce(above_Enk.view(np.uint8), axis=1, dtype=np.int64)
        added_kB = -np.diff(above_Ek, axis=0, prepend=len(values_nk), append=0).T
        self._counts_PKB[self._pane % NUM_PANES, inside.which_k] += added_kB

    def measure(self, now: float) -> Iterable[WindowedDrift]:
        """Every baseline's drift, in the catalog's order."""
        self._move_on(now)
        counts_KB: IntArray = self._counts_PKB.sum(axis=0)
        tokens_K = counts_KB.sum(axis=1)
        now_KB = counts_KB / np.maximum(tokens_K, 1)[:, None]
        psi_K = drift.psi_of(self._shares_KB, now_KB).tolist()
        ks_K = drift.ks_of(self._shares_KB, now_KB).tolist()
        for of, tokens, psi, ks in zip(self._series, tokens_K.tolist(), psi_K, ks_K, strict=True):
            is_known = tokens >= MIN_TOKENS
            yield WindowedDrift(*of, tokens, psi if is_known else None, ks if is_known else None)

    def _inside(self, phase: int, start: int, stop: int) -> _Inside:
        if (known := self._known.get((phase, start, stop))) is not None:
            return known
        is_inside = (self._column_K >= start) & (self._column_K < stop)
        which_k = np.flatnonzero(is_inside & (self._phase_K == phase))
        edges_Ek = np.ascontiguousarray(_as_float32(self._edges_KE[which_k].T))
        inside = _Inside(which_k, self._column_K[which_k] - start, edges_Ek)
        self._known[phase, start, stop] = inside
        return inside

    def _move_on(self, now: float) -> None:
        """Empty the panes that ``now`` has left behind."""
        newest = int(now / self._pane_seconds)
        for pane in range(self._pane + 1, min(newest, self._pane + NUM_PANES) + 1):
            self._counts_PKB[pane % NUM_PANES] = 0
        self._pane = max(newest, self._pane)


def _as_float32(edges: npt.NDArray[np.float64]) -> FloatArray:
    """Edges that the same float32 values reach: each the lowest one that is no lower."""
    with np.errstate(over="ignore"):
        nearest = edges.astype(np.float32)
        above = np.nextafter(nearest, np.float32(np.inf))
    return np.where(nearest.astype(np.float64) < edges, above, nearest)
