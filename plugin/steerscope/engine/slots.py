"""Activations kept for each KV slot, so that a token from the prefix cache is not unseen.

vLLM reuses the KV of a token that an earlier request computed; this keeps, beside it, what the
sites read there and what steering changed. Host memory, N slots, F features and S sites of this
worker: ``N * (4 F + 1)`` bytes, and ``N * 4 (F + S)`` more that are only touched where tokens
were steered. A slot says whose step wrote it last; the hash of its block, which steering enters,
says who may read it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_UNKNOWN, _FOREIGN, _SEEN, _EDITED = range(4)


class SiteValues(NamedTuple):
    """What one site read and changed: activations [T, F], changes [T, F], doses [T].

    ``deltas`` and ``doses`` are None, at all sites alike, where no token was steered.
    """

    acts: FloatArray
    deltas: FloatArray | None
    doses: FloatArray | None

    def take(self, tokens: npt.NDArray[np.bool_] | slice) -> SiteValues:
        """A copy of some tokens' values."""
        return SiteValues(
            self.acts[tokens].copy(),
            None if self.deltas is None else self.deltas[tokens].copy(),
            None if self.doses is None else self.doses[tokens].copy(),
        )


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The KV cache group whose blocks hold every token of a request's context."""

    group: int
    block_size: int
    num_blocks: int


class SlotCache:
    """Values by KV slot; slots from ``num_slots`` on are not kept (the cap)."""

    def __init__(self, widths: tuple[int, ...], num_slots: int, max_bytes: int) -> None:
        self.num_slots = min(num_slots, max_bytes // bytes_per_slot(widths))
        self._state = np.zeros(self.num_slots, np.uint8)
        self._acts = [np.zeros((self.num_slots, width), np.float32) for width in widths]
        self._deltas = [np.zeros((self.num_slots, width), np.float32) for width in widths]
        self._doses = [np.zeros(self.num_slots, np.float32) for _ in widths]

    def write(self, slots: IntArray, sites: list[SiteValues]) -> None:
        """Keep a step's values, token t's under ``slots[t]``."""
        kept = slots < self.num_slots
        at = slots[kept]
        self._state[at] = _SEEN
        for s, site in enumerate(sites):
            self._acts[s][at] = site.acts[kept]
            if site.deltas is not None and site.doses is not None:
                self._deltas[s][at] = site.deltas[kept]
                self._doses[s][at] = site.doses[kept]
        self._mark_edited(at, [site.doses[kept] for site in sites if site.doses is not None])

    def num_foreign(self, slots: IntArray) -> int:
        """How many of the slots hold KV that came from elsewhere."""
        return int((self._state[slots[slots < self.num_slots]] == _FOREIGN).sum())

    def read(self, slots: IntArray) -> tuple[npt.NDArray[np.bool_], list[SiteValues]]:
        """Which slots are known [T], and their values (undefined at the others)."""
        if not self.num_slots:
            return np.zeros(len(slots), np.bool_), []
        inside = slots < self.num_slots
        at = np.where(inside, slots, 0)
        state = np.where(inside, self._state[at], _UNKNOWN)
        edited = (state == _EDITED)[:, None]
        any_edited = bool(edited.any())
        sites = [
            SiteValues(
                acts[at],
                np.where(edited, deltas[at], np.float32(0.0)) if any_edited else None,
                np.where(edited[:, 0], doses[at], np.float32(0.0)) if any_edited else None,
            )
            for acts, deltas, doses in zip(self._acts, self._deltas, self._doses, strict=True)
        ]
        return state >= _SEEN, sites

    def forget_blocks(self, block_ids: Iterable[int], block_size: int) -> None:
        """These blocks were filled by something else than a step of ours."""
        for block in block_ids:
            self._state[block * block_size : (block + 1) * block_size] = _UNKNOWN

    def mark_foreign(self, slots: IntArray) -> None:
        """The KV of these slots came from elsewhere: whatever was read of them is void."""
        self._state[slots[slots < self.num_slots]] = _FOREIGN

    def _mark_edited(self, at: IntArray, doses: list[FloatArray]) -> None:
        if doses:
            edited = at[np.logical_or.reduce([dose > 0.0 for dose in doses])]
            self._state[edited] = _EDITED


def bytes_per_slot(widths: tuple[int, ...]) -> int:
    """Most bytes one slot can take; see the formula above."""
    return 1 + sum(4 * width + 4 * (width + 1) for width in widths)
