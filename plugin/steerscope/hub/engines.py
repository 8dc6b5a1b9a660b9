"""The hub's side of the orders' wire: engine cores, what they were asked, what they answered."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from steerscope.hub.orders import (
    ORDERS_VERSION,
    Applied,
    Declined,
    FromEngine,
    Holding,
    Order,
    Present,
    Standing,
    ToEngine,
    Unwelcome,
    Withdraw,
    engines_address,
)
from steerscope.hub.router import Router
from steerscope.steering.admission import NO_STEERING
from steerscope.steering.interventions import SteeringSpec
from steerscope.steering.rules import OverrideMode

SILENT_AFTER_SECONDS = 10.0
"""An engine says that it is there every second; one that did not for so long is gone."""

HOLD_SECONDS = 2.0
"""How long to wait for engines to have an order."""

MAX_TOLD = 1000
"""How many sequences that a standing order changed, or could not, are remembered."""

REMEMBERED_SECONDS = 600.0
"""How long an order that expired can still be looked up."""


@dataclass(slots=True)
class Ordered:
    """One order and what became of it so far."""

    order: Order
    expires_at: float
    """On the monotonic clock."""
    expire_time_ns: int
    """The same since 1970, for people."""
    applied: dict[str, int] = field(default_factory=dict)
    """By sequence: the first position that is steered so."""
    declined: dict[str, str] = field(default_factory=dict)
    holding: dict[bytes, int] = field(default_factory=dict)
    """Engines that have it, each with how many sequences of the request ran there then."""

    @property
    def num_answers(self) -> int:
        """Sequences that have met it."""
        return len(self.applied) + len(self.declined)

    @property
    def is_waiting(self) -> bool:
        """Whether no sequence has met it yet and it has not expired."""
        return not self.num_answers and time.monotonic() < self.expires_at


@dataclass(slots=True)
class Held:
    """A standing order and what became of it so far."""

    order: Standing
    holding: set[bytes] = field(default_factory=set)
    """Engines that have it."""
    applied: dict[str, Applied] = field(default_factory=dict)
    """By sequence."""
    declined: dict[str, str] = field(default_factory=dict)


class EnginePlane:
    """The engines' router. One per hub, on the hub's loop.

    Args:
        endpoint: folder of the hub's sockets.
        catalog_digest: of the catalog that the hub serves.
        overridden: told of each running sequence that a standing order changed.
    """

    def __init__(
        self,
        endpoint: str,
        catalog_digest: str,
        overridden: Callable[[Standing, Applied], None] = lambda *_: None,
    ) -> None:
        self._catalog_digest = catalog_digest
        self._overridden = overridden
        self._held: Held | None = None
        """None while it is not known what holds: engines then keep what they have."""
        self._engines: dict[bytes, float] = {}
        self._orders: dict[int, Ordered] = {}
        self._by_external_id: dict[str, int] = {}
        self._ids = itertools.count(time.time_ns() // 1000)
        """Engines may still answer an earlier hub's orders: no number is used again."""
        self._answered = asyncio.Condition()
        self._router: Router[FromEngine] = Router(
            engines_address(endpoint), FromEngine, "an engine"
        )

    async def run(self) -> None:
        """Serve until cancelled; a message that cannot be read is logged and dropped."""
        await self._router.run(self._take)

    async def steer(
        self,
        external_id: str,
        policy: str,
        spec: SteeringSpec,
        *,
        ttl_seconds: float,
        num_running: int,
        wait_seconds: float,
        over_bound: bool = False,
    ) -> Ordered:
        """Order it of every engine; wait for the answers of ``num_running`` sequences.

        Where none is known to run, wait a little for the engines to have it: a request that is
        sent after the answer then meets it. They say whether one runs that is not told of yet.

        It replaces an order for the same request that still waits. ``over_bound``: whether it
        may beat a binding.
        """
        self._forget_old()
        order = Order(
            next(self._ids),
            external_id,
            policy,
            spec.interventions,
            spec.max_dose,
            ttl_seconds,
            over_bound,
        )
        expire_time_ns = time.time_ns() + int(ttl_seconds * 1e9)
        ordered = Ordered(order, time.monotonic() + ttl_seconds, expire_time_ns)
        self._orders[order.order_id] = ordered
        self._by_external_id[external_id] = order.order_id
        await self._tell_all(order)

        if num_running:
            await self._until(lambda: ordered.num_answers >= num_running, wait_seconds)
        else:
            await self._until(
                lambda: (
                    ordered.holding.keys() >= self._engines.keys()
                    and ordered.num_answers >= sum(ordered.holding.values())
                ),
                min(HOLD_SECONDS, wait_seconds),
            )
        return ordered

    async def hold(
        self,
        mode: OverrideMode | None,
        policy: str = "",
        spec: SteeringSpec = NO_STEERING,
        *,
        running: Iterable[str] = (),
    ) -> Held:
        """Make this the standing order of every engine; nothing happens if it is already.

        Waits a little for the engines to have it, and to have reached the sequences ``running``.
        """
        if self._held is None or not _is_same(self._held.order, mode, policy, spec):
            order = Standing(next(self._ids), mode, policy, spec.interventions, spec.max_dose)
            self._held = Held(order)
            await self._tell_all(order)
        held, awaited = self._held, frozenset(running)
        await self._until(
            lambda: (
                held.holding.issuperset(self._engines)
                and awaited <= held.applied.keys() | held.declined.keys()
            ),
            HOLD_SECONDS,
        )
        return held

    async def withdraw(self, external_id: str) -> bool:
        """Void the order that waits for this request; whether there was one."""
        ordered = self.ordered(external_id)
        if ordered is None or not ordered.is_waiting:
            return False
        del self._orders[ordered.order.order_id]
        del self._by_external_id[external_id]
        await self._tell_all(Withdraw(ordered.order.order_id))
        return True

    def ordered(self, external_id: str) -> Ordered | None:
        """The newest order for the request that is remembered."""
        order_id = self._by_external_id.get(external_id)
        return None if order_id is None else self._orders[order_id]

    def close(self) -> None:
        """Free the socket."""
        self._router.close()

    async def _until(self, is_settled: Callable[[], bool], seconds: float) -> None:
        """Wait for the engines' answers, but no longer than that."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._answered:
                await self._answered.wait_for(is_settled)

    async def _take(self, identity: bytes, message: FromEngine) -> None:
        match message:
            case Present():
                await self._greet(identity, message)
            case Applied(order_id) | Declined(order_id) | Holding(order_id):
                if self._held is not None and order_id == self._held.order.order_id:
                    self._note_held(self._held, identity, message)
                elif (ordered := self._orders.get(order_id)) is not None:
                    _note_ordered(ordered, identity, message)
                async with self._answered:
                    self._answered.notify_all()

    async def _greet(self, identity: bytes, present: Present) -> None:
        reason = self._refusal(present)
        if reason:
            await self._router.send(identity, Unwelcome(reason))
            return
        is_new = identity not in self._engines
        self._engines[identity] = time.monotonic()
        if is_new:
            if self._held is not None:
                await self._router.send(identity, self._held.order)
            for ordered in self._orders.values():
                if ordered.is_waiting:
                    left = ordered.expires_at - time.monotonic()
                    again = msgspec.structs.replace(ordered.order, ttl_seconds=left)
                    await self._router.send(identity, again)

    def _refusal(self, present: Present) -> str:
        if present.version != ORDERS_VERSION:
            return f"it speaks version {present.version} of orders, the hub {ORDERS_VERSION}"
        if present.catalog_digest != self._catalog_digest:
            return f"its catalog is {present.catalog_digest}, the hub's {self._catalog_digest}"
        return ""

    def _note_held(
        self, held: Held, identity: bytes, message: Applied | Declined | Holding
    ) -> None:
        match message:
            case Applied(_, request_id):
                held.applied[request_id] = message
                self._overridden(held.order, message)
            case Declined(_, request_id, reason):
                held.declined[request_id] = reason
            case Holding():
                held.holding.add(identity)
        for known in (held.applied, held.declined):
            while len(known) > MAX_TOLD:
                del known[next(iter(known))]

    async def _tell_all(self, message: ToEngine) -> None:
        silent = time.monotonic() - SILENT_AFTER_SECONDS
        for identity, heard_at in list(self._engines.items()):
            if heard_at < silent:
                del self._engines[identity]
            else:
                await self._router.send(identity, message)

    def _forget_old(self) -> None:
        """Orders are few; those long expired are dropped when a new one comes."""
        horizon = time.monotonic() - REMEMBERED_SECONDS
        for order_id, ordered in list(self._orders.items()):
            if ordered.expires_at < horizon:
                del self._orders[order_id]
                if self._by_external_id.get(ordered.order.external_id) == order_id:
                    del self._by_external_id[ordered.order.external_id]


def _note_ordered(ordered: Ordered, identity: bytes, message: Applied | Declined | Holding) -> None:
    match message:
        case Holding(_, num_running):
            ordered.holding.setdefault(identity, num_running)
        case Applied(_, request_id, position):
            ordered.applied[request_id] = position
        case Declined(_, request_id, reason):
            ordered.declined[request_id] = reason


def _is_same(order: Standing, mode: OverrideMode | None, policy: str, spec: SteeringSpec) -> bool:
    there = (order.mode, order.policy, order.interventions, order.max_dose)
    return there == (mode, policy, spec.interventions, spec.max_dose)
