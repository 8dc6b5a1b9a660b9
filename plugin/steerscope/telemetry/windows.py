"""Sliding windows of feature activations, counted in the bins of the catalog's baselines.

Shapes: n tokens, K baselines, B bins of the one that has most, P panes of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np

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
        self._counts_PKB = np.zeros((NUM_PANES, len(baselines), width + 1), np.int64)
        self._pane = 0

    def add(self, phase: int, columns: slice, acts_nF: FloatArray, now: float) -> None:
        """Count finite activations of the columns, all of one phase (0 prompt, 1 generation)."""
        inside = (self._column_K >= columns.start) & (self._column_K < columns.stop)
        which_k = np.flatnonzero(inside & (self._phase_K == phase))
        if not len(which_k) or not len(acts_nF):
            return
        self._move_on(now)
        values_nk = acts_nF[:, self._column_K[which_k] - columns.start]
        bins_nk = (values_nk[:, :, None] >= self._edges_KE[which_k]).sum(axis=2)
        width = self._counts_PKB.shape[2]
        slots_nk = bins_nk + np.arange(len(which_k)) * width
        added = np.bincount(slots_nk.ravel(), minlength=len(which_k) * width)
        pane = self._counts_PKB[self._pane % NUM_PANES]
        pane[which_k] += added.reshape(len(which_k), width)

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

    def _move_on(self, now: float) -> None:
        """Empty the panes that ``now`` has left behind."""
        newest = int(now / self._pane_seconds)
        for pane in range(self._pane + 1, min(newest, self._pane + NUM_PANES) + 1):
            self._counts_PKB[pane % NUM_PANES] = 0
        self._pane = max(newest, self._pane)
