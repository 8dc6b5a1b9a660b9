"""Classic histograms for many series at once: numpy in, numpy out, no call per value."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


class HistogramArray:
    """N histograms over the same bounds.

    ``counts`` is int64 [N, B + 1]: per bucket, not cumulative, the last one above all
    bounds. A value equal to a bound is in that bound's bucket (Prometheus ``le``).
    ``sums`` is float64 [N] and adds the positive part of each value, so that it never falls.
    """

    def __init__(self, bounds: Sequence[float], num_series: int) -> None:
        self.bounds = np.asarray(bounds, np.float64)
        self._bounds = tuple(map(float, bounds))
        self.counts = np.zeros((num_series, len(self.bounds) + 1), np.int64)
        self.sums = np.zeros(num_series, np.float64)

    def observe(self, series: npt.NDArray[np.intp], values: npt.NDArray[np.floating]) -> None:
        """Add ``values[i]`` to histogram ``series[i]``; the values must be finite."""
        num_series, width = self.counts.shape
        slots = series * width + np.searchsorted(self.bounds, values, side="left")
        added = np.bincount(slots, minlength=num_series * width)
        self.counts += added.reshape(num_series, width)
        self.sums += np.bincount(series, np.maximum(values, 0.0), minlength=num_series)

    def observe_columns(self, series: slice, values_nF: npt.NDArray[np.floating]) -> None:
        """Add each column to a histogram of its own, those of ``series``; finite values."""
        counts_FB = self.counts[series]
        num_columns, width = counts_FB.shape
        slots_nF = np.searchsorted(self.bounds, values_nF, side="left")
        slots_nF += width * np.arange(num_columns)
        added = np.bincount(slots_nF.ravel(), minlength=num_columns * width)
        counts_FB += added.reshape(num_columns, width)
        self.sums[series] += np.add.reduce(np.maximum(values_nF, 0.0), axis=0, dtype=np.float64)

    def observe_one(self, series: int, value: float) -> None:
        """Add one value to one histogram."""
        self.counts[series, bisect_left(self._bounds, value)] += 1
        self.sums[series] += max(value, 0.0)
