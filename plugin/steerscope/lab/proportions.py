"""The interval of a proportion, with nothing but the standard library."""

from __future__ import annotations

import math
from typing import NamedTuple


class Interval(NamedTuple):
    """A two-sided confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int, z: float = 1.959963984540054) -> Interval:
    """Return the Wilson interval of a proportion, 95% unless told; (0, 1) for no trials."""
    if not 0 <= successes <= n:
        raise ValueError(f"successes: {successes} is not between 0 and n = {n}")
    if n == 0:
        return Interval(0.0, 1.0)
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return Interval(max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))
