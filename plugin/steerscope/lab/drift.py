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

NOISE_SHARE: Final = 0.01
"""Another batch, kernel or precision may move an activation by this share of the mean size."""
MAX_NEAR_EDGE: Final = 0.25
"""So much of a bin's mass may lie within that noise of one of its edges."""

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
    return _quantiles(values_N, MAX_BINS) or (_middle_of_widest_gap(values_N),)


def _quantiles(values_N: npt.NDArray[np.float64], max_bins: int) -> tuple[float, ...]:
    """Inner edges of bins of equal mass; fewer where values are few or lie together."""
    num_bins = min(max_bins, len(values_N) // MIN_PER_BIN)
    if num_bins < 2:
        return ()
    ordered_N = np.sort(values_N)
    noise = NOISE_SHARE * float(np.abs(values_N).mean())
    ranks = [round(i * len(ordered_N) / num_bins) for i in range(1, num_bins)]
    edges = {_clear_edge(ordered_N, rank, noise, num_bins) for rank in ranks}
    return tuple(sorted(edge for edge in edges if edge is not None))


def _clear_edge(
    ordered_N: npt.NDArray[np.float64], rank: int, noise: float, num_bins: int
) -> float | None:
    """An edge near the rank that noise carries few values over; None if there is none.

    Activations at a token that many prompts share lie together: an edge among them would tell
    rounding for a shift.
    """
    edge = (ordered_N[rank - 1] + ordered_N[rank]) / 2
    first, stop = np.searchsorted(ordered_N, (edge - noise, edge + noise))
    if stop - first <= MAX_NEAR_EDGE * len(ordered_N) / num_bins:
        return float(edge)
    gaps = np.flatnonzero(np.diff(ordered_N) > 2 * noise) + 1
    if not len(gaps):
        return None
    nearest = gaps[np.abs(gaps - rank).argmin()]
    return float((ordered_N[nearest - 1] + ordered_N[nearest]) / 2)


def _middle_of_widest_gap(values_N: npt.NDArray[np.float64]) -> float:
    ordered_N = np.sort(values_N)
    after = int(np.diff(ordered_N).argmax())
    return float((ordered_N[after] + ordered_N[after + 1]) / 2)
