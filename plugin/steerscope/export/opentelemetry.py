"""The OpenTelemetry exporter: the hub's metrics, and scores as events, over OTLP.

It has no instruments of its own: what it sends is what a scrape would have found. The SDK's Logs
API is not stable yet; whatever of ours touches it is here and in ``otlp_events``.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc import _log_exporter as grpc_logs
from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http import _log_exporter as http_logs
from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics
from opentelemetry.sdk._logs import (
    LoggerProvider,
    LogRecordProcessor,
    ReadableLogRecord,
    ReadWriteLogRecord,
)
from opentelemetry.sdk._logs.export import LogRecordExporter
from opentelemetry.sdk.metrics.export import MetricExporter
from opentelemetry.sdk.resources import Resource
from prometheus_client.registry import Collector

from steerscope import __version__
from steerscope.config import OtelSettings
from steerscope.errors import ConfigError
from steerscope.export import otlp_events
from steerscope.export.otlp_metrics import SCOPE, Period, metrics_data
from steerscope.export.otlp_sender import Sender
from steerscope.telemetry.tracks import RequestTrack

REQUEST_TIMEOUT_SECONDS = 5
POINTS_PER_REQUEST = 4096
"""Over gRPC, where 4 MiB are the most unless a collector is told otherwise."""
FLUSH_SECONDS = 2.0
"""How long the hub's end waits for the collector."""
_POLL_SECONDS = 0.02


class OtelExport:
    """Everything OpenTelemetry in the hub; belongs to the hub's loop, which it never blocks.

    Args:
        settings: where to send.
        headers: to send along; they may be secret.
        snapshot: makes a collector of what a scrape would find now.
        lost: counts what was given up, by ``otlp_sender.Telemetry``.
    """

    def __init__(
        self,
        settings: OtelSettings,
        headers: Mapping[str, str],
        snapshot: Callable[[], Collector],
        lost: Counter[str],
    ) -> None:
        self._interval_seconds = settings.interval_seconds
        self._snapshot = snapshot
        self._resource = resource_of(settings)
        self._start_ns = time.time_ns()
        self._sender = Sender(*_exporters(settings, headers), lost)
        provider = LoggerProvider(self._resource, shutdown_on_exit=False)
        provider.add_log_record_processor(_ToSender(self._sender))
        self._logger = provider.get_logger(SCOPE.name, SCOPE.version)

    def scored(self, track: RequestTrack, time_ns: int) -> None:
        """A sequence ended: its scores are events from now on."""
        otlp_events.emit(self._logger, track, time_ns)

    async def run(self) -> None:
        """Send all metrics, once in an interval, until cancelled."""
        while True:
            self._offer_metrics()
            await asyncio.sleep(self._interval_seconds)

    async def close(self) -> None:
        """Send what there is, if the collector takes it in time."""
        self._offer_metrics()
        self._sender.close()
        deadline = time.monotonic() + FLUSH_SECONDS
        while self._sender.is_sending and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)
        self._sender.abandon()

    def _offer_metrics(self) -> None:
        """The numbers are copied here, since they are the loop's; the rest is for the thread."""
        snapshot, period = self._snapshot(), Period(self._start_ns, time.time_ns())
        self._sender.offer_metrics(lambda: metrics_data(snapshot.collect(), self._resource, period))


class _ToSender(LogRecordProcessor):
    """The end of the Logs API: events go to the sender."""

    def __init__(self, sender: Sender) -> None:
        self._sender = sender

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        assert log_record.resource is not None
        self._sender.offer_event(
            ReadableLogRecord(
                log_record.log_record, log_record.resource, log_record.instrumentation_scope
            )
        )

    def shutdown(self) -> None:
        """The sender is closed by its owner."""

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True


def resource_of(settings: OtelSettings) -> Resource:
    """Who sends: this hub, unless the settings say otherwise."""
    ours = {
        "service.name": "steerscope",
        "service.version": __version__,
        "service.instance.id": str(uuid.uuid4()),
    }
    if settings.model_name:
        ours[otlp_events.REQUEST_MODEL] = settings.model_name
    return Resource.create({**ours, **settings.resource})


def _exporters(
    settings: OtelSettings, headers: Mapping[str, str]
) -> tuple[MetricExporter, LogRecordExporter]:
    return (_over_grpc if settings.protocol == "grpc" else _over_http)(settings, headers)


def _over_grpc(
    settings: OtelSettings, headers: Mapping[str, str]
) -> tuple[MetricExporter, LogRecordExporter]:
    common: dict[str, Any] = {
        "endpoint": settings.endpoint,
        "insecure": settings.endpoint.startswith("http:"),
        "credentials": grpc.ssl_channel_credentials(_vouching(settings)),
        "headers": tuple(headers.items()),
        "timeout": REQUEST_TIMEOUT_SECONDS,
        "compression": grpc.Compression.Gzip,
    }
    metrics = grpc_metrics.OTLPMetricExporter(**common, max_export_batch_size=POINTS_PER_REQUEST)
    return metrics, grpc_logs.OTLPLogExporter(**common)


def _vouching(settings: OtelSettings) -> bytes | None:
    """The certificates to trust; None for the system's."""
    if settings.ca_file is None:
        return None
    try:
        return Path(settings.ca_file).read_bytes()
    except OSError as error:
        raise ConfigError(f"otel.ca_file: {settings.ca_file}: {error.strerror}") from None


def _over_http(
    settings: OtelSettings, headers: Mapping[str, str]
) -> tuple[MetricExporter, LogRecordExporter]:
    base = settings.endpoint.rstrip("/")
    _vouching(settings)
    common: dict[str, Any] = {
        "certificate_file": settings.ca_file,
        "headers": dict(headers),
        "timeout": REQUEST_TIMEOUT_SECONDS,
        "compression": Compression.Gzip,
    }
    metrics = http_metrics.OTLPMetricExporter(f"{base}/v1/metrics", **common)
    return metrics, http_logs.OTLPLogExporter(f"{base}/v1/logs", **common)
