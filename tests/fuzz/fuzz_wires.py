"""What our own processes send each other: the hub, a front end or an engine must outlive all of it.

Sockets are stood in for by one that gives out the input's messages; everything behind is real.
An input is a MessagePack array of messages; anything else is one message as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections import deque
from collections.abc import Coroutine
from typing import Any

import msgspec
from fuzz_world import SETTINGS, catalog, folder
from steerscope.catalog.model import ModelMatch
from steerscope.config import HubSettings, Settings
from steerscope.engine.orders import EngineLink, OrderBook
from steerscope.engine.orders import Limits as EngineLimits
from steerscope.errors import SpecError
from steerscope.export import instruments
from steerscope.hub.control import ControlPlane
from steerscope.hub.conversions import report_message
from steerscope.hub.link import FrontendLink
from steerscope.hub.server import Hub
from steerscope.hub.watches.listening import Watches
from steerscope.steering import stamp
from steerscope.steering.admission import Admission
from steerscope.steering.stamp import Stamp
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.observer import Observer
from steerscope.telemetry.requests import Limits
from steerscope.telemetry.totals import FrameLoss, HubTotals
from steerscope.telemetry.tracks import RequestTrack

NOW_NS = 10**12
MAX_TRACKS = 32
MAX_TOKENS = 64

_ARRAY = msgspec.msgpack.Decoder(list[msgspec.Raw])


def messages(data: bytes) -> list[bytes]:
    """The input's messages."""
    try:
        found = [bytes(message) for message in _ARRAY.decode(data)]
    except (msgspec.MsgspecError, RecursionError):
        return [data]
    # A frame is an array itself, but not one of arrays or maps only.
    return found if all(_is_message(first) for first, *_ in found) else [data]


def _is_message(first: int) -> bool:
    """Whether a value that begins so is an array or a map."""
    return first & 0xE0 == 0x80 or 0xDC <= first <= 0xDF


class _Seen(Watches):
    """What tells watchers, and every track that was told of."""

    def __init__(self) -> None:
        super().__init__(catalog(), AskedLog(MAX_TRACKS), ModelMatch.EXACT)
        self.tracks: list[RequestTrack] = []
        for feed in (self.requests, self.signals, self.activations):
            feed._num_watchers = 1

    def started(self, track: RequestTrack) -> None:
        self.tracks.append(track)
        super().started(track)


def frames(data: bytes) -> bool:
    """Frames of workers, through the observer to the reports that callers get."""
    seen, totals = _Seen(), HubTotals()
    bounds = instruments.bounds_for(catalog())
    limits = Limits(MAX_TRACKS, 60.0, MAX_TOKENS)
    observer = Observer(
        catalog(), limits, bounds, totals, seen, lambda policy: "unknown", seen.computed
    )
    sent = messages(data)
    for payload in sent:
        observer.take(payload, NOW_NS)
    for external_id in {track.start.external_id for track in seen.tracks}:
        _check_report(observer, external_id)
    for engine in observer.engines.values():
        assert all(count >= 0 for count in engine.frames_lost.values())
        assert all(count >= 0 for count in engine.unobserved.values())
        for histogram in (engine.activation, engine.score, engine.dose, engine.lag):
            assert all(map(math.isfinite, histogram.sums))
            assert histogram.counts.min() >= 0
    observer.expire(NOW_NS + 10**12)
    return totals.frames_lost[FrameLoss.MALFORMED] < len(sent)


def _check_report(observer: Observer, external_id: str) -> None:
    tracks = observer.ledger.report(external_id)
    for track in tracks:
        assert all(s.score is None or 0.0 <= s.score <= 1.0 for s in track.scores)
        assert track.num_observed <= track.end
    message = report_message(external_id, tracks, catalog(), "", ModelMatch.EXACT)
    message.SerializeToString()


class _Socket:
    """Gives out what it was given, then ends the task that asks."""

    def __init__(self, sent: list[bytes], as_router: bool) -> None:
        self._sent = deque(sent)
        self._as_router = as_router
        self.answers: list[Any] = []

    async def recv_multipart(self) -> list[bytes]:
        if not self._sent:
            raise asyncio.CancelledError
        return [b"peer", self._sent.popleft()]

    def recv(self) -> bytes:
        return self._sent.popleft()

    def send(self, payload: bytes, flags: int = 0) -> None:
        self.answers.append(payload)

    async def send_multipart(self, parts: list[bytes]) -> None:
        self.answers.append(parts)


