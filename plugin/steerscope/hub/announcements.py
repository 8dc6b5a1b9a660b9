"""Who waits for a request, and who watches them all. On the hub's loop, no thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from steerscope.telemetry.tracks import RequestTrack

MAX_WAITING_EVENTS = 1000
"""Events a slow consumer may be behind before it loses the oldest."""


class Event(NamedTuple):
    """A sequence started or finished; ``missed`` events were lost just before it."""

    track: RequestTrack
    finished: bool
    missed: int


@dataclass(slots=True)
class _Watcher:
    waiting: deque[tuple[RequestTrack, bool]]
    wake: asyncio.Event
    missed: int = 0

    def put(self, track: RequestTrack, finished: bool) -> None:
        if len(self.waiting) == MAX_WAITING_EVENTS:
            self.waiting.popleft()
            self.missed += 1
        self.waiting.append((track, finished))
        self.wake.set()

    async def events(self) -> AsyncIterator[Event]:
        while True:
            await self.wake.wait()
            self.wake.clear()
            while self.waiting:
                track, finished = self.waiting.popleft()
                missed, self.missed = self.missed, 0
                yield Event(track, finished, missed)


class Announcements:
    """The observer's listener: passes starts and ends on without ever waiting."""

    def __init__(self) -> None:
        self._watchers: list[_Watcher] = []
        self._changed: dict[str, list[asyncio.Event]] = {}

    def started(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        self._tell(track, finished=False)

    def finished(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        self._tell(track, finished=True)

    async def wait_for(
        self, external_id: str, is_there: Callable[[], bool], timeout: float
    ) -> None:
        """Return once ``is_there`` holds, asked again at every change, or when time is up."""
        changed = asyncio.Event()
        waiting = self._changed.setdefault(external_id, [])
        waiting.append(changed)
        try:
            async with asyncio.timeout(timeout):
                while not is_there():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return
        finally:
            waiting.remove(changed)
            if not waiting:
                self._changed.pop(external_id, None)

    @contextmanager
    def watching(self) -> Iterator[AsyncIterator[Event]]:
        """Every event from the moment the context is entered."""
        watcher = _Watcher(deque(), asyncio.Event())
        self._watchers.append(watcher)
        try:
            yield watcher.events()
        finally:
            self._watchers.remove(watcher)

    def _tell(self, track: RequestTrack, *, finished: bool) -> None:
        for changed in self._changed.get(track.start.external_id, ()):
            changed.set()
        for watcher in self._watchers:
            watcher.put(track, finished)
