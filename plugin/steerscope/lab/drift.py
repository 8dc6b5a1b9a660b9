"""Baselines: how a feature's activations are spread over the cases of the lab.

Shapes: N values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from steerscope.catalog.model import Baseline
from steerscope.errors import LabError
from steerscope.telemetry.drift import bin_counts, ks, psi

MAX_BINS: Final = 10
MIN_PER_BIN: Final = 20
"""Quantile bins are made fewer rather than hold fewer values than this."""

JUST_ABOVE_ZERO: Final = float(np.finfo(np.float32).tiny)
"""The smallest activation that is not 0 (float32, not subnormal)."""

CONSTANT_SLACK: Final = 0.01
"""A feature that never varied may vary by this share of its value before it counts as moved."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How far values are from a baseline; None for no values."""

    psi: float | None
    ks: float | None
    num_tokens: int


def baseline(
    values: npt.ArrayLike, feature: str, phase: Literal["prompt", "generation"]
) -> Baseline:
    """Bin the activations [N] of one feature, in at most ten bins of equal mass.

    Where none is negative, the zeros are a bin of their own, so that a sparse latent's bins
    tell how often it is active and, apart from that, how strongly. A constant that is not 0 has
    a narrow bin and two empty ones around it.

    Raises:
        LabError: there are no values, or one is not finite.
    """
    values_N = np.asarray(values, np.float64)
    if values_N.ndim != 1 or not values_N.size:
        raise LabError(f"baseline of {feature!r}: needs one activation per token, and some")
    if not np.isfinite(values_N).all():
        raise LabError(f"baseline of {feature!r}: an activation is not finite")
    edges = _edges(values_N)
    shares_B = bin_counts(edges, values_N) / len(values_N)
    return Baseline(
        feature=feature,
        phase=phase,
        edges=edges,
        shares=tuple(shares_B.tolist()),
        num_tokens=len(values_N),
    )


def drift(of: Baseline, values: npt.ArrayLike) -> Drift:
    """Compare activations [N], all finite, with a baseline."""
    counts_B = bin_counts(of.edges, values)
    return Drift(psi(of, counts_B), ks(of, counts_B), int(counts_B.sum()))


def _edges(values_N: npt.NDArray[np.float64]) -> tuple[float, ...]:
    lowest, highest = float(values_N.min()), float(values_N.max())
    if lowest == 0.0:
        return (JUST_ABOVE_ZERO, *_quantiles(values_N[values_N >= JUST_ABOVE_ZERO], MAX_BINS - 1))
    if lowest == highest:
        slack = abs(lowest) * CONSTANT_SLACK
        return (lowest - slack, lowest + slack)
    return _quantiles(values_N, MAX_BINS) or (float(values_N[values_N > lowest].min()),)


def _quantiles(values_N: npt.NDArray[np.float64], max_bins: int) -> tuple[float, ...]:
    """Inner edges of bins of equal mass; fewer where values are few or tied."""
    num_bins = min(max_bins, len(values_N) // MIN_PER_BIN)
    if num_bins < 2:
        return ()
    inner = np.quantile(values_N, np.arange(1, num_bins) / num_bins)
    return tuple(np.unique(inner[inner > values_N.min()]).tolist())