@functools.cache
def hub() -> Hub:
    """A whole hub that does not serve."""
    settings = Settings(
        catalog=str(catalog().folder), hub=HubSettings(max_reports=8), steering=SETTINGS
    )
    endpoint = folder() / "endpoint"
    endpoint.mkdir()

    async def made() -> Hub:
        return Hub(settings, str(endpoint))

    return asyncio.run(made())


def run_to_end(task: Coroutine[Any, Any, Any]) -> Any:
    """Drive what never really waits; no loop is needed."""
    try:
        while True:
            task.send(None)
    except asyncio.CancelledError:
        return None
    except StopIteration as done:
        return done.value


def control(data: bytes) -> bool:
    """From front ends to the hub, with what it answers to their questions."""
    plane = hub()._control
    plane._front_ends.clear()
    plane._router._socket = socket = _Socket(messages(data), as_router=True)
    loop, lost = _loop()
    loop.run_until_complete(_served(plane))
    assert not lost, lost
    plane._all_acked(1)
    return bool(socket.answers)


async def _served(plane: ControlPlane) -> None:
    """Until the input is over; a question that waits is not waited for."""
    with contextlib.suppress(asyncio.CancelledError):
        await plane.run()
    for task in tuple(plane._answering):
        task.cancel()
    await asyncio.sleep(0)


@functools.cache
def _loop() -> tuple[asyncio.AbstractEventLoop, list[Any]]:
    """A loop, and the exceptions of tasks that nobody waited for."""
    loop, lost = asyncio.new_event_loop(), list[Any]()
    loop.set_exception_handler(lambda _, context: lost.append(context))
    return loop, lost


def from_hub(data: bytes) -> bool:
    """From the hub to a front end: every policy named can be asked for, or is refused."""
    link = FrontendLink(str(folder()), catalog().digest)
    sent = messages(data)
    socket = _Socket(sent, as_router=False)
    for _ in sent:
        link._receive(socket)
    admission = Admission(catalog(), SETTINGS, lambda: link.policies)
    for name in link.policies:
        try:
            asked = admission.resolve({"steering": name})
            stamp.encode(admission.stamp("id", asked, 5))
        except SpecError:
            continue
    return bool(socket.answers)


def engines(data: bytes) -> bool:
    """From engine cores to the hub."""
    plane = hub()._engines
    plane._engines.clear()
    plane._orders.clear()
    order = plane.steer("id", "inline", _spec(), ttl_seconds=60.0, num_running=0, wait_seconds=0.0)
    _loop()[0].run_until_complete(order)
    (ordered,) = plane._orders.values()
    ordered.order = msgspec.structs.replace(ordered.order, order_id=1)
    plane._orders = {1: ordered}
    plane._router._socket = _Socket(messages(data), as_router=True)
    run_to_end(plane.run())
    _sequences(ordered).SerializeToString()
    return bool(ordered.applied or ordered.declined or plane._engines)


def orders(data: bytes) -> bool:
    """From the hub to an engine core: what the scheduler's half makes of it."""
    link = EngineLink.__new__(EngineLink)  # without the thread that owns a socket
    link.arrived, link._answers = deque(maxlen=100), deque(maxlen=100)
    link._stamps = lambda _: {"r1": (Stamp("id"), 5)}
    for payload in messages(data):
        link._receive(payload)
    taken, answers = bool(link.arrived), []
    running = {"r1": (Stamp("id"), 5), "r2": (Stamp("other", policy="inline"), 0)}
    limits = EngineLimits(catalog().digest, 4)
    book = OrderBook(link.arrived, answers.append, limits, lambda _: running, lambda: 1.0)
    for request_id, stamp_from in book.due(running.keys()).items():
        for position in (0, 7):
            changed = stamp_from(position)
            if changed is not None:
                again = stamp.decode(stamp.encode(changed))
                assert again.segments == changed.segments, request_id
    return taken


@functools.cache
def _spec() -> Any:
    from steerscope.steering.interventions import parse_spec

    return parse_spec('{"interventions":[{"feature":"known","clamp":6.0}]}')


def _sequences(ordered: Any) -> Any:
    from steerscope.hub.live import _answer

    return _answer(ordered, "digest")
