"""Activations kept for each KV slot, so that a token from the prefix cache is not unseen.

vLLM reuses the KV of a token that an earlier request computed; this keeps, beside it, what the
sites read there and what steering changed. Host memory, N slots, F features and S sites of this
worker: ``N * (4 F + 1)`` bytes, and ``N * 4 (F + S)`` more once a token was steered. A slot says
whose step wrote it last; the hash of its block, which steering enters, says who may read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from steerscope.engine import loops, memory
from steerscope.engine.loops import EDITED, FOREIGN, SEEN, UNKNOWN

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


class SiteValues(NamedTuple):
    """What one site read of T tokens, and what it changed at E of them.

    Activations [T, F], changes [E, F], doses [E].
    """

    acts: FloatArray
    deltas: FloatArray
    doses: FloatArray


class Values(NamedTuple):
    """What all sites read of T tokens, E of which, ``steered``, have a row that is not neutral."""

    steered: IntArray
    sites: Sequence[SiteValues]

    def take(self, kept_T: npt.NDArray[np.bool_]) -> Values:
        """A copy of some tokens."""
        kept_E = kept_T[self.steered]
        return Values(
            (np.cumsum(kept_T) - 1)[self.steered[kept_E]],
            [SiteValues(s.acts[kept_T], s.deltas[kept_E], s.doses[kept_E]) for s in self.sites],
        )


NO_VALUES = Values(np.zeros(0, np.int64), ())


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """The KV cache group whose blocks hold every token of a request's context."""

    group: int
    block_size: int
    num_blocks: int


class SlotCache:
    """Values by KV slot; slots from ``num_slots`` on are not kept (the cap)."""

    def __init__(self, widths: tuple[int, ...], num_slots: int, max_bytes: int) -> None:
        self.bytes_per_slot = bytes_per_slot(widths)
        self.num_slots = min(num_slots, max_bytes // self.bytes_per_slot)
        self._state = np.zeros(self.num_slots, np.uint8)
        self._acts = [np.zeros((self.num_slots, width), np.float32) for width in widths]
        self._deltas = [np.zeros((self.num_slots, width), np.float32) for width in widths]
        self._doses = [np.zeros(self.num_slots, np.float32) for _ in widths]
        self._has_edits = False
        memory.find_pages([self._state, *self._acts])

    def write(self, slots: IntArray, values: Values) -> None:
        """Keep values, token t's under ``slots[t]``; the last one's where a slot comes again."""
        compiled = loops.compiled()
        for kept, site in zip(self._acts, values.sites, strict=True):
            compiled.keep(slots, site.acts, kept, self._state)
        if values.steered.size:
            if not self._has_edits:
                self._has_edits = True
                memory.find_pages([*self._deltas, *self._doses])
            is_edited_E = np.logical_or.reduce([site.doses > 0.0 for site in values.sites])
            compiled.mark(slots, values.steered, is_edited_E, self._state)
            slots_E = slots[values.steered]
            for deltas, doses, site in zip(self._deltas, self._doses, values.sites, strict=True):
                compiled.keep_edits(slots_E, site.deltas, site.doses, deltas, doses)

    def num_foreign(self, slots: IntArray) -> int:
        """How many of the slots hold KV that came from elsewhere."""
        return int((self._state[slots[slots < self.num_slots]] == FOREIGN).sum())

    def read(self, slots: IntArray) -> tuple[npt.NDArray[np.bool_], Values]:
        """Which slots are known [T], and their values (undefined at the others)."""
        if not self.num_slots:
            return np.zeros(len(slots), np.bool_), NO_VALUES
        inside = slots < self.num_slots
        at = np.where(inside, slots, 0)
        state = np.where(inside, self._state[at], UNKNOWN)
        edited = np.flatnonzero(state == EDITED)
        sites = [
            SiteValues(acts[at], deltas[at[edited]], doses[at[edited]])
            for acts, deltas, doses in zip(self._acts, self._deltas, self._doses, strict=True)
        ]
        return state >= SEEN, Values(edited, sites)

    def forget_blocks(self, block_ids: Iterable[int], block_size: int) -> None:
        """These blocks were filled by something else than a step of ours."""
        for block in block_ids:
            self._state[block * block_size : (block + 1) * block_size] = UNKNOWN

    def mark_foreign(self, slots: IntArray) -> None:
        """The KV of these slots came from elsewhere: whatever was read of them is void."""
        self._state[slots[slots < self.num_slots]] = FOREIGN


def bytes_per_slot(widths: tuple[int, ...]) -> int:
    """Most bytes one slot can take; see the formula above."""
    return 1 + sum(4 * width + 4 * (width + 1) for width in widths)
