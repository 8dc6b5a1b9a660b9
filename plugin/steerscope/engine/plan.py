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
    query_start_loc: IntArray
    first_positions: IntArray


EMPTY_LAYOUT = StepLayout((), np.zeros(1, np.int64), np.zeros(0, np.int64))


def positions(layout: StepLayout) -> IntArray:
    """The position of each token of the step, int64 [T]."""
    lengths = np.diff(layout.query_start_loc)
    first_T = np.repeat(layout.first_positions - layout.query_start_loc[:-1], lengths)
    positions_T: IntArray = first_T + np.arange(len(first_T))
    return positions_T


class Span(NamedTuple):
    """Positions ``[start, end)`` of a request have steering row ``row``."""

    start: int
    end: int
    row: int


@dataclass(frozen=True, slots=True)
class _Member:
    """A request in the persistent batch, and the rows it holds."""

    digests: frozenset[str]
    spans: tuple[Span, ...]


class _Spans(NamedTuple):
    """The spans of all steered requests of a batch, int64 [S]; ``request_S`` is its place."""

    request_S: IntArray
    start_S: IntArray
    end_S: IntArray
    row_S: IntArray


class _Decode(NamedTuple):
    """The rows of a step of one token a request, and the positions that they hold for."""

    rows_R: IntArray
    from_R: IntArray
    until_R: IntArray

    def still_holds(self, layout: StepLayout) -> bool:
        """Whether a step of the same requests has the same rows."""
        if int(layout.query_start_loc[-1]) != len(self.rows_R):
            return False
        return loops.compiled().are_within(layout.first_positions, self.from_R, self.until_R)


NO_SPANS = _Spans(*(np.zeros(0, np.int64) for _ in range(4)))
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
        self._steered: dict[str, _Member] = {}
        self._req_ids: frozenset[str] = frozenset()
        self._order: tuple[str, ...] | None = ()
        """Those of the last step in turn; None once what is known of them is out of date."""
        self._spans = NO_SPANS
        self._neutral_T = np.zeros(0, np.int64)
        self._decode: _Decode | None = None
        """The rows of the last step, if it may tell those of the next."""

    def rows(self, layout: StepLayout) -> IntArray:
        """The steering row of each token of the step, int64 [T].

        The very array of the step before where nothing changed; not to be written.
        """
        self._follow(tuple(layout.req_ids))
        num_tokens = int(layout.query_start_loc[-1])
        if not self._steered:
            if len(self._neutral_T) != num_tokens:
                self._neutral_T = np.zeros(num_tokens, np.int64)
            return self._neutral_T
        if self._decode is not None and self._decode.still_holds(layout):
            return self._decode.rows_R
        rows_T, until_R = np.zeros(num_tokens, np.int64), np.full(len(layout.req_ids), ENDLESS)
        starts, first_positions = layout.query_start_loc, layout.first_positions
        loops.compiled().lay(*self._spans, starts, first_positions, rows_T, until_R)
        if num_tokens == len(layout.req_ids):
            self._decode = _Decode(rows_T, first_positions, until_R)
        return rows_T

    def forget(self, req_ids: Sequence[str]) -> None:
        """Requests that ended: an id may come back as another request."""
        if not req_ids:
            return
        for req_id in req_ids:
            self._leave(req_id)
        self._req_ids -= frozenset(req_ids)
        self._order = None

    def restamp(self, req_id: str) -> None:
        """The request's steering was changed: look it up again."""
        self._leave(req_id)
        self._req_ids -= {req_id}
        self._order = None

    def _follow(self, order: tuple[str, ...]) -> None:
        """Most steps have the requests of the step before, in the same order."""
        if order == self._order:
            return
        req_ids = frozenset(order)
        for req_id in self._req_ids - req_ids:
            self._leave(req_id)
        for req_id in req_ids - self._req_ids:
            self._join(req_id)
        self._req_ids, self._order, self._decode = req_ids, order, None
        self._spans = self._spans_of(order)

    def _spans_of(self, order: tuple[str, ...]) -> _Spans:
        steered = self._steered
        spans = [(r, *s) for r, i in enumerate(order) if i in steered for s in steered[i].spans]
        return _Spans(*np.array(spans, np.int64).T.copy()) if spans else NO_SPANS

    def _leave(self, req_id: str) -> None:
        member = self._steered.pop(req_id, None)
        if member is not None:
            for digest in member.digests:
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
        spans = tuple(
            Span(s.start, ENDLESS if s.end is None else s.end, rows[s.digest])
            for s in stamp.segments
        )
        self._steered[req_id] = _Member(frozenset(rows), spans)
