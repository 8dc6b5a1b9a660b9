"""The gRPC service that tells what was seen. Validation comes before a stream starts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any, TypeVar

from steerscope.api.v1 import telemetry_pb2, telemetry_pb2_grpc
from steerscope.catalog.store import Catalog
from steerscope.errors import SpecError
from steerscope.hub.conversions import FEATURES, REQUESTS
from steerscope.hub.fields import id_of_request, plain_name, ttl_of
from steerscope.hub.pages import HubPages
from steerscope.hub.refusals import NotFoundError, refusing, refusing_stream
from steerscope.hub.watches.chunks import Chunk, runs
from steerscope.hub.watches.feed import Feed
from steerscope.hub.watches.listening import Watches
from steerscope.hub.watches.messages import activations_message
from steerscope.hub.watches.replay import Replay
from steerscope.telemetry.reductions import Missing
from steerscope.telemetry.requests import RequestLedger

MAX_WAIT_SECONDS = 30.0
ALL_REQUESTS = "-"
LOOK_SECONDS = 1.0
"""How often to look whether a request that is silent has been forgotten."""

Message = TypeVar(
    "Message",
    telemetry_pb2.WatchRequestsResponse,
    telemetry_pb2.WatchSignalsResponse,
    telemetry_pb2.WatchActivationsResponse,
)
Item = TypeVar("Item")


class TelemetryService(telemetry_pb2_grpc.TelemetryServiceServicer):
    """What was seen."""

    def __init__(
        self,
        catalog: Catalog,
        ledger: RequestLedger,
        watches: Watches,
        pages: HubPages,
    ) -> None:
        self._catalog = catalog
        self._ledger = ledger
        self._pages = pages
        self._watches = watches
        bands = {band.label for signal in catalog.signals for band in signal.labels}
        self._labels = bands.union(Missing)

    @refusing
    async def GetRequestReport(
        self, request: telemetry_pb2.GetRequestReportRequest, context: Any
    ) -> telemetry_pb2.GetRequestReportResponse:
        external_id = plain_name(request.name, REQUESTS)
        report = await self._pages.finished(external_id, _wait_seconds(request))
        if report is None:
            raise NotFoundError(f"no request {external_id[:80]!r} is known")
        return telemetry_pb2.GetRequestReportResponse(report=report)

    @refusing_stream
    def WatchRequests(
        self, request: telemetry_pb2.WatchRequestsRequest, context: Any
    ) -> AsyncGenerator[telemetry_pb2.WatchRequestsResponse, None]:
        return _told(self._watches.requests, request.cursor, context, _copied)

    @refusing_stream
    def WatchSignals(
        self, request: telemetry_pb2.WatchSignalsRequest, context: Any
    ) -> AsyncGenerator[telemetry_pb2.WatchSignalsResponse, None]:
        names = [signal.name for signal in self._catalog.signals]
        signals = _wanted(request.signals, names, "signals", "a signal of the catalog")
        labels = _wanted(request.labels, self._labels, "labels", "a label of any signal")

        def asked_for(
            event: telemetry_pb2.WatchSignalsResponse,
        ) -> telemetry_pb2.WatchSignalsResponse | None:
            scores = [s for s in event.signals if s.signal in signals and s.label in labels]
            if request.labels and not scores:
                return None
            message = _copied(event)
            del message.signals[:]
            message.signals.extend(scores)
            return message

        return _told(self._watches.signals, request.cursor, context, asked_for)

    @refusing_stream
    def WatchActivations(
        self, request: telemetry_pb2.WatchActivationsRequest, context: Any
    ) -> AsyncGenerator[telemetry_pb2.WatchActivationsResponse, None]:
        external_id = id_of_request(request.name)
        columns = self._watches.columns
        names = [name.removeprefix(FEATURES) for name in request.features]
        wanted = _wanted(names, columns.features, "features", "a feature of the catalog")
        ttl_seconds = ttl_of(request)
        if external_id == ALL_REQUESTS:

            def asked_for(chunk: Chunk) -> telemetry_pb2.WatchActivationsResponse | None:
                found = list(runs(chunk, columns, wanted))
                return activations_message(chunk, found) if found or chunk.is_finished else None

            return _told(self._watches.activations, request.cursor, context, asked_for)
        replay = Replay(external_id, self._watches.hub, self._ledger, columns, wanted)
        if request.cursor:
            replay.resume(request.cursor)
        return self._replayed(replay, external_id, ttl_seconds, context)

    async def _replayed(
        self, replay: Replay, external_id: str, ttl_seconds: float, context: Any
    ) -> AsyncGenerator[telemetry_pb2.WatchActivationsResponse, None]:
        """One request from where ``replay`` is, until it has ended."""
        await context.send_initial_metadata(())
        waiters = self._watches.waiters
        await waiters.until(external_id, replay.is_known, ttl_seconds)
        if not replay.is_known():
            raise NotFoundError(f"no request {external_id!r} has come")
        while not replay.is_over():
            for portion in replay.portions():
                message = activations_message(portion.chunk, portion.runs)
                message.cursor = portion.cursor
                yield message
            await waiters.until(external_id, replay.may_go_on, LOOK_SECONDS)


async def _told(
    feed: Feed[Item], cursor: str, context: Any, asked_for: Callable[[Item], Message | None]
) -> AsyncGenerator[Message, None]:
    """The feed's events that the consumer asked for, as messages of its own."""
    with feed.watching(cursor) as events:
        # The headers tell the caller that it misses nothing from here on.
        await context.send_initial_metadata(())
        missed = 0
        async for event in events:
            missed += event.missed
            message = asked_for(event.item)
            if message is not None:
                message.missed, missed = missed, 0
                message.cursor = event.cursor
                yield message


def _copied(message: Message) -> Message:
    """A message that may be changed: those of a feed are everybody's."""
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _wanted(asked: Iterable[str], known: Iterable[str], field: str, what: str) -> frozenset[str]:
    """Those asked for, or all; raise ``SpecError`` naming the first that there is not."""
    asked, known = list(asked), frozenset(known)
    for i, name in enumerate(asked):
        if name not in known:
            raise SpecError(f"{field}[{i}]", f"{name[:80]!r} is not {what}")
    return frozenset(asked) or known


def _wait_seconds(request: telemetry_pb2.GetRequestReportRequest) -> float:
    seconds = request.wait.seconds + request.wait.nanos * 1e-9
    if seconds < 0.0:
        raise SpecError("wait", "must not be negative")
    return min(seconds, MAX_WAIT_SECONDS)
