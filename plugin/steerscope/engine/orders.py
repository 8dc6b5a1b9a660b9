"""Orders from the hub, carried out at a step boundary by the scheduler's half.

``OrderBook`` belongs to the scheduler's thread and holds what still waits; ``EngineLink`` is the
daemon thread that owns the socket. Between them are two queues, so that a step with nothing to
do costs one look at an empty queue.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass

import msgspec
import zmq

from steerscope.hub.doorbell import Doorbell, has_message
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
from steerscope.steering.interventions import SteeringSpec, check_spec, steering_digest
from steerscope.steering.rules import OverrideMode, SteeringSource
from steerscope.steering.stamp import Stamp

PRESENT_EVERY_SECONDS = 1.0
MAX_WAITING_ORDERS = 10_000
MAX_ANSWERS = 10_000

_log = logging.getLogger(__name__)

Stamps = Callable[[Iterable[str] | None], Mapping[str, tuple[Stamp, int]]]
"""Stamp and prompt length of those running requests, or of all."""

StampFrom = Callable[[int], Stamp | None]
"""The stamp that holds from a position on; None where it must not be changed."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What this engine allows; ``refused`` says why nothing may be steered, or is empty."""

    catalog_digest: str
    max_rows_per_request: int
    refused: str = ""


class EngineLink:
    """The engine core's socket to the hub, and the thread that owns it.

    ``stamps``: asked by that thread for every running request's stamp and prompt length.
    """

    def __init__(
        self,
        endpoint: str,
        engine: str,
        catalog_digest: str,
        stamps: Stamps,
    ) -> None:
        self._endpoint = endpoint
        self._stamps = stamps
        self._present = Present(ORDERS_VERSION, catalog_digest, engine, os.getpid())
        self.arrived: deque[Order | Withdraw | Standing] = deque(maxlen=MAX_WAITING_ORDERS)
        self._answers: deque[FromEngine] = deque(maxlen=MAX_ANSWERS)
        self._bell = Doorbell()
        threading.Thread(target=self._run, name="steerscope-orders", daemon=True).start()

    def answer(self, message: Applied | Declined) -> None:
        """Tell the hub; never waits."""
        self._answers.append(message)
        self._bell.ring()

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._bell.watch(socket)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(engines_address(self._endpoint))
        next_present = 0.0
        while True:
            if time.monotonic() >= next_present:
                next_present = time.monotonic() + PRESENT_EVERY_SECONDS
                _send(socket, self._present)
            while self._answers:
                _send(socket, self._answers.popleft())
            self._bell.wait(next_present - time.monotonic())
            while has_message(socket):
                self._receive(socket.recv())

    def _receive(self, payload: bytes) -> None:
        try:
            message = msgspec.msgpack.decode(payload, type=ToEngine)
            _check(message)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            _log.error("steerscope: the hub sent something malformed: %s", error)
            return
        if isinstance(message, Unwelcome):
            _log.error("steerscope: the hub refused this engine: %s", message.reason)
            return
        self.arrived.append(message)
        if isinstance(message, Order):  # looked at after it is there: none slips by in between
            running = [stamp.external_id for stamp, _ in self._stamps(None).values()]
            num_running = running.count(message.external_id)
            self._answers.append(Holding(message.order_id, num_running))
        elif isinstance(message, Standing):
            self._answers.append(Holding(message.order_id))


