"""Classic histograms for many series at once: numpy in, numpy out, no call per value."""

from __future__ import annotations

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
        self.counts = np.zeros((num_series, len(self.bounds) + 1), np.int64)
        self.sums = np.zeros(num_series, np.float64)

    def observe(self, series: npt.NDArray[np.intp], values: npt.NDArray[np.floating]) -> None:
        """Add ``values[i]`` to histogram ``series[i]``; the values must be finite."""
        num_series, width = self.counts.shape
        slots = series * width + np.searchsorted(self.bounds, values, side="left")
        added = np.bincount(slots, minlength=num_series * width)
        self.counts += added.reshape(num_series, width)
        self.sums += np.bincount(series, np.maximum(values, 0.0), minlength=num_series)

    def observe_one(self, series: int, value: float) -> None:
        """Add one value to one histogram."""
        self.counts[series, np.searchsorted(self.bounds, value, side="left")] += 1
        self.sums[series] += max(value, 0.0)
