"""Ratios of the times that two engines take for the same work, and what they are worth.

Work comes in rounds: in each, every engine does the same, one shortly after the other. Intervals
hold 95% and come from resampling rounds: what disturbs the machine for a second or two hits
neighbouring steps together, so single steps would make them too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLINGS = 400
TRIMMED_SHARE = 0.1
"""Of the rounds, at either end."""

Array = NDArray[np.float64]
Rounds = Sequence[Array]
"""The times of each round."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio, or a difference, and the interval it is in."""

    value: float
    low: float
    high: float
    rounds: int


def throughput(plain: Rounds, ours: Rounds) -> Ratio:
    """What is left of plain vLLM's throughput: the geometric mean over rounds; 1 is all of it."""
    logs_R = _logs(plain, ours)
    return _resampled(lambda rounds: float(np.exp(logs_R[rounds].mean())), len(logs_R))


def trimmed_throughput(plain: Rounds, ours: Rounds) -> Ratio:
    """The same without the most extreme rounds at either end, hit by bursts of others' work."""
    logs_R = _logs(plain, ours)
    cut = int(TRIMMED_SHARE * len(logs_R))

    def mean(rounds: NDArray[np.int64]) -> float:
        return float(np.exp(np.sort(logs_R[rounds])[cut : len(logs_R) - cut].mean()))

    return _resampled(mean, len(logs_R))


def latency(plain: Rounds, ours: Rounds, quantile: float) -> Ratio:
    """A quantile of our times over the same of plain vLLM's: above 1 is slower."""

    def of(times: Rounds, rounds: NDArray[np.int64]) -> float:
        return float(np.quantile(np.concatenate([times[i] for i in rounds]), quantile))

    return _resampled(lambda rounds: of(ours, rounds) / of(plain, rounds), len(plain))


def difference(plain: Array, ours: Array) -> Ratio:
    """By how much ours takes longer: the mean over rounds of one time each."""
    more_R = ours - plain
    return _resampled(lambda rounds: float(more_R[rounds].mean()), len(more_R))


def latencies(kind: str, plain: Rounds, ours: Rounds, to_us: float = 1.0) -> dict[str, Any]:
    """Median and p99 of a kind of latency, as ratios and in µs."""
    found: dict[str, Any] = {}
    for name, quantile in (("p50", 0.5), ("p99", 0.99)):
        both = [
            to_us * float(np.quantile(np.concatenate(times), quantile)) for times in (plain, ours)
        ]
        found[f"{kind}_{name}"] = asdict(latency(plain, ours, quantile))
        found[f"{kind}_{name}_us"] = {"plain": round(both[0], 1), "ours": round(both[1], 1)}
    return found


def slope(sizes: Sequence[float], costs: Sequence[float | None]) -> float | None:
    """Cost per unit of size, by least squares; None without two known costs."""
    known = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if cost is not None]
    if len(known) < 2:
        return None
    return float(np.polyfit(*np.array(known).T, 1)[0])


def _logs(plain: Rounds, ours: Rounds) -> Array:
    logs_R: Array = np.log([a.sum() / b.sum() for a, b in zip(plain, ours, strict=True)])
    return logs_R


def _resampled(statistic: Callable[[NDArray[np.int64]], float], num_rounds: int) -> Ratio:
    rng = np.random.default_rng(0)
    drawn = rng.integers(num_rounds, size=(RESAMPLINGS, num_rounds))
    low, high = np.quantile([statistic(rounds) for rounds in drawn], (0.025, 0.975))
    return Ratio(statistic(np.arange(num_rounds)), float(low), float(high), num_rounds)
