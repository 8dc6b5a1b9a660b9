"""What admission said it asked for, to hold against what the workers say they did."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable


class AskedLog:
    """Steering digests by the client's request id; the oldest go first.

    Args:
        max_requests: how many are remembered.
        recall_seconds: how long front ends may take to tell what they told an earlier hub.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        max_requests: int,
        recall_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._whole_from = clock() + recall_seconds
        self._max_requests = max_requests
        self._digests: OrderedDict[str, str] = OrderedDict()
        self._changes: OrderedDict[str, str] = OrderedDict()

    def note(self, external_id: str, digest: str) -> None:
        """The request was admitted with that steering."""
        self._keep(self._digests, external_id, digest)

    def change(self, external_id: str, digest: str) -> None:
        """The request's steering was changed, now or before it came; empty for none."""
        self._keep(self._changes, external_id, digest)

    def digest(self, external_id: str) -> str | None:
        """What was asked; empty for nothing, None while it may yet be told."""
        for told in (self._changes, self._digests):
            if (digest := told.get(external_id)) is not None:
                return digest
        return "" if self._clock() >= self._whole_from else None

    def _keep(self, kept: OrderedDict[str, str], external_id: str, digest: str) -> None:
        kept[external_id] = digest
        kept.move_to_end(external_id)
        while len(kept) > self._max_requests:
            kept.popitem(last=False)
