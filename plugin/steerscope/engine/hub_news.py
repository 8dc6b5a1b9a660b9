"""What a hub must learn of requests, kept until a frame with it was sent.

A hub that goes away takes along what it knew: the next one is told anew of the requests that run,
and of those that ended meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set

import msgspec

from steerscope.engine.plan import RequestInfo, StepLayout
from steerscope.engine.roster import Roster
from steerscope.steering.interventions import canonical_json, steering_digest
from steerscope.steering.stamp import Stamp
from steerscope.telemetry.frames import (
    CachedActivations,
    RequestEnd,
    RequestStart,
    SteeringChange,
    without_cached,
)

MAX_CACHED_VALUES = 1 << 19
"""Kept activations of requests that start which may wait to be told, and one request's more."""

Reused = tuple[CachedActivations | None, int]
"""Of a request's first tokens: what is kept of them, and how many had their KV brought to them."""


class HubNews:
    """Who came, changed and ended.

    Args:
        catalog_digest: of the catalog that is served.
        roster: the requests, also those that end now.
        reused: asked for a request that did not compute its first positions, with their number.
        num_features: of all sites.
    """

    def __init__(
        self,
        catalog_digest: str,
        roster: Roster,
        reused: Callable[[str, int], Reused],
        num_features: int,
    ) -> None:
        self._catalog_digest = catalog_digest
        self._roster = roster
        self._reused = reused
        self._max_cached = MAX_CACHED_VALUES // num_features
        self.num_cached = 0
        """First positions of requests that start, of which something is kept, since last tried."""
        self._known: set[str] = set()
        """Requests that the hub was told of."""
        self._known_earlier: set[str] = set()
        """Requests that a hub knew which is gone."""
        self._started: dict[str, RequestStart] = {}
        self._resumed: dict[str, RequestStart] = {}
        """Of those that ended, which the hub does not know: an earlier one did."""
        self._leaving: dict[str, tuple[RequestInfo, int]] = {}
        """Of those that it does know, and their ends, for the case that it is gone."""
        self.ended: list[RequestEnd] = []
        self.changed: list[SteeringChange] = []

    @property
    def started(self) -> tuple[RequestStart, ...]:
        """Those that the hub does not know, or not any more."""
        return (*self._resumed.values(), *self._started.values())

    @property
    def is_full(self) -> bool:
        """Whether those that start should be told of at once."""
        return self.num_cached > self._max_cached

    def are_untold(self, req_ids: Iterable[str]) -> bool:
        """Whether the hub is still to be told that one of them started."""
        return not self._started.keys().isdisjoint(req_ids)

    def are_leaving(self, req_ids: Set[str]) -> bool:
        """Whether the hub is still to be told that one of them ended."""
        return any(end.request_id in req_ids for end in self.ended)

    def strangers(self, layout: StepLayout) -> set[str]:
        """Requests that the hub was not told of, and will not be by the next frame."""
        return set(layout.req_ids).difference(self._known, self._started)

    def start(self, layout: StepLayout, r: int) -> None:
        """The hub is to be told of the r-th request, with the first position it ever had."""
        req_id, position = layout.req_ids[r], int(layout.first_positions[r])
        info = self._roster.info(req_id)
        self._started[req_id] = (
            self._resumption(req_id, info, position)
            if req_id in self._known_earlier
            else self._request_start(req_id, info, position)
        )

    def change(self, req_id: str, position: int, stamp: Stamp) -> None:
        """A request's steering changed from ``position`` on."""
        self.changed.append(
            SteeringChange(
                req_id,
                position,
                stamp.policy,
                self._applied(stamp),
                canonical_json(stamp.current),
                stamp.source,
                stamp.asked,
            )
        )

    def concerns(self, req_id: str) -> bool:
        """Whether the hub knows the request, or will by the next frame."""
        return req_id in self._known or req_id in self._started

    def end(self, ended: Mapping[str, int]) -> bool:
        """Requests ended, which the roster still has; whether a response waits for a report.

        Only what a hub knows of is kept: none may ever take a frame again.
        """
        is_awaited = False
        for req_id, end in ended.items():
            self._started.pop(req_id, None)
            info = self._roster.info(req_id)
            if req_id in self._known:
                self._known.remove(req_id)
                self._leaving[req_id] = info, end
            elif req_id in self._known_earlier:
                self._known_earlier.remove(req_id)
                self._resumed[req_id] = self._resumption(req_id, info, end)
            else:
                continue
            self.ended.append(RequestEnd(req_id, end))
            is_awaited |= info.stamp is not None and info.stamp.is_awaited
        return is_awaited

    def begin_anew(self, layouts: Sequence[StepLayout]) -> None:
        """The hub is gone, and whatever it knew with it. ``layouts`` are told next."""
        self._known_earlier |= self._known
        self._known.clear()
        told_next: dict[str, int] = {}
        for layout in reversed(layouts):
            told_next |= zip(layout.req_ids, layout.first_positions.tolist(), strict=True)
        for req_id, (info, end) in self._leaving.items():
            position = told_next.get(req_id, end)
            self._resumed[req_id] = self._resumption(req_id, info, position)
        self._leaving.clear()
        for layout in layouts:
            strangers = self.strangers(layout).difference(self._resumed)
            for r in sorted(map(layout.req_ids.index, strangers)):
                self.start(layout, r)

    def told(self, with_ends: bool) -> None:
        """A frame with it was sent, with the ends only if that is so."""
        self._known.update(self._started)
        self._known_earlier.difference_update(self._started)
        for each in (self._started, self._resumed, self.changed):
            each.clear()
        if with_ends:
            self._leaving.clear()
            self.ended.clear()

    def lose_cached(self) -> None:
        """It could not be told: requests that start are told of without what is kept."""
        for req_id, start in self._started.items():
            self._started[req_id] = without_cached(start)

    def _resumption(self, req_id: str, info: RequestInfo, position: int) -> RequestStart:
        """For a hub that does not know the request; an earlier one knew it up to there."""
        start = self._request_start(req_id, info, 0)
        return msgspec.structs.replace(start, resumed_at=position)

    def _request_start(self, req_id: str, info: RequestInfo, first_position: int) -> RequestStart:
        stamp = info.stamp or Stamp(req_id)
        cached, num_external = self._reused(req_id, first_position) if first_position else (None, 0)
        if cached is not None:
            self.num_cached += first_position
        return RequestStart(
            request_id=req_id,
            external_id=stamp.external_id,
            num_prompt_tokens=info.num_prompt_tokens,
            first_position=first_position,
            policy=stamp.policy,
            digest=self._applied(stamp) if stamp.policy else "",
            interventions=canonical_json(stamp.current) if stamp.policy else b"",
            cached=cached,
            num_external=num_external,
            source=stamp.source,
            rule=stamp.rule,
            asked=stamp.asked,
            traceparent=stamp.traceparent,
        )

    def _applied(self, stamp: Stamp) -> str:
        """The digest of what this worker does, made from that and not copied from the stamp."""
        if not stamp.current:
            return ""
        return steering_digest(self._catalog_digest, stamp.current, stamp.max_dose)
