"""Steering rows: one per distinct effective steering in the batch, shared by digest.

Row 0 is neutral. A row is held while a request that uses it is in vLLM's
persistent batch; capacity for every request to bring its own rows is there by
construction, so there is nothing to queue and nothing to refuse here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from steerscope.engine.reference import NEUTRAL_ROW


@dataclass(slots=True)
class _Row:
    index: int
    users: int


class RowTable:
    """Allocates rows by digest; an unused row keeps its content until it is needed.

    Args:
        capacity: rows beside the neutral one.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._rows: dict[str, _Row] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._never_used = iter(range(NEUTRAL_ROW + 1, NEUTRAL_ROW + 1 + capacity))

    @property
    def num_in_use(self) -> int:
        """Rows that some request holds."""
        return len(self._rows) - len(self._idle)

    def acquire(self, digest: str) -> tuple[int, bool]:
        """Take a hold of the row for ``digest``: its index, and whether it must be written."""
        row = self._rows.get(digest)
        if row is not None:
            self._idle.pop(digest, None)
            row.users += 1
            return row.index, False
        index = next(self._never_used, None)
        if index is None:
            oldest, _ = self._idle.popitem(last=False)
            index = self._rows.pop(oldest).index
        self._rows[digest] = _Row(index, 1)
        return index, True

    def release(self, digest: str) -> None:
        """Give one hold back."""
        row = self._rows[digest]
        row.users -= 1
        assert row.users >= 0, digest
        if row.users == 0:
            self._idle[digest] = None
