"""The hub's composition root: one process, one asyncio loop, everything wired here."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from starlette.applications import Starlette

from steerscope.api.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from steerscope.catalog import store as catalogs
from steerscope.config import CanarySettings, Settings
from steerscope.errors import HubError
from steerscope.export import budget, instruments
from steerscope.export.exposition import MetricsPage
from steerscope.export.prometheus import HubCollector
from steerscope.hub.auditing import Audited, Auditor, open_log
from steerscope.hub.auth.files import refresh_often
from steerscope.hub.auth.gate import guard
from steerscope.hub.auth.interceptor import AccessInterceptor
from steerscope.hub.auth.tls import Certificates
from steerscope.hub.control import ControlPlane
from steerscope.hub.engines import EnginePlane
from steerscope.hub.fanin import FanIn
from steerscope.hub.governance import Governance, note_overridden
from steerscope.hub.http import application
from steerscope.hub.live import LiveSteering
from steerscope.hub.pages import HubPages
from steerscope.hub.policy_store import PolicyStore
from steerscope.hub.rule_store import RuleStore
from steerscope.hub.services import CatalogService, SteeringService
from steerscope.hub.storage import storage_for
from steerscope.hub.telemetry_service import TelemetryService
from steerscope.hub.tracing import Traced, open_export
from steerscope.hub.watches.listening import Watches
from steerscope.hub.watches.waiters import Waiters
from steerscope.security import is_loopback
from steerscope.steering.policies import check_declared
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.exemplars import Exemplars
from steerscope.telemetry.marks import Marks
from steerscope.telemetry.observer import Observer
from steerscope.telemetry.requests import Limits, RequestLedger
from steerscope.telemetry.totals import CanaryTotals, HubTotals

if TYPE_CHECKING:
    from steerscope.hub.canary import Canary

MARKS_FILE = "marks"
"""In the endpoint folder: how far this hub came with each worker, for the next one to know."""
RECALL_SECONDS = 10.0
"""So long after a hub replaced another, what a request asked may not be known yet: front ends
greet every second, and one that did not for so long is gone."""
MAX_MESSAGE_BYTES = 4 * 1024 * 1024
MAX_STREAMS_PER_CONNECTION = 1024
HANDSHAKE_TIMEOUT_MILLISECONDS = 10_000
MAX_CONNECTION_AGE_MILLISECONDS = 3600 * 1000
"""Then gRPC asks the client to connect anew, and so to show its certificate anew."""
DRAIN_SECONDS = 2.0
PARENT_POLL_SECONDS = 0.5

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in (
        (catalog_pb2, "CatalogService"),
        (steering_pb2, "SteeringService"),
        (telemetry_pb2, "TelemetryService"),
    )
)

SECURITY_SERVICE = "steerscope.security"
"""To the health service: whether certificate and identities in force are the newest."""
STATE_SERVICE = "steerscope.state"
"""To the health service: whether policies can be changed, and those of a fleet are current."""

_log = logging.getLogger(__name__)


class Ports(NamedTuple):
    """Where the hub really listens (0 in the settings means any)."""

    grpc: int
    http: int


class Hub:
    """Everything one hub owns."""

    def __init__(self, settings: Settings, endpoint: str, restarts: int = 0) -> None:
        self._settings = settings
        self._guard = guard(settings.security, settings.addresses)
        self._catalog = catalogs.load(Path(settings.catalog), settings.catalog_digest)
        check_declared(self._catalog, settings)
        budget.check(self._catalog, settings)
        self._store = PolicyStore(
            self._catalog,
            settings.policies,
            settings.steering,
            storage_for(settings.state, Path(endpoint)),
            settings.hub.max_policies,
        )
        rules = RuleStore(self._store, settings.rules, settings.steering)
        totals = HubTotals(restarts=restarts)
        self._asked = AskedLog(settings.hub.max_reports, RECALL_SECONDS if restarts else 0.0)
        self._watches = Watches(self._catalog, self._asked, settings.model_match)
        self._auditor = Auditor(open_log(settings.audit), self._catalog, self._asked)
        self._auditor.config_loaded(settings)
        self._guard.gate.denied = self._auditor.denied
        limits = Limits(
            max_tracks=settings.hub.max_reports,
            ttl_seconds=settings.hub.report_ttl_seconds,
            max_tokens_per_track=settings.hub.max_tokens_per_report,
            max_bytes=settings.hub.max_report_bytes,
        )
        self._otel = open_export(settings, lambda: collector.snapshot(), totals)
        bounds = instruments.bounds_for(self._catalog)
        exemplars = Exemplars(bounds.score)
        self._observer = Observer(
            self._catalog,
            limits,
            bounds,
            totals,
            Traced(Audited(self._watches, self._auditor), exemplars, self._otel),
            self._store.label,
            self._watches.computed,
            Marks(Path(endpoint) / MARKS_FILE),
            lambda external_id: self._canary is not None and self._canary.is_ours(external_id),
            settings.telemetry.drift_window_seconds,
        )
        self._canary = _canary(
            settings.canary, self._observer.ledger, self._watches.waiters, totals.canaries
        )
        collector = HubCollector(
            self._catalog,
            self._observer,
            totals,
            lambda: (stored.policy for stored in self._store.all()),
            settings.model_match,
            lambda: rules.override_mode,
            exemplars,
        )
        self._pages = HubPages(
            self._catalog,
            self._observer.ledger,
            self._asked,
            self._watches.waiters,
            MetricsPage(collector),
            settings.model_match,
        )
        self._store.expired = self._auditor.policy_expired
        self._control = ControlPlane(
            endpoint,
            self._catalog.digest,
            self._store,
            rules,
            totals,
            self._asked,
            self._pages,
            self._auditor,
            is_restarted=restarts > 0,
        )
        self._engines = EnginePlane(
            endpoint,
            self._catalog.digest,
            functools.partial(note_overridden, self._asked, self._catalog),
        )
        self._governance = Governance(
            self._catalog,
            settings.steering,
            self._store,
            rules,
            self._control,
            self._engines,
            self._observer.ledger,
            self._auditor,
        )
        self._live = LiveSteering(
            self._catalog,
            settings.steering,
            self._store,
            self._engines,
            self._observer.ledger,
            self._asked,
            self._auditor,
        )
        self._fan_in = FanIn(endpoint, self._observer, settings.hub.max_frame_wait_seconds)

    @property
    def observer(self) -> Observer:
        """What was seen; only to be touched on the hub's loop."""
        return self._observer

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Ports]:
        """Serve for as long as the block lasts; raise ``HubError`` naming a port in use."""
        await self._store.state.open()
        await self._governance.hold()
        listener = _listen("hub.http_address", self._settings.hub.http_address)
        server, grpc_port = await self._grpc_server()
        app = application(self._pages, self._guard, metrics_open=self._metrics_are_open())
        loops = (
            self._control.run(),
            self._governance.keep_current(),
            self._engines.run(),
            self._store.state.follow(self._tell_state),
            self._fan_in.run(),
            self._fan_in.expire(),
            self._watch_security(),
            _serve_http(app, listener, self._guard.certificates),
        )
        extras = [extra.run() for extra in (self._otel, self._canary) if extra is not None]
        tasks = [asyncio.create_task(loop) for loop in (*loops, *extras)]
        for task in tasks:
            task.add_done_callback(_tell_if_lost)
        try:
            yield Ports(grpc_port, listener.getsockname()[1])
        finally:
            await self._health.enter_graceful_shutdown()
            await server.stop(DRAIN_SECONDS)
            await _cancel(tasks)
            if self._otel is not None:
                await self._otel.close()
            await self._store.state.close()
            self._control.close()
            self._engines.close()
            self._auditor.log.close()
            self._fan_in.close()

    async def _tell_state(self, is_there: bool) -> None:
        await self._set_health(STATE_SERVICE, is_there)

    async def _watch_security(self) -> None:
        async def tell(is_newest: bool) -> None:
            await self._set_health(SECURITY_SERVICE, is_newest)

        await self._set_health(SECURITY_SERVICE, True)
        await refresh_often(self._guard.watched, self._settings.security.reload_seconds, tell)

    async def _set_health(self, service: str, is_serving: bool) -> None:
        serving = health_pb2.HealthCheckResponse
        await self._health.set(service, serving.SERVING if is_serving else serving.NOT_SERVING)

    def _metrics_are_open(self) -> bool:
        address = self._settings.hub.http_address
        return self._settings.security.metrics_open or is_loopback(address)

    async def _grpc_server(self) -> tuple[grpc.aio.Server, int]:
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_concurrent_streams", MAX_STREAMS_PER_CONNECTION),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MILLISECONDS),
            ("grpc.max_connection_age_ms", MAX_CONNECTION_AGE_MILLISECONDS),
        ]
        interceptor = AccessInterceptor(self._guard.gate)
        server = grpc.aio.server(interceptors=[interceptor], options=options)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(
            CatalogService(self._catalog, self._settings.model_match), server
        )
        steering_pb2_grpc.add_SteeringServiceServicer_to_server(
            SteeringService(
                self._catalog,
                self._settings.steering,
                self._store,
                self._control,
                self._live,
                self._governance,
                self._auditor,
            ),
            server,
        )
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(
            TelemetryService(
                self._catalog,
                self._observer.ledger,
                self._watches,
                self._pages,
            ),
            server,
        )
        self._health = await _health(server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        port = _bind_grpc(server, self._settings.hub.grpc_address, self._guard.certificates)
        await server.start()
        return server, port


async def run_until_orphaned(parent_pid: int, stopping: asyncio.Event) -> None:
    """Return when told to stop, or when the launcher is gone."""
    while not stopping.is_set() and os.getppid() == parent_pid:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), PARENT_POLL_SECONDS)


