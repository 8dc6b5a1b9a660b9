"""How far a feature's activations have moved from what they were when it was calibrated.

Both measures look at counts per bin, so a server need only keep those.
Neither says why: other prompts, another model, another language.

Shapes: n values, K baselines, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from steerscope.catalog.model import Baseline

FloatArray = npt.NDArray[np.float64]

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
    return float(psi_of(np.array(baseline.shares), counts / counts.sum()))


def ks(baseline: Baseline, counts: npt.NDArray[np.integer]) -> float | None:
    """Largest gap between the cumulative shares, at the edges of bins; None without values.

    At most the Kolmogorov-Smirnov distance of the values themselves.
    """
    if not counts.sum():
        return None
    return float(ks_of(np.array(baseline.shares), counts / counts.sum()))


def psi_of(then_KB: FloatArray, now_KB: FloatArray) -> FloatArray:
    """``psi`` of many baselines at once: shares [..., B] to [...].

    A bin that is empty in both, as where a baseline has fewer of them, adds nothing.
    """
    then_KB, now_KB = np.maximum(then_KB, SHARE_FLOOR), np.maximum(now_KB, SHARE_FLOOR)
    found_K: FloatArray = ((now_KB - then_KB) * np.log(now_KB / then_KB)).sum(axis=-1)
    return found_K


def ks_of(then_KB: FloatArray, now_KB: FloatArray) -> FloatArray:
    """``ks`` of many baselines at once, as ``psi_of``."""
    gaps_KB = np.cumsum(now_KB, axis=-1) - np.cumsum(then_KB, axis=-1)
    found_K: FloatArray = np.abs(gaps_KB).max(axis=-1)
    return found_K
