"""The state as this hub last knew it, and the one way to change it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from steerscope.hub.storage.documents import (
    EMPTY,
    Answered,
    Change,
    PolicyStorage,
    Snapshot,
    StaleStateError,
    StateAwayError,
    StateError,
    next_mark,
)

MAX_ATTEMPTS = 20
"""How often a change is decided anew because others changed the state meanwhile."""
POLL_SECONDS = 0.4
"""How often a shared state is looked at, in case its news got lost."""

_log = logging.getLogger(__name__)

Outcome = TypeVar("Outcome")


class SharedState:
    """A snapshot that follows its storage. On the hub's loop.

    Args:
        storage: where the state is kept.
        adopt: called with every new snapshot.
    """

    def __init__(self, storage: PolicyStorage, adopt: Callable[[Snapshot], None]) -> None:
        self.snapshot: Snapshot = EMPTY
        self.trouble = ""
        """Why the storage cannot be read; empty while it can."""
        self.is_known = False
        """Whether the storage was ever read."""
        self._storage = storage
        self._tell = adopt
        self._lock = asyncio.Lock()

    async def open(self) -> None:
        """Read what is kept. Raises ``StateError``; a storage that is away may come back."""
        try:
            await self._storage.open()
            snapshot = await self._storage.load()
        except StateAwayError as error:
            self.trouble = str(error)
            _log.warning("only declared policies are in force until it is back: %s", error)
        else:
            self._adopt(snapshot or EMPTY)

    async def close(self) -> None:
        """Let go of the storage."""
        await self._storage.close()

    async def answered(self, request_id: str, since: int) -> Answered | None:
        """What a request of that id got, if that was at ``since`` or later."""
        return await self._storage.answered(request_id, since)

    async def settle(
        self, decide: Callable[[], Awaitable[tuple[Outcome, Change | None]]]
    ) -> Outcome:
        """Decide on the latest state, store the change, and adopt it; ``StateError`` if not.

        ``decide`` may be called more than once; what it raises is raised.
        """
        self._check_there()  # the lock may be held by who waits for it to come back
        async with self._lock:
            self._check_there()
            try:
                return await self._settle(decide)
            except StateAwayError as error:
                self._note(str(error))  # so that those who wait for the lock do not wait again
                raise

    async def follow(self, tell: Callable[[bool], Awaitable[None]]) -> None:
        """Take over what others change, until cancelled; ``tell`` whether the state is there."""
        told: bool | None = None
        while True:
            await self._sync()
            is_there = not self.trouble
            if is_there is not told:
                await tell(is_there)
                told = is_there
            await self._storage.changes(POLL_SECONDS)

    def _check_there(self) -> None:
        if self.trouble:
            raise StateAwayError(self.trouble)

    async def _settle(
        self, decide: Callable[[], Awaitable[tuple[Outcome, Change | None]]]
    ) -> Outcome:
        for _ in range(MAX_ATTEMPTS):
            with contextlib.suppress(StaleStateError):
                await self._refresh()
                outcome, change = await decide()
                if change is not None:
                    await self._storage.commit(self.snapshot, change)
                    self._adopt(change.on(self.snapshot))
                return outcome
        raise StateError(f"{self._storage.place}: others change it too fast; ask again")

    async def _sync(self) -> None:
        try:
            async with self._lock:
                await self._refresh()
        except StaleStateError:
            return  # somebody else restores it; the next round will see
        except StateError as error:
            self._note(str(error))
        else:
            self._note("")

    def _note(self, trouble: str) -> None:
        if trouble and not self.trouble:
            _log.warning("policies stay as last known: %s", trouble)
        if self.trouble and not trouble:
            _log.warning("%s is back", self._storage.place)
        self.trouble = trouble

    async def _refresh(self) -> None:
        found = await self._storage.load(unless=self.snapshot.mark)
        if found is not None and found.revision < self.snapshot.revision:
            found = await self._restored(found)
        if found is not None:
            self._adopt(found)

    async def _restored(self, found: Snapshot) -> Snapshot:
        """The state, put back into a storage that lost what it had acknowledged."""
        _log.warning("%s lost changes: restoring them", self._storage.place)
        kept = self.snapshot.documents
        change = Change(
            mark=next_mark(self.snapshot.revision + 1),
            put=tuple(kept.values()),
            drop=tuple(found.documents.keys() - kept.keys()),
            rules=self.snapshot.rules,
        )
        await self._storage.commit(found, change)
        return change.on(found)

    def _adopt(self, snapshot: Snapshot) -> None:
        self._tell(snapshot)
        self.snapshot = snapshot
        self.is_known = True
