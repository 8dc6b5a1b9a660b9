"""The hub put together: one process, one asyncio loop, every part made here."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import uvicorn
import zmq
import zmq.asyncio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from steerscope.api.v1 import catalog_pb2, catalog_pb2_grpc
from steerscope.api.v1 import steering_pb2, steering_pb2_grpc
from steerscope.api.v1 import telemetry_pb2, telemetry_pb2_grpc
from steerscope.catalog import store as catalogs
from steerscope.catalog.store import Catalog
from steerscope.config import HubSettings, Settings
from steerscope.errors import ConfigError, HubError
from steerscope.export.instruments import bounds_for
from steerscope.export.prometheus import HubCollector
from steerscope.hub import fanin, http
from steerscope.hub.addresses import claim
from steerscope.hub.frontends import FrontEnds
from steerscope.hub.policies import PolicyStore
from steerscope.hub.protocol import control_address, frames_address
from steerscope.hub.reader import ReportReader
from steerscope.hub.services.catalog import CatalogService
from steerscope.hub.services.steering import SteeringService
from steerscope.hub.services.telemetry import TelemetryService
from steerscope.hub.watch import Watch
from steerscope.telemetry.observer import Observer
from steerscope.telemetry.requests import Limits
from steerscope.telemetry.totals import HubTotals

MAX_MESSAGE_BYTES = 4 << 20
MAX_CONCURRENT_RPCS = 512
DRAIN_SECONDS = 2.0

SERVICES = tuple(
    file.services_by_name[name].full_name
    for file, name in (
        (catalog_pb2.DESCRIPTOR, "CatalogService"),
        (steering_pb2.DESCRIPTOR, "SteeringService"),
        (telemetry_pb2.DESCRIPTOR, "TelemetryService"),
    )
)

GRPC_OPTIONS = (
    ("grpc.so_reuseport", 0),  # a second hub on the port must fail, not share it
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 7_200_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
)


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the hub listens, once it does."""

    grpc: int
    http: int


class _HttpServer(uvicorn.Server):
    """Leaves signals to the hub."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Capture none."""
        yield


class Hub:
    """All parts of one hub, wired; ``running`` serves them."""

    def __init__(self, settings: Settings, endpoint: Path) -> None:
        """Load the catalog and policies; raise ``SteerscopeError`` on what is wrong with them."""
        self._settings = settings
        self._endpoint = str(endpoint)
        catalog = _catalog(settings)
        self._digest = catalog.digest
        self._catalog = catalog
        self._store = PolicyStore(catalog, settings)
        self._totals = HubTotals()
        self._watch = Watch()
        self._observer = Observer(
            catalog,
            _limits(settings.hub),
            bounds_for(catalog.signals),
            self._totals,
            self._watch,
            self._store.label,
        )
        self._reader = ReportReader(self._observer.ledger, self._watch, catalog.digest)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Ports]:
        """Serve while the context lasts; raise ``HubError`` when an address is not to be had."""
        async with contextlib.AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(_cancelled_on_exit())
            control, frames = stack.enter_context(_sockets(self._endpoint))
            front_ends = FrontEnds(control, self._digest, self._store, self._totals)
            tasks.create_task(front_ends.serve())
            tasks.create_task(fanin.receive(frames, self._observer))
            tasks.create_task(fanin.expire(self._observer))
            http_port = await stack.enter_async_context(self._http())
            grpc_port = await stack.enter_async_context(self._grpc(front_ends))
            yield Ports(grpc_port, http_port)
            self._watch.close()

    @contextlib.asynccontextmanager
    async def _http(self) -> AsyncIterator[int]:
        listening = claim("hub.http_address", self._settings.hub.http_address)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(
            HubCollector(self._catalog, self._observer, self._totals, self._store.labels)
        )
        server = _HttpServer(
            uvicorn.Config(
                http.app(registry, self._reader),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(DRAIN_SECONDS),
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            await serving

    @contextlib.asynccontextmanager
    async def _grpc(self, front_ends: FrontEnds) -> AsyncIterator[int]:
        server = grpc.aio.server(options=GRPC_OPTIONS, maximum_concurrent_rpcs=MAX_CONCURRENT_RPCS)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(CatalogService(self._catalog), server)
        steering_pb2_grpc.add_SteeringServiceServicer_to_server(
            SteeringService(self._store, front_ends), server
        )
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(
            TelemetryService(self._reader, self._watch, self._digest), server
        )
        healthy = await _add_standard_services(server)
        port = _bind(server, self._settings.hub.grpc_address)
        await server.start()
        try:
            yield port
        finally:
            await healthy.enter_graceful_shutdown()
            await server.stop(DRAIN_SECONDS)


def _catalog(settings: Settings) -> Catalog:
    catalog = catalogs.load(Path(settings.catalog))
    if settings.catalog_digest not in (None, catalog.digest):
        raise ConfigError(
            f"{settings.catalog}: digest is {catalog.digest}, pinned to {settings.catalog_digest}"
        )
    return catalog


def _limits(settings: HubSettings) -> Limits:
    return Limits(
        max_tracks=settings.max_reports,
        ttl_seconds=settings.report_ttl_seconds,
        max_tokens_per_track=settings.max_tokens_per_report,
    )


async def _add_standard_services(server: grpc.aio.Server) -> health.aio.HealthServicer:
    healthy = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    for service in ("", *SERVICES):
        await healthy.set(service, health_pb2.HealthCheckResponse.SERVING)
    names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    return healthy


def _bind(server: grpc.aio.Server, address: str) -> int:
    claim("hub.grpc_address", address).close()  # it can say why not; gRPC cannot
    try:
        return int(server.add_insecure_port(address))
    except RuntimeError as error:
        raise HubError(f"hub.grpc_address: {address}: {error}") from None


@contextlib.contextmanager
def _sockets(endpoint: str) -> Iterator[tuple[zmq.asyncio.Socket, zmq.asyncio.Socket]]:
    context = zmq.asyncio.Context()
    control, frames = context.socket(zmq.ROUTER), context.socket(zmq.PULL)
    control.setsockopt(zmq.ROUTER_MANDATORY, 1)
    control.setsockopt(zmq.ROUTER_HANDOVER, 1)
    control.setsockopt(zmq.LINGER, 0)
    fanin.configure(frames)
    try:
        for bound, address in (
            (control, control_address(endpoint)),
            (frames, frames_address(endpoint)),
        ):
            try:
                bound.bind(address)
            except zmq.ZMQError as error:
                raise HubError(f"{address}: {error.strerror}") from None
        yield control, frames
    finally:
        control.close()
        frames.close()
        context.term()


@contextlib.asynccontextmanager
async def _cancelled_on_exit() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that ends with its tasks when the context does; one that fails ends it."""
    tasks: list[asyncio.Task[None]] = []
    async with asyncio.TaskGroup() as group:
        create = group.create_task

        def remember(*args: object, **kwargs: object) -> asyncio.Task[None]:
            task = create(*args, **kwargs)  # type: ignore[arg-type]
            tasks.append(task)
            return task

        group.create_task = remember  # type: ignore[method-assign,assignment]
        yield group
        for task in tasks:
            task.cancel()
