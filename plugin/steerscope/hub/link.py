"""The front end's side of the control wire: policies in, admissions and refusals out.

Used inside vLLM's front-end process (API server or ``LLM``). One daemon thread owns
the socket; callers read a snapshot that is replaced, never changed, and drop events
into a bounded queue. A hub that dies is not noticed by requests: the last snapshot
stays in force, and the thread greets the hub again when it is back and tells it what the one
before had been told.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Mapping
from types import MappingProxyType

import msgspec
import zmq

from steerscope.errors import HubError
from steerscope.hub.doorbell import Doorbell, has_message
from steerscope.hub.protocol import (
    PROTOCOL_VERSION,
    Ack,
    Admitted,
    Answer,
    FromFrontend,
    FromHub,
    Goodbye,
    Hello,
    MetricsAsked,
    Policies,
    Question,
    Recalled,
    Refused,
    Rejected,
    ReportAsked,
    control_address,
)
from steerscope.steering.interventions import Policy
from steerscope.steering.rules import Rules

START_TIMEOUT_SECONDS = 10.0
HELLO_EVERY_SECONDS = 1.0
ANSWER_TIMEOUT_SECONDS = 2.0
MAX_WAITING_EVENTS = 10_000
MAX_RECALLED = 10_000
"""Admissions that a hub which replaces another is told of: the newest."""

_log = logging.getLogger(__name__)


class FrontendLink:
    """Connects one front end with the hub.

    Args:
        endpoint: folder of the hub's sockets.
        catalog_digest: digest of the catalog this front end admits against.
    """

    def __init__(self, endpoint: str, catalog_digest: str) -> None:
        self._endpoint = endpoint
        self._hello = Hello(PROTOCOL_VERSION, catalog_digest, os.getpid())
        self._by_name: Mapping[str, Policy] = MappingProxyType({})
        self._expire_times: Mapping[str, int] = {}
        self._rules = Rules()
        self._waiting: deque[FromFrontend] = deque(maxlen=MAX_WAITING_EVENTS)
        self._admitted: OrderedDict[str, str] = OrderedDict()
        """The thread's own: digests of what was admitted."""
        self._lost_hub = False
        self._numbers = itertools.count(1)
        self._asked: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[bytes | None]]] = {}
        self._bell = Doorbell()
        self._answered = threading.Event()
        self._closing = threading.Event()
        self._refusal: str | None = None
        self._thread = threading.Thread(target=self._run, name="steerscope-link", daemon=True)

    @property
    def rules(self) -> Rules:
        """The rules in force."""
        return self._rules

    @property
    def policies(self) -> Mapping[str, Policy]:
        """The policies in force now, by name; those whose time is over are not, hub or no hub."""
        now = time.time_ns() // 1000
        over = {name for name, until in self._expire_times.items() if until <= now}
        if not over:
            return self._by_name
        return {name: policy for name, policy in self._by_name.items() if name not in over}

    def start(self, timeout: float = START_TIMEOUT_SECONDS) -> None:
        """Connect, and wait for the first policies; raise ``HubError`` if none come."""
        self._thread.start()
        if not self._answered.wait(timeout):
            raise HubError(f"the hub at {self._endpoint} did not answer in {timeout:.0f} s")
        if self._refusal is not None:
            raise HubError(f"the hub refused this front end: {self._refusal}")

    def admitted(self, external_id: str, policy: str, digest: str, asked: str = "") -> None:
        """Tell of a request admitted with steering. Never blocks, never raises."""
        self._leave(Admitted(external_id, policy, digest, asked))

    def rejected(self, external_id: str, policy: str, field: str, reason: str) -> None:
        """Tell of a request refused. Never blocks, never raises."""
        self._leave(Rejected(external_id, policy, field, reason))

    async def ask(self, what: ReportAsked | MetricsAsked) -> bytes | None:
        """The hub's answer; None where it has nothing to tell.

        Raises:
            HubError: it did not answer in time.
        """
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes | None] = loop.create_future()
        self._asked[number] = (loop, answer)
        self._leave(Question(number, what))
        try:
            return await asyncio.wait_for(answer, ANSWER_TIMEOUT_SECONDS)
        except TimeoutError:
            raise HubError(f"the hub did not answer in {ANSWER_TIMEOUT_SECONDS:g} s") from None
        finally:
            self._asked.pop(number, None)

    def close(self) -> None:
        """Say goodbye and stop the thread."""
        self._closing.set()
        self._bell.ring()
        self._thread.join(timeout=2.0)

    def _leave(self, event: FromFrontend) -> None:
        self._waiting.append(event)
        self._bell.ring()

    def _run(self) -> None:
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 500)
        partings: zmq.Socket[bytes] = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._bell.watch(socket)
        self._bell.watch(partings)
        socket.connect(control_address(self._endpoint))
        next_hello = 0.0
        while not self._closing.is_set():
            if time.monotonic() >= next_hello:
                next_hello = time.monotonic() + HELLO_EVERY_SECONDS
                _send(socket, self._hello)
            while self._waiting:
                self._tell(socket, self._waiting.popleft())
            self._bell.wait(next_hello - time.monotonic())
            while has_message(partings):
                partings.recv_multipart()
                self._lost_hub = True
            while has_message(socket):
                self._receive(socket)
        _send(socket, Goodbye())
        socket.disable_monitor()
        socket.close()

    def _tell(self, socket: zmq.Socket[bytes], event: FromFrontend) -> None:
        if isinstance(event, Admitted):
            self._admitted[event.external_id] = event.digest
            if len(self._admitted) > MAX_RECALLED:
                self._admitted.popitem(last=False)
        _send(socket, event)

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        try:
            message = msgspec.msgpack.decode(socket.recv(), type=FromHub)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            _log.error("steerscope: the hub sent something malformed: %s", error)
            return
        if self._lost_hub:
            self._lost_hub = False
            _send(socket, Recalled(dict(self._admitted)))
        match message:
            case Policies():
                self._take(message)
                _send(socket, Ack(message.revision))
            case Answer(number, body):
                if (asked := self._asked.pop(number, None)) is not None:
                    loop, answer = asked
                    loop.call_soon_threadsafe(_settle, answer, body)
                return
            case Refused(reason):
                self._refusal = reason
                _log.error("steerscope: the hub refused this front end: %s", reason)
        self._answered.set()

    def _take(self, in_force: Policies) -> None:
        """Policies first: rules never name one that is not there."""
        self._by_name = MappingProxyType({policy.name: policy for policy in in_force.policies})
        self._expire_times = in_force.expire_times
        if in_force.rules is not None:
            self._rules = in_force.rules


def _settle(answer: asyncio.Future[bytes | None], body: bytes | None) -> None:
    if not answer.done():
        answer.set_result(body)


def _send(socket: zmq.Socket[bytes], message: FromFrontend) -> None:
    """Hand over without waiting; what the hub cannot take now is lost, and was only a count."""
    try:
        socket.send(msgspec.msgpack.encode(message), zmq.DONTWAIT)
    except zmq.ZMQError:
        _log.debug("steerscope: the hub takes no messages; one %s was lost", type(message).__name__)