class OrderBook:
    """Orders that wait for their requests, and the standing one, which is for all of them.

    Only the scheduler's thread touches it. A request is looked at once for each message of the
    hub's, and so is one that comes later while an order waits or stands.
    """

    def __init__(
        self,
        arrived: deque[Order | Withdraw | Standing],
        answer: Callable[[Applied | Declined], None],
        limits: Limits,
        stamps: Stamps,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arrived = arrived
        self._answer = answer
        self._limits = limits
        self._stamps = stamps
        self._clock = clock
        self._waiting: dict[str, tuple[Order, float]] = {}
        """By external id: the newest order and when it expires."""
        self._standing: Standing | None = None
        self._standing_digest = ""
        self._looked_at: set[str] = set()
        """Running requests that are as the orders say, or cannot be."""

    @property
    def is_open(self) -> bool:
        """Whether an order waits or stands, or has arrived."""
        return bool(self._arrived or self._waiting or self._standing)

    def due(self, running: Set[str]) -> dict[str, StampFrom]:
        """Changes to make now, by request."""
        while self._arrived:
            self._take(self._arrived.popleft())
            self._looked_at.clear()
        new = running - self._looked_at
        if not new or not (self._waiting or self._standing):
            return {}
        self._looked_at |= new
        self._expire()
        found: dict[str, StampFrom] = {}
        met: set[str] = set()
        for request_id, (stamp, num_prompt_tokens) in self._stamps(new).items():
            if stamp.external_id in self._waiting:
                met.add(stamp.external_id)
                order = self._waiting[stamp.external_id][0]
                if not self._declines(order, request_id, stamp):
                    found[request_id] = self._change(order, request_id, stamp, num_prompt_tokens)
            if self._standing is not None and not self._holds(stamp):
                found[request_id] = self._change(
                    self._standing, request_id, stamp, num_prompt_tokens
                )
        for external_id in met:
            del self._waiting[external_id]
        return found

    def end(self, request_id: str) -> None:
        """The request ended; another one may come by its id."""
        self._looked_at.discard(request_id)

    def _take(self, message: Order | Withdraw | Standing) -> None:
        if isinstance(message, Order):
            self._waiting[message.external_id] = (message, self._clock() + message.ttl_seconds)
            return
        if isinstance(message, Standing):
            self._standing = None if message.mode is None else message
            self._standing_digest = steering_digest(
                self._limits.catalog_digest, message.interventions, message.max_dose
            )
            return
        for external_id, (order, _) in list(self._waiting.items()):
            if order.order_id == message.order_id:
                del self._waiting[external_id]

    def _expire(self) -> None:
        now = self._clock()
        for external_id in [e for e, (_, until) in self._waiting.items() if until <= now]:
            del self._waiting[external_id]

    def _declines(self, order: Order, request_id: str, stamp: Stamp) -> bool:
        """Whether something beats the order; then the hub is told."""
        reason = ""
        if self._standing is not None:
            reason = "an override is in force"
        elif stamp.source is SteeringSource.BOUND and not order.over_bound:
            reason = f"the request is bound by the rule {stamp.rule!r}, which takes the scope admin"
        if reason:
            self._answer(Declined(order.order_id, request_id, reason))
        return bool(reason)

    def _holds(self, stamp: Stamp) -> bool:
        """Whether the request is as the standing order says."""
        assert self._standing is not None
        if self._standing.mode is OverrideMode.OFF:
            return not stamp.current
        return stamp.source is SteeringSource.OVERRIDE and stamp.digest == self._standing_digest

    def _change(
        self, order: Order | Standing, request_id: str, stamp: Stamp, num_prompt_tokens: int
    ) -> StampFrom:
        spec = SteeringSpec(interventions=order.interventions, max_dose=order.max_dose)
        source = SteeringSource.OVERRIDE if isinstance(order, Standing) else SteeringSource.ORDERED

        def stamp_from(position: int) -> Stamp | None:
            changed = stamp.changed(
                position, order.policy, spec, self._limits.catalog_digest, num_prompt_tokens, source
            )
            refused = self._limits.refused if spec.interventions else ""
            if reason := refused or self._too_many(changed):
                self._answer(Declined(order.order_id, request_id, reason))
                return None
            self._answer(Applied(order.order_id, request_id, position, stamp.external_id))
            return changed

        return stamp_from

    def _too_many(self, changed: Stamp) -> str:
        """Rows of past steering are kept: a preempted request computes its past again."""
        distinct = len({segment.digest for segment in changed.segments})
        limit = self._limits.max_rows_per_request
        if distinct <= limit:
            return ""
        return f"past and present steering make {distinct} combinations of edits, {limit} allowed"


def _check(message: ToEngine) -> None:
    """Raise ``SpecError`` unless the edits are edits; none release a request."""
    if isinstance(message, Order | Standing) and message.interventions:
        check_spec(SteeringSpec(interventions=message.interventions, max_dose=message.max_dose))


def _send(socket: zmq.Socket[bytes], message: FromEngine) -> None:
    try:
        socket.send(msgspec.msgpack.encode(message), zmq.DONTWAIT)
    except zmq.ZMQError:
        _log.debug("steerscope: the hub takes no messages; a %s was lost", type(message).__name__)
