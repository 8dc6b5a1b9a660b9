"""The batch plan: each scheduled token's request, position and steering row.

Made once per step, in numpy, from the runner's own layout (never from the order in
which the scheduler named the requests). Shapes: R requests in the step, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from steerscope.engine import loops
from steerscope.engine.rows import RowTable
from steerscope.steering.segments import Segment
from steerscope.steering.stamp import Stamp

IntArray = npt.NDArray[np.int64]
AnyInts = npt.NDArray[np.int64] | npt.NDArray[np.int32]


class RequestInfo(NamedTuple):
    """What the runner knows of a request. ``stamp`` is None if it bypassed admission."""

    stamp: Stamp | None
    num_prompt_tokens: int


class StepLayout(NamedTuple):
    """The step as the runner laid it out.

    Tokens of ``req_ids[r]`` are rows ``query_start_loc[r]`` to ``query_start_loc[r + 1]``,
    at positions from ``first_positions[r]`` on.
    """

    req_ids: Sequence[str]
    query_start_loc: AnyInts
    first_positions: AnyInts

    def settled(self) -> StepLayout:
        """With arrays of its own, int64: the runner will write its own again."""
        starts, positions = self.query_start_loc, self.first_positions
        return StepLayout(tuple(self.req_ids), starts.astype(np.int64), positions.astype(np.int64))


EMPTY_LAYOUT = StepLayout((), np.zeros(1, np.int64), np.zeros(0, np.int64))


def positions(layout: StepLayout) -> IntArray:
    """The position of each token of the step, int64 [T]."""
    lengths = np.diff(layout.query_start_loc)
    first_T = np.repeat(layout.first_positions - layout.query_start_loc[:-1], lengths)
    positions_T: IntArray = first_T + np.arange(len(first_T))
    return positions_T


class _SpanTable:
    """The spans of each steered request, in a line of its own.

    Attributes:
        spans_MK3: int64, positions ``[start, end)`` and the row that they have; those after a
            request's last one are empty.
    """

    def __init__(self) -> None:
        self.spans_MK3 = np.zeros((1, 1, 3), np.int64)
        self._free = [0]

    def put(self, spans: Sequence[tuple[int, int, int]]) -> int:
        """The line where they are now."""
        num_lines, most, _ = self.spans_MK3.shape
        more_lines, more_spans = num_lines * (not self._free), max(len(spans) - most, 0)
        if more_lines or more_spans:
            self.spans_MK3 = np.pad(self.spans_MK3, ((0, more_lines), (0, more_spans), (0, 0)))
            self._free.extend(range(num_lines, num_lines + more_lines))
        line = self._free.pop()
        self.spans_MK3[line] = 0
        self.spans_MK3[line, : len(spans)] = spans
        return line

    def take_back(self, line: int) -> None:
        """Nobody needs the line any more."""
        self._free.append(line)


@dataclass(slots=True)
class _Decode:
    """The last step, where it was one token of each request, and until where its rows hold."""

    req_ids: list[str]
    starts: AnyInts
    at_R: AnyInts
    """The positions of its tokens."""
    until_R: IntArray
    rows_R: IntArray | None


NO_LINE = -1
ENDLESS = 1 << 62
"""The end of a span that has none."""


class BatchPlan:
    """Follows the persistent batch and lays steering rows over each step's tokens.

    Args:
        table: allocates rows; a request holds its rows while it is in the batch.
        lookup: internal request id to what the runner knows of it.
        write_row: called with (row, stamp, segment) when a row must be filled.
    """

    def __init__(
        self,
        table: RowTable,
        lookup: Callable[[str], RequestInfo],
        write_row: Callable[[int, Stamp, Segment], None],
    ) -> None:
        self._table = table
        self._lookup = lookup
        self._write_row = write_row
        self._digests: dict[str, frozenset[str]] = {}
        """Of the rows that each steered request of the batch holds."""
        self._lines: dict[str, int] = {}
        """Where its spans are."""
        self._spans = _SpanTable()
        self._line_R = np.zeros(0, np.int64)
        self._req_ids: frozenset[str] = frozenset()
        self._order: tuple[str, ...] | None = ()
        """Those of the last step in turn; None once what is known of them is out of date."""
        self._endless_R = np.zeros(0, np.int64)
        self._decode: _Decode | None = None

    def goes_on(self, layout: StepLayout) -> bool:
        """Whether the step is the next token of each of the last one's, under the same rows.

        Then ``last`` and ``last_rows`` are all there is to know of it.
        """
        last = self._decode
        if last is None or layout.req_ids != last.req_ids:
            return False
        follows = loops.compiled().follows
        return follows(layout.query_start_loc, layout.first_positions, last.at_R, last.until_R)

    @property
    def last(self) -> StepLayout:
        """The last step of those that went on."""
        assert self._decode is not None
        assert self._order is not None
        return StepLayout(self._order, self._decode.starts, self._decode.at_R.copy())

    @property
    def last_rows(self) -> IntArray | None:
        """The steering rows of all of those; the same array, or None where nothing is steered."""
        assert self._decode is not None
        return self._decode.rows_R

    def rows(self, layout: StepLayout) -> IntArray | None:
        """The steering row of each token of the step, int64 [T]; None if none of them has one."""
        self._follow(tuple(layout.req_ids))
        starts, positions = layout.query_start_loc, layout.first_positions
        rows_T, until_R = None, self._endless(len(positions))
        if self._lines:
            rows_T, until_R = np.zeros(int(starts[-1]), np.int64), until_R.copy()
            lay = loops.compiled().lay
            lay(self._line_R, self._spans.spans_MK3, starts, positions, rows_T, until_R)
        is_decode = 0 < len(positions) == int(starts[-1])
        self._decode = (
            _Decode(list(layout.req_ids), starts, positions.copy(), until_R, rows_T)
            if is_decode
            else None
        )
        return rows_T

    def break_off(self) -> None:
        """No step goes on from the last one."""
        self._decode = None

    def forget(self, req_ids: Sequence[str]) -> None:
        """Requests that ended: an id may come back as another request."""
        if not req_ids:
            return
        for req_id in req_ids:
            self._leave(req_id)
        self._req_ids -= frozenset(req_ids)
        self._order = self._decode = None

    def restamp(self, req_id: str) -> None:
        """The request's steering was changed: look it up again."""
        self._leave(req_id)
        self._req_ids -= {req_id}
        self._order = self._decode = None

    def _follow(self, order: tuple[str, ...]) -> None:
        """Most steps have the requests of the step before, in the same order."""
        if order == self._order:
            return
        req_ids = frozenset(order)
        for req_id in self._req_ids - req_ids:
            self._leave(req_id)
        for req_id in req_ids - self._req_ids:
            self._join(req_id)
        self._req_ids, self._order = req_ids, order
        if self._lines:
            self._line_R = np.array([self._lines.get(r, NO_LINE) for r in order], np.int64)

    def _endless(self, num_requests: int) -> IntArray:
        if len(self._endless_R) != num_requests:
            self._endless_R = np.full(num_requests, ENDLESS)
        return self._endless_R

    def _leave(self, req_id: str) -> None:
        if req_id in self._lines:
            self._spans.take_back(self._lines.pop(req_id))
            for digest in self._digests.pop(req_id):
                self._table.release(digest)

    def _join(self, req_id: str) -> None:
        stamp = self._lookup(req_id).stamp
        if stamp is None or not stamp.segments:
            return
        rows: dict[str, int] = {}
        for segment in stamp.segments:
            if segment.digest not in rows:
                row, fresh = self._table.acquire(segment.digest)
                rows[segment.digest] = row
                if fresh:
                    self._write_row(row, stamp, segment)
        self._digests[req_id] = frozenset(rows)
        self._lines[req_id] = self._spans.put(
            [(s.start, ENDLESS if s.end is None else s.end, rows[s.digest]) for s in stamp.segments]
        )
