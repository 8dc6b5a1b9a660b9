"""The front end's side of the control wire: policies in, admissions and refusals out.

Used inside vLLM's front-end process (API server or ``LLM``). One daemon thread owns the socket
that is answered on; callers read a snapshot that is replaced, never changed. Events go by a socket
of their own, from whichever thread has one, since to wake a thread of ours for each would take the
interpreter from an engine in the same process. A hub that dies is not noticed by requests: the
last snapshot stays in force, and the thread greets the hub again when it is back and tells it what
the one before had been told.
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
        self._waiting: deque[Question] = deque()
        self._events = _Events(endpoint)
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
        self._events.open()
        self._thread.start()
        if not self._answered.wait(timeout):
            raise HubError(f"the hub at {self._endpoint} did not answer in {timeout:.0f} s")
        if self._refusal is not None:
            raise HubError(f"the hub refused this front end: {self._refusal}")

    def admitted(self, external_id: str, policy: str, digest: str, asked: str = "") -> None:
        """Tell of a request admitted with steering. Never blocks, never raises."""
        self._events.admitted(Admitted(external_id, policy, digest, asked))

    def rejected(self, external_id: str, policy: str, field: str, reason: str) -> None:
        """Tell of a request refused. Never blocks, never raises."""
        self._events.send(Rejected(external_id, policy, field, reason))

    async def ask(self, what: ReportAsked | MetricsAsked) -> bytes | None:
        """The hub's answer; None where it has nothing to tell.

        Raises:
            HubError: it did not answer in time.
        """
        number = next(self._numbers)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[bytes | None] = loop.create_future()
        self._asked[number] = (loop, answer)
        self._waiting.append(Question(number, what))
        self._bell.ring()
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
        self._events.close()

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
                _send(socket, self._waiting.popleft())
            self._bell.wait(next_hello - time.monotonic())
            while has_message(partings):
                partings.recv_multipart()
                self._lost_hub = True
            while has_message(socket):
                self._receive(socket)
        _send(socket, Goodbye())
        socket.disable_monitor()
        socket.close()

    def _receive(self, socket: zmq.Socket[bytes]) -> None:
        try:
            message = msgspec.msgpack.decode(socket.recv(), type=FromHub)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            _log.error("steerscope: the hub sent something malformed: %s", error)
            return
        if self._lost_hub:
            self._lost_hub = False
            _send(socket, Recalled(self._events.recall()))
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


class _Events:
    """Tells the hub of requests, from any thread."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._socket: zmq.Socket[bytes] | None = None
        self._admitted: OrderedDict[str, str] = OrderedDict()
        """Digests, by the client's request id."""

    def open(self) -> zmq.Socket[bytes]:
        """The socket, which finds the hub by itself."""
        if self._socket is None:
            self._socket = zmq.Context.instance().socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 500)
            self._socket.setsockopt(zmq.SNDHWM, MAX_WAITING_EVENTS)
            self._socket.connect(control_address(self._endpoint))
        return self._socket

    def admitted(self, event: Admitted) -> None:
        """Tell of it, and remember it for the next hub."""
        with self._lock:
            self._admitted[event.external_id] = event.digest
            if len(self._admitted) > MAX_RECALLED:
                self._admitted.popitem(last=False)
            _send(self.open(), event)

    def send(self, event: Rejected) -> None:
        """Tell of it."""
        with self._lock:
            _send(self.open(), event)

    def recall(self) -> dict[str, str]:
        """Digests of the newest requests admitted."""
        with self._lock:
            return dict(self._admitted)

    def close(self) -> None:
        """Free the socket."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _settle(answer: asyncio.Future[bytes | None], body: bytes | None) -> None:
    if not answer.done():
        answer.set_result(body)


def _send(socket: zmq.Socket[bytes], message: FromFrontend) -> None:
    """Hand over without waiting; what the hub cannot take now is lost, and was only a count."""
    try:
        socket.send(msgspec.msgpack.encode(message), zmq.DONTWAIT)
    except zmq.ZMQError:
        _log.debug("steerscope: the hub takes no messages; one %s was lost", type(message).__name__)
