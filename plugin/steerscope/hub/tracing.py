"""Scores leave the hub with the traces they belong to: as exemplars, and as OTLP events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from prometheus_client.registry import Collector

from steerscope import config
from steerscope.config import Settings
from steerscope.errors import ConfigError
from steerscope.telemetry.exemplars import Exemplars
from steerscope.telemetry.observer import Listener
from steerscope.telemetry.totals import HubTotals
from steerscope.telemetry.tracks import RequestTrack

if TYPE_CHECKING:
    from steerscope.export.opentelemetry import OtelExport


def open_export(
    settings: Settings, snapshot: Callable[[], Collector], totals: HubTotals
) -> OtelExport | None:
    """The exporter that the settings ask for; raises ``ConfigError`` if it cannot be had."""
    if settings.otel is None:
        return None
    headers = config.otel_headers(settings.otel)
    try:
        from steerscope.export.opentelemetry import OtelExport
    except ImportError as error:
        raise ConfigError(f"otel: {error}; what it needs comes with steerscope[otel]") from None
    return OtelExport(settings.otel, headers, snapshot, totals.undelivered)


class Traced:
    """An observer's listener that takes the scores of every end, before the next one is told."""

    def __init__(self, listener: Listener, exemplars: Exemplars, otel: OtelExport | None) -> None:
        self._listener = listener
        self._exemplars = exemplars
        self._otel = otel

    def started(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        self._listener.started(track)

    def finished(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        now_ns = time.time_ns()
        self._exemplars.note(track, now_ns)
        if self._otel is not None:
            self._otel.scored(track, now_ns)
        self._listener.finished(track)
