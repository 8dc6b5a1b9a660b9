"""How far a feature's activations have moved from what they were when it was calibrated.

Both measures look at counts per bin, so a server need only keep those.
Neither says why: other prompts, another model, another language.

Shapes: n values, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from steerscope.catalog.model import Baseline

SHARE_FLOOR: Final = 1e-4
"""A bin's share is taken for no less than this, on both sides: an empty bin costs a bounded sum,
about 9 times the share that the other side has there."""


def bin_counts(edges: Sequence[float], values: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """How many values [n], all finite, fall into each bin of a baseline: int64 [B]."""
    bins_n = np.searchsorted(edges, np.asarray(values, np.float64), side="right")
    return np.bincount(bins_n, minlength=len(edges) + 1).astype(np.int64)


def psi(baseline: Baseline, counts: npt.NDArray[np.integer]) -> float | None:
    """Population stability index, ``sum((now - then) * ln(now / then))``; None without values.

    By custom 0.1 is a shift to look at and 0.25 a large one. Without any shift it is about
    ``(B - 1) * (1 / values + 1 / num_tokens)``, so it needs some hundred independent values.
    """
    if not counts.sum():
        return None
    then_B = np.maximum(baseline.shares, SHARE_FLOOR)
    now_B = np.maximum(counts / counts.sum(), SHARE_FLOOR)
    return float(((now_B - then_B) * np.log(now_B / then_B)).sum())


def ks(baseline: Baseline, counts: npt.NDArray[np.integer]) -> float | None:
    """Largest gap between the cumulative shares, at the edges of bins; None without values.

    At most the Kolmogorov-Smirnov distance of the values themselves.
    """
    if not counts.sum():
        return None
    gaps_B = np.cumsum(counts / counts.sum()) - np.cumsum(baseline.shares)
    return float(np.abs(gaps_B).max())
