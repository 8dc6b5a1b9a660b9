"""Who waits for something to happen to one request. On the hub's loop, no thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiters:
    """By the client's id of the request."""

    def __init__(self) -> None:
        self._changed: dict[str, list[asyncio.Event]] = {}

    def __bool__(self) -> bool:
        return bool(self._changed)

    def tell(self, external_id: str) -> None:
        """Something happened to that request."""
        for changed in self._changed.get(external_id, ()):
            changed.set()

    async def until(self, external_id: str, is_there: Callable[[], bool], seconds: float) -> None:
        """Return once ``is_there`` holds, asked again at every change, or when time is up."""
        changed = asyncio.Event()
        waiting = self._changed.setdefault(external_id, [])
        waiting.append(changed)
        try:
            async with asyncio.timeout(seconds):
                while not is_there():
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            return
        finally:
            waiting.remove(changed)
            if not waiting:
                self._changed.pop(external_id, None)
