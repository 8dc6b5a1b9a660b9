"""What admission said it asked for, to hold against what the workers say they did."""

from __future__ import annotations

from collections import OrderedDict


class AskedLog:
    """Steering digests by the client's request id; the oldest go first."""

    def __init__(self, max_requests: int) -> None:
        self._max_requests = max_requests
        self._digests: OrderedDict[str, str] = OrderedDict()
        self._changes: OrderedDict[str, str] = OrderedDict()

    def note(self, external_id: str, digest: str) -> None:
        """The request was admitted with that steering."""
        self._keep(self._digests, external_id, digest)

    def change(self, external_id: str, digest: str) -> None:
        """The request's steering was changed, now or before it came; empty for none."""
        self._keep(self._changes, external_id, digest)

    def digest(self, external_id: str) -> str:
        """What was asked; empty for nothing, or if it is not known (any more)."""
        changed = self._changes.get(external_id)
        return self._digests.get(external_id, "") if changed is None else changed

    def _keep(self, kept: OrderedDict[str, str], external_id: str, digest: str) -> None:
        kept[external_id] = digest
        kept.move_to_end(external_id)
        while len(kept) > self._max_requests:
            kept.popitem(last=False)
