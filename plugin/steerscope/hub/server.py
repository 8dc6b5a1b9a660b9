"""The hub's composition root: one process, one asyncio loop, everything wired here."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import grpc.aio
import uvicorn
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry
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
from steerscope.config import Settings
from steerscope.errors import HubError
from steerscope.export import instruments
from steerscope.export.prometheus import HubCollector
from steerscope.hub.announcements import Announcements
from steerscope.hub.control import ControlPlane
from steerscope.hub.fanin import FanIn
from steerscope.hub.http import application
from steerscope.hub.policies import PolicyStore
from steerscope.hub.services import CatalogService, SteeringService, TelemetryService
from steerscope.steering.admission import RESERVED_NAMES
from steerscope.steering.policies import check_declared
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.observer import Observer
from steerscope.telemetry.requests import Limits
from steerscope.telemetry.totals import HubTotals

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
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

_log = logging.getLogger(__name__)


class Ports(NamedTuple):
    """Where the hub really listens (0 in the settings means any)."""

    grpc: int
    http: int


class Hub:
    """Everything one hub owns."""

    def __init__(self, settings: Settings, endpoint: str) -> None:
        self._settings = settings
        self._catalog = catalogs.load(Path(settings.catalog), settings.catalog_digest)
        check_declared(self._catalog, settings.steering, settings.policies)
        self._store = PolicyStore(self._catalog, settings.policies, settings.hub.max_policies)
        totals = HubTotals()
        self._announcements = Announcements()
        limits = Limits(
            max_tracks=settings.hub.max_reports,
            ttl_seconds=settings.hub.report_ttl_seconds,
            max_tokens_per_track=settings.hub.max_tokens_per_report,
        )
        self._observer = Observer(
            self._catalog,
            limits,
            instruments.bounds_for(self._catalog.signals),
            totals,
            self._announcements,
            self._store.label,
        )
        self._registry = CollectorRegistry()
        self._registry.register(
            HubCollector(
                self._catalog,
                self._observer,
                totals,
                self._policy_labels,
                settings.model_match,
            )
        )
        self._asked = AskedLog(settings.hub.max_reports)
        self._control = ControlPlane(
            endpoint, self._catalog.digest, self._store, totals, self._asked
        )
        self._fan_in = FanIn(endpoint, self._observer)

    @property
    def observer(self) -> Observer:
        """What was seen; only to be touched on the hub's loop."""
        return self._observer

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[Ports]:
        """Serve for as long as the block lasts; raise ``HubError`` naming a port in use."""
        listener = _listen("hub.http_address", self._settings.hub.http_address)
        server, grpc_port = await self._grpc_server()
        app = application(
            self._catalog,
            self._observer.ledger,
            self._asked,
            self._registry,
            self._settings.model_match,
        )
        loops = (self._control.run(), self._fan_in.run(), self._fan_in.expire())
        tasks = [asyncio.create_task(loop) for loop in loops]
        tasks.append(asyncio.create_task(_serve_http(app, listener)))
        for task in tasks:
            task.add_done_callback(_tell_if_lost)
        try:
            yield Ports(grpc_port, listener.getsockname()[1])
        finally:
            await self._health.enter_graceful_shutdown()
            await server.stop(DRAIN_SECONDS)
            await _cancel(tasks)
            self._control.close()
            self._fan_in.close()

    def _policy_labels(self) -> list[str]:
        return [*(stored.policy.name for stored in self._store.all()), *sorted(RESERVED_NAMES)]

    async def _grpc_server(self) -> tuple[grpc.aio.Server, int]:
        options = [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ]
        server = grpc.aio.server(options=options)
        catalog_pb2_grpc.add_CatalogServiceServicer_to_server(
            CatalogService(self._catalog, self._settings.model_match), server
        )
        steering_pb2_grpc.add_SteeringServiceServicer_to_server(
            SteeringService(self._catalog, self._settings.steering, self._store, self._control),
            server,
        )
        telemetry_pb2_grpc.add_TelemetryServiceServicer_to_server(
            TelemetryService(
                self._catalog,
                self._observer.ledger,
                self._asked,
                self._announcements,
                self._settings.model_match,
            ),
            server,
        )
        self._health = await _health(server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        port = _bind_grpc(server, self._settings.hub.grpc_address)
        await server.start()
        return server, port


async def run_until_orphaned(parent_pid: int, stopping: asyncio.Event) -> None:
    """Return when told to stop, or when the launcher is gone."""
    while not stopping.is_set() and os.getppid() == parent_pid:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopping.wait(), PARENT_POLL_SECONDS)


def _bind_grpc(server: grpc.aio.Server, address: str) -> int:
    """Bind the server; a plain socket goes first, since gRPC does not say what is wrong."""
    probe = _listen("hub.grpc_address", address)
    port: int = probe.getsockname()[1]
    probe.close()
    try:
        server.add_insecure_port(f"{address.rpartition(':')[0]}:{port}")
    except RuntimeError as error:
        raise HubError(f"hub.grpc_address: {address}: {error}") from None
    return port


def _listen(field: str, address: str) -> socket.socket:
    """A listening socket; ``HubError`` says which setting is at fault."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not _is_loopback(host):
        raise HubError(
            f"{field}: {address}: only loopback is served: the control plane has no credentials yet"
        )
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


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _health(server: grpc.aio.Server) -> Any:
    servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for service in ("", *SERVICES):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return servicer


async def _serve_http(app: Starlette, listener: socket.socket) -> None:
    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
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
