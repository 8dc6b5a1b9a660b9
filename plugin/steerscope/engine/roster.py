"""The requests a worker holds, followed from what the scheduler says: one source for both runners.

Kept for each: its stamp, its prompt's length and the KV blocks it owns. Shapes: R requests
of the step, T tokens, B the most blocks a request can have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steerscope.engine import loops
from steerscope.engine.plan import IntArray, RequestInfo, StepLayout
from steerscope.steering.stamp import Stamp

NOTHING = (0, 0)


class Arrival(NamedTuple):
    """A request that the scheduler sends whole: new, or back after it was preempted."""

    req_id: str
    info: RequestInfo
    block_ids: Sequence[int]
    external: tuple[int, int] = NOTHING
    """Positions whose KV came from elsewhere than a step of this engine."""


class MoreBlocks(NamedTuple):
    """Blocks that a known request got; ``anew`` if they are all it has."""

    req_id: str
    block_ids: Sequence[int]
    anew: bool
    external: tuple[int, int] = NOTHING


@dataclass(slots=True)
class _Member:
    info: RequestInfo
    row: int
    num_blocks: int


class Members(NamedTuple):
    """Requests in turn, int64 [R]."""

    rows_R: IntArray
    """Of the block table."""
    serials_R: IntArray
    """A number of each one's own, which none has again."""


NO_MEMBERS = Members(np.zeros(0, np.int64), np.zeros(0, np.int64))


class Roster:
    """Requests by internal id, with a row of the block table each, which grows as needed."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._blocks_RB = np.zeros((1, 1), np.int32)
        self._free = [0]
        self._rows: dict[str, int] = {}
        """Apart from the members, so that many are looked up at once."""
        self._serials = itertools.count()
        self._serial_R = np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, req_id: object) -> bool:
        return req_id in self._members

    def info(self, req_id: str) -> RequestInfo:
        """What is known of a request of the step."""
        return self._members[req_id].info

    def arrive(self, arrivals: Iterable[Arrival]) -> None:
        """Take requests in, or anew."""
        for req_id, info, block_ids, _ in arrivals:
            if (row := self._rows.get(req_id)) is None:
                row = self._rows[req_id] = self._row()
            self._members[req_id] = _Member(info, row, 0)
            self._append(self._members[req_id], block_ids)

    def extend(self, blocks: Iterable[MoreBlocks]) -> None:
        """Note blocks that known requests got."""
        for req_id, block_ids, anew, _ in blocks:
            member = self._members[req_id]
            if anew:
                member.num_blocks = 0
            self._append(member, block_ids)

    def restamp(self, req_id: str, stamp: Stamp) -> None:
        """The request's steering was changed in flight; one still to come brings its own."""
        if (member := self._members.get(req_id)) is None:
            return
        member.info = member.info._replace(stamp=stamp)

    def leave(self, req_ids: Iterable[str]) -> None:
        """Forget requests that ended."""
        for req_id in req_ids:
            member = self._members.pop(req_id, None)
            if member is not None:
                self._free.append(self._rows.pop(req_id))

    def slots(
        self, members: Members, layout: StepLayout, block_size: int, num_steps: int = 1
    ) -> IntArray:
        """The KV slot of each token of the step, int64 [T].

        Or of so many steps, one after the other, each a position further. ``members`` are those
        of the step.
        """
        starts, positions = layout.query_start_loc, layout.first_positions
        slots_T = np.empty(num_steps * int(starts[-1]), np.int64)
        loops.compiled().locate(
            members.rows_R, starts, positions, num_steps, self._blocks_RB, block_size, slots_T
        )
        return slots_T

    def leading_slots(self, req_id: str, num_positions: int, block_size: int) -> IntArray:
        """The KV slots of the request's first positions, int64."""
        at = np.arange(num_positions)
        blocks = self._blocks_RB[self._members[req_id].row, at // block_size].astype(np.int64)
        slots: IntArray = blocks * block_size + at % block_size
        return slots

    def members(self, req_ids: Sequence[str]) -> Members:
        """Those requests."""
        rows_R = np.array([*map(self._rows.__getitem__, req_ids)], np.int64)
        return Members(rows_R, self._serial_R[rows_R])

    def _append(self, member: _Member, block_ids: Sequence[int]) -> None:
        end = member.num_blocks + len(block_ids)
        if end > self._blocks_RB.shape[1]:
            self._blocks_RB = np.pad(self._blocks_RB, ((0, 0), (0, end)))
        self._blocks_RB[member.row, member.num_blocks : end] = block_ids
        member.num_blocks = end

    def _row(self) -> int:
        if not self._free:
            num_rows = len(self._blocks_RB)
            self._blocks_RB = np.pad(self._blocks_RB, ((0, num_rows), (0, 0)))
            self._serial_R = np.pad(self._serial_R, (0, num_rows))
            self._free.extend(range(num_rows, len(self._blocks_RB)))
        row = self._free.pop()
        self._serial_R[row] = next(self._serials)
        return row
