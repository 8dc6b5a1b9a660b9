"""A place for state that keeps nothing past the process, so that millions of stores are cheap."""

from __future__ import annotations

import asyncio

from steerscope.hub.storage.documents import (
    EMPTY,
    MAX_REQUESTS,
    Answered,
    Change,
    Snapshot,
    StaleStateError,
)


class MemoryStorage:
    """A ``PolicyStorage`` in memory."""

    def __init__(self) -> None:
        self._snapshot = EMPTY
        self._answered: dict[str, Answered] = {}

    @property
    def place(self) -> str:
        return "memory"

    async def open(self) -> None:
        pass

    async def load(self, unless: str = "") -> Snapshot | None:
        return None if unless == self._snapshot.mark else self._snapshot

    async def commit(self, base: Snapshot, change: Change) -> None:
        if base.mark != self._snapshot.mark:
            raise StaleStateError(f"{self.place}: the state has changed")
        self._snapshot = change.on(base)
        if (answer := change.answered) is not None:
            self._answered[answer.request_id] = answer
            while len(self._answered) > MAX_REQUESTS:
                del self._answered[next(iter(self._answered))]

    async def answered(self, request_id: str, since: int) -> Answered | None:
        answer = self._answered.get(request_id)
        return answer if answer is not None and answer.at >= since else None

    async def changes(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        pass
