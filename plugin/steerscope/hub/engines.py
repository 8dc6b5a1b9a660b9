"""The hub's side of the orders' wire: engine cores, what they were asked, what they answered."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from steerscope.hub.orders import (
    ORDERS_VERSION,
    Applied,
    Declined,
    FromEngine,
    Order,
    Present,
    ToEngine,
    Unwelcome,
    Withdraw,
    engines_address,
)
from steerscope.steering.interventions import SteeringSpec

SILENT_AFTER_SECONDS = 10.0
"""An engine says that it is there every second; one that did not for so long is gone."""

REMEMBERED_SECONDS = 600.0
"""How long an order that expired can still be looked up."""

_log = logging.getLogger(__name__)


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

    @property
    def is_waiting(self) -> bool:
        """Whether no sequence has met it yet and it has not expired."""
        met = self.applied or self.declined
        return not met and time.monotonic() < self.expires_at


class EnginePlane:
    """Owns the engines' ROUTER socket. One per hub, on the hub's loop."""

    def __init__(self, endpoint: str, catalog_digest: str) -> None:
        self._catalog_digest = catalog_digest
        self._engines: dict[bytes, float] = {}
        self._orders: dict[int, Ordered] = {}
        self._by_external_id: dict[str, int] = {}
        self._ids = itertools.count(1)
        self._answered = asyncio.Condition()
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(engines_address(endpoint))

    async def run(self) -> None:
        """Serve until cancelled; a message that cannot be read is logged and dropped."""
        while True:
            parts = await self._socket.recv_multipart()
            try:
                identity, payload = parts
                message = msgspec.msgpack.decode(payload, type=FromEngine)
            except (ValueError, msgspec.MsgspecError) as error:
                _log.warning("malformed message from an engine: %s", error)
            else:
                await self._take(identity, message)
            await asyncio.sleep(0)  # a flood must not starve the other tasks

    async def steer(
        self,
        external_id: str,
        policy: str,
        spec: SteeringSpec,
        *,
        ttl_seconds: float,
        num_running: int,
        wait_seconds: float,
    ) -> Ordered:
        """Order it of every engine; wait for the answers of ``num_running`` sequences.

        It replaces an order for the same request that still waits.
        """
        self._forget_old()
        order = Order(
            next(self._ids), external_id, policy, spec.interventions, spec.max_dose, ttl_seconds
        )
        expire_time_ns = time.time_ns() + int(ttl_seconds * 1e9)
        ordered = Ordered(order, time.monotonic() + ttl_seconds, expire_time_ns)
        self._orders[order.order_id] = ordered
        self._by_external_id[external_id] = order.order_id
        await self._tell_all(order)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds if num_running else 0), self._answered:
                await self._answered.wait_for(
                    lambda: len(ordered.applied) + len(ordered.declined) >= num_running
                )
        return ordered

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
        self._socket.close()

    async def _take(self, identity: bytes, message: FromEngine) -> None:
        match message:
            case Present():
                await self._greet(identity, message)
            case Applied(order_id, request_id, position):
                await self._note(order_id, lambda o: o.applied.__setitem__(request_id, position))
            case Declined(order_id, request_id, reason):
                await self._note(order_id, lambda o: o.declined.__setitem__(request_id, reason))

    async def _greet(self, identity: bytes, present: Present) -> None:
        reason = self._refusal(present)
        if reason:
            await self._send(identity, Unwelcome(reason))
            return
        is_new = identity not in self._engines
        self._engines[identity] = time.monotonic()
        if is_new:
            for ordered in self._orders.values():
                if ordered.is_waiting:
                    left = ordered.expires_at - time.monotonic()
                    again = msgspec.structs.replace(ordered.order, ttl_seconds=left)
                    await self._send(identity, again)

    def _refusal(self, present: Present) -> str:
        if present.version != ORDERS_VERSION:
            return f"it speaks version {present.version} of orders, the hub {ORDERS_VERSION}"
        if present.catalog_digest != self._catalog_digest:
            return f"its catalog is {present.catalog_digest}, the hub's {self._catalog_digest}"
        return ""

    async def _note(self, order_id: int, note: Callable[[Ordered], None]) -> None:
        if (ordered := self._orders.get(order_id)) is None:
            return
        note(ordered)
        async with self._answered:
            self._answered.notify_all()

    async def _tell_all(self, message: ToEngine) -> None:
        silent = time.monotonic() - SILENT_AFTER_SECONDS
        for identity, heard_at in list(self._engines.items()):
            if heard_at < silent:
                del self._engines[identity]
            else:
                await self._send(identity, message)

    async def _send(self, identity: bytes, message: ToEngine) -> None:
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart([identity, msgspec.msgpack.encode(message)])

    def _forget_old(self) -> None:
        """Orders are few; those long expired are dropped when a new one comes."""
        horizon = time.monotonic() - REMEMBERED_SECONDS
        for order_id, ordered in list(self._orders.items()):
            if ordered.expires_at < horizon:
                del self._orders[order_id]
                if self._by_external_id.get(ordered.order.external_id) == order_id:
                    del self._by_external_id[ordered.order.external_id]
