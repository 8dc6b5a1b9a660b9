"""A feed: one bounded ring of events, in which each consumer is only a position.

Events are numbered from 1 whether or not they are kept, so that it is always known how many a
consumer has missed. On the hub's loop, no thread.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

from steerscope.errors import SpecError
from steerscope.hub.refusals import CursorLostError
from steerscope.hub.watches.cursors import FeedCursor, decode, encode

EVENT_BYTES = 512
"""What an event takes beside what it holds, about."""
EVENTS_BETWEEN_PAUSES = 64
"""A consumer that skips events must not starve the other tasks."""

Item = TypeVar("Item")


class Event(NamedTuple, Generic[Item]):
    """One event; ``missed`` were lost just before it, ``cursor`` says where it is."""

    item: Item
    missed: int
    cursor: str


class Feed(Generic[Item]):
    """Keeps events while somebody watches, and for a while after, so that they can resume.

    Args:
        name: tells the cursors of this feed from those of others.
        hub: the id of this hub.
        max_bytes: the oldest events go beyond it.
        linger_seconds: how long to go on keeping events after the last watcher left.
    """

    def __init__(self, name: str, hub: str, max_bytes: int, linger_seconds: float) -> None:
        self._name = name
        self._hub = hub
        self._max_bytes = max_bytes
        self._linger_seconds = linger_seconds
        self._items: deque[tuple[Item, int]] = deque()
        """The newest events, without a gap up to ``last``, and what each takes."""
        self._num_bytes = 0
        self._num_watchers = 0
        self._forgetting: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self.last = 0
        """The number of the newest event."""

    @property
    def is_kept(self) -> bool:
        """Whether events are worth making: someone watches, or has just done so."""
        return self._num_watchers > 0 or self._forgetting is not None

    @property
    def num_bytes(self) -> int:
        """What the kept events take, about."""
        return self._num_bytes

    def append(self, item: Item, num_bytes: int) -> None:
        """Add an event, which takes so many bytes; only while ``is_kept``."""
        self._items.append((item, num_bytes + EVENT_BYTES))
        self._num_bytes += num_bytes + EVENT_BYTES
        while self._num_bytes > self._max_bytes and len(self._items) > 1:
            self._num_bytes -= self._items.popleft()[1]
        self.last += 1
        self._news.set()

    def add(self, make: Callable[[], tuple[Item, int]]) -> None:
        """Count an event, and make and append it (with what it takes) while ``is_kept``."""
        if self.is_kept:
            self.append(*make())
        else:
            self.skip()

    def skip(self, num_events: int = 1) -> None:
        """Count events that nobody is there for."""
        self.last += num_events

    @contextmanager
    def watching(self, cursor: str) -> Iterator[AsyncIterator[Event[Item]]]:
        """Every event after the cursor's, or from now on if that is empty.

        Raises:
            SpecError: it is not a cursor of this feed.
            CursorLostError: it is of another hub, or of the future.
        """
        position = self._position(cursor)
        if self._forgetting is not None:
            self._forgetting.cancel()
            self._forgetting = None
        self._num_watchers += 1
        try:
            yield self._after(position)
        finally:
            self._num_watchers -= 1
            if not self._num_watchers:
                loop = asyncio.get_running_loop()
                self._forgetting = loop.call_later(self._linger_seconds, self._forget)

    def _position(self, cursor: str) -> int:
        if not cursor:
            return self.last
        known = decode(cursor, FeedCursor)
        if known.feed != self._name:
            raise SpecError("cursor", f"is one of {known.feed[:80]!r}")
        if known.hub != self._hub:
            raise CursorLostError("the cursor is of another hub, or of one that was restarted")
        if known.number > self.last:
            raise CursorLostError("the cursor is of an event that has not happened")
        return known.number

    async def _after(self, number: int) -> AsyncIterator[Event[Item]]:
        while True:
            while number == self.last or not self._items:
                self._news.clear()
                await self._news.wait()
            oldest = self.last - len(self._items) + 1
            missed = max(oldest - number - 1, 0)
            number += missed + 1
            item, _ = self._items[number - oldest]
            yield Event(item, missed, encode(FeedCursor(self._hub, self._name, number)))
            if number % EVENTS_BETWEEN_PAUSES == 0:
                await asyncio.sleep(0)

    def _forget(self) -> None:
        self._forgetting = None
        self._items.clear()
        self._num_bytes = 0
