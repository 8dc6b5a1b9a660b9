"""What admission said it asked for, to hold against what the workers say they did."""

from __future__ import annotations

from collections import OrderedDict


class AskedLog:
    """Steering digests by the client's request id; the oldest go first."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._digests: OrderedDict[str, str] = OrderedDict()

    def note(self, external_id: str, digest: str) -> None:
        """The request was admitted with that steering."""
        self._digests[external_id] = digest
        self._digests.move_to_end(external_id)
        while len(self._digests) > self._max_requests:
            self._digests.popitem(last=False)

    def digest(self, external_id: str) -> str:
        """What was asked; empty for nothing, or if it is not known (any more)."""
        return self._digests.get(external_id, "")
