"""The requests a worker holds, followed from what the scheduler says: one source for both runners.

Kept for each: its stamp, its prompt's length and the KV blocks it owns. Shapes: R requests
of a step, S steps, P all their requests one step after the other, T tokens, B the most blocks a
request can have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from steerscope.engine import loops
from steerscope.engine.plan import IntArray, RequestInfo
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


class Steps(NamedTuple):
    """Steps that follow each other, in each of which some requests have some tokens.

    A step may stand for several, in which the same requests have one token each, each time at the
    next position.
    """

    num_requests_S: IntArray
    num_steps_S: IntArray
    rows_P: IntArray
    """Of the block table. A request has another row than any other of the steps."""
    lengths_P: IntArray
    """Tokens, of one step where it stands for several."""
    positions_P: IntArray
    """Of the first of them."""


class Roster:
    """Requests by internal id, with a row of the block table each, which grows as needed."""

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._blocks_RB = np.zeros((1, 1), np.int32)
        self._free = [0]
        self._rows: dict[str, int] = {}
        """Apart from the members, so that many are looked up at once."""
        self._left: list[int] = []
        """Rows of requests that left, of which something may still be asked."""

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
        """Forget requests that ended; their blocks are known until ``recycle``."""
        for req_id in req_ids:
            member = self._members.pop(req_id, None)
            if member is not None:
                self._left.append(self._rows.pop(req_id))

    def recycle(self) -> None:
        """No more is asked of requests that left: their rows may be others'."""
        self._free += self._left
        self._left.clear()

    def slots(self, steps: Steps, num_tokens: int, block_size: int) -> IntArray:
        """The KV slot of each token of the steps, one step after the other, int64 [T]."""
        slots_T = np.empty(num_tokens, np.int64)
        loops.compiled().locate(*steps, self._blocks_RB, block_size, slots_T)
        return slots_T

    def leading_slots(self, req_id: str, num_positions: int, block_size: int) -> IntArray:
        """The KV slots of the request's first positions, int64."""
        at = np.arange(num_positions)
        blocks = self._blocks_RB[self._members[req_id].row, at // block_size].astype(np.int64)
        slots: IntArray = blocks * block_size + at % block_size
        return slots

    def rows(self, req_ids: Sequence[str]) -> IntArray:
        """Those requests' rows of the block table, int64 [R]."""
        return np.array([*map(self._rows.__getitem__, req_ids)], np.int64)

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
            self._free.extend(range(num_rows, len(self._blocks_RB)))
        return self._free.pop()