def _bind_grpc(server: grpc.aio.Server, address: str, certificates: Certificates | None) -> int:
    """Bind the server; a plain socket goes first, since gRPC does not say what is wrong."""
    probe = _listen("hub.grpc_address", address)
    port: int = probe.getsockname()[1]
    probe.close()
    target = f"{address.rpartition(':')[0]}:{port}"
    try:
        if certificates is None:
            server.add_insecure_port(target)
        else:
            server.add_secure_port(target, certificates.grpc_credentials())
    except RuntimeError as error:
        raise HubError(f"hub.grpc_address: {address}: {error}") from None
    return port


def _canary(
    settings: CanarySettings | None,
    ledger: RequestLedger,
    waiters: Waiters,
    totals: dict[str, CanaryTotals],
) -> Canary | None:
    """The canary that the settings ask for; a hub without one starts without an HTTP client."""
    if settings is None:
        return None
    from steerscope.hub.canary import Canary

    return Canary(settings, ledger.report, waiters, totals)


def _listen(field: str, address: str) -> socket.socket:
    """A listening socket; ``HubError`` says which setting is at fault."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, int(port)))
        listener.listen()
    except (OSError, OverflowError) as error:
        listener.close()
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
        raise HubError(f"{field}: {address}: {str(reason).lower()}") from None
    return listener


async def _health(server: grpc.aio.Server) -> Any:
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for service in ("", *SERVICES):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return servicer


async def _serve_http(
    app: Starlette, listener: socket.socket, certificates: Certificates | None
) -> None:
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", proxy_headers=False
    )
    config.load()
    if certificates is not None:
        config.ssl = certificates.http_context()
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    await server.serve(sockets=[listener])


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _tell_if_lost(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.critical("the hub lost a part of itself", exc_info=error)
