"""What steering did to one sequence. Shapes: N positions, n tokens just added, F, S as ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from steerscope.telemetry.columns import BoolArray, FloatArray, grown


class SteeredTokens:
    """Counts every changed token once; keeps the changes below the limit.

    A dose is one token's at one site: the norm of the change over the norm of the residual.
    """

    def __init__(self, num_features: int, limit: int, take: Callable[[int], bool]) -> None:
        self._take = take
        self.num_tokens = 0
        self.first_position = -1
        self.last_position = -1
        self.dose_max = 0.0
        self._dose_sum = 0.0
        self._num_doses = 0
        self._limit = limit
        self._changed_N: BoolArray = np.zeros(0, np.bool_)
        self._deltas_NF: FloatArray = np.zeros((0, num_features), np.float32)

    @property
    def num_bytes(self) -> int:
        """What the kept changes take."""
        return self._changed_N.nbytes + self._deltas_NF.nbytes

    @property
    def dose_mean(self) -> float:
        """Mean dose; 0.0 when nothing was changed."""
        return self._dose_sum / self._num_doses if self._num_doses else 0.0

    def add(
        self,
        columns: slice,
        deltas_nF: FloatArray,
        doses_nS: FloatArray,
        position: int,
        fresh: BoolArray,
    ) -> None:
        """Take the edits of tokens from ``position`` on; only ``fresh`` ones add doses."""
        stop = position + len(deltas_nF)
        self._changed_N = grown(self._changed_N, stop)
        wanted = min(stop, self._limit)
        self._deltas_NF = grown(self._deltas_NF, wanted, self._take)
        if wanted > len(self._deltas_NF):
            self._limit = len(self._deltas_NF)
        kept = min(max(self._limit - position, 0), len(deltas_nF))
        self._deltas_NF[position : position + kept, columns] = deltas_nF[:kept]
        changed = deltas_nF.any(axis=1)
        newly = changed & ~self._changed_N[position:stop]
        self._changed_N[position:stop] |= changed
        self._count(position + np.flatnonzero(newly))
        self._dose(doses_nS[changed & fresh])

    def deltas(self, first: int, last: int, column: int) -> FloatArray | None:
        """The changes of one feature at kept positions, or None if there were none."""
        if not self._deltas_NF[first:last, column].any():
            return None
        deltas = np.zeros(last - first, np.float32)
        known = self._deltas_NF[first:last, column]
        deltas[: len(known)] = known
        return deltas

    def _count(self, positions: np.ndarray[tuple[int], np.dtype[np.intp]]) -> None:
        if not len(positions):
            return
        first, last = int(positions[0]), int(positions[-1])
        self.first_position = min(first, self.first_position) if self.num_tokens else first
        self.last_position = max(last, self.last_position)
        self.num_tokens += len(positions)

    def _dose(self, doses_nS: FloatArray) -> None:
        doses = doses_nS[doses_nS > 0.0]
        if not len(doses):
            return
        self._num_doses += len(doses)
        self._dose_sum += float(doses.sum(dtype=np.float64))
        self.dose_max = max(self.dose_max, float(doses.max()))
