"""The scheduler's half: what the workers must know beside vLLM's own scheduler output.

It lives in the engine core, beside the scheduler, and speaks once per step through a
``StepNote`` that travels with the scheduler output to every rank, in step order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

from steerscope.engine.orders import OrderBook, StampFrom
from steerscope.steering.stamp import Stamp, encode


class StepNote(NamedTuple):
    """Rides on a step's scheduler output. Plain data: it is pickled by vLLM."""

    ended: dict[str, int]
    """Requests that ended since the last step, each with its end: positions below it, and no
    others, were computed for it; 0 where that is not known (it ended while preempted)."""
    computed: dict[str, int]
    """Speculative decoding: requests of the last step, each with the end of what was accepted."""
    stamps: dict[str, bytes]
    """Requests whose steering changes from this step on, each with its new stamp."""
    external: dict[str, tuple[int, int]]
    """Requests new in this step, each with the positions whose KV came from elsewhere."""


NO_NEWS = StepNote({}, {}, {}, {})
"""The note of a step of which there is nothing to say; never written to."""


class Running(Protocol):
    """What we need of a request that the scheduler holds."""

    @property
    def num_computed_tokens(self) -> int:
        """Positions below it were scheduled."""

    @property
    def num_tokens(self) -> int:
        """Prompt and accepted output."""

    @property
    def num_output_tokens(self) -> int:
        """Accepted output."""


class SchedulerSide:
    """Notes ends, acceptances and changes between one step and the next.

    Args:
        speculative: whether steps hold drafts, so that workers need to be told which
            of the tokens they computed were accepted.
        orders: what the hub asks for; None where there is no hub to ask.
    """

    def __init__(self, speculative: bool, orders: OrderBook | None = None) -> None:
        self._speculative = speculative
        self._orders = orders
        self._ended: dict[str, int] = {}
        self._scheduled: tuple[str, ...] = ()
        self._changes: dict[str, StampFrom] = {}

    def end(self, req_id: str, request: Running, has_unfed_token: bool) -> None:
        """The request ended; the last token sampled was not fed unless it was aborted."""
        known = request.num_tokens - has_unfed_token
        self._ended[req_id] = min(request.num_computed_tokens, known)
        self._changes.pop(req_id, None)
        if self._orders is not None:
            self._orders.end(req_id)

    def change(self, req_id: str, stamp_from: StampFrom) -> None:
        """Steer a request anew from its next step on; ``stamp_from`` takes the position."""
        self._changes[req_id] = stamp_from

    def before_step(
        self,
        requests: Mapping[str, Running],
        restamp: Callable[[str, int, Stamp], None],
    ) -> StepNote:
        """What this step's note says; called before the scheduler decides on the step.

        ``restamp`` is called with (request, first position, stamp) for each change.
        """
        if self._orders is not None and self._orders.is_open:
            self._changes.update(self._orders.due(requests.keys()))
        if not (self._ended or self._changes or self._speculative):
            return NO_NEWS
        computed = {
            req_id: requests[req_id].num_computed_tokens
            for req_id in self._scheduled
            if req_id in requests
        }
        ended, self._ended = self._ended, {}
        return StepNote(ended, computed, self._change(requests, restamp), {})

    def after_step(self, scheduled: Mapping[str, int]) -> None:
        """Remember who is in the step."""
        if self._speculative:
            self._scheduled = tuple(scheduled)

    def _change(
        self, requests: Mapping[str, Running], restamp: Callable[[str, int, Stamp], None]
    ) -> dict[str, bytes]:
        stamps: dict[str, bytes] = {}
        changes, self._changes = self._changes, {}
        for req_id, stamp_from in changes.items():
            if (request := requests.get(req_id)) is None:
                continue
            # A preempted request starts over, but what it said is said.
            said = request.num_tokens - 1 if request.num_output_tokens else 0
            first = max(request.num_computed_tokens, said)
            if (stamp := stamp_from(first)) is None:
                continue
            restamp(req_id, first, stamp)
            stamps[req_id] = encode(stamp)
        return stamps
