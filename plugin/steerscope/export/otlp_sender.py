"""Sends to an OTLP collector from a thread of its own: whoever hands something over never waits.

While the collector is away, metrics are replaced by newer ones, which tell all that the older ones
did, and events wait, up to a limit; what is given up is counted.
"""

from __future__ import annotations

import enum
import logging
import threading
from collections import Counter, deque
from collections.abc import Callable

from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData

MAX_EVENTS = 8192
"""That wait; the oldest go first."""
EVENTS_PER_REQUEST = 512
SEND_EVERY_SECONDS = 0.5

_log = logging.getLogger(__name__)


class Telemetry(enum.StrEnum):
    """What is sent, in OpenTelemetry's words for its signals."""

    METRICS = "metrics"
    LOGS = "logs"


class Sender:
    """The thread, and what waits for it.

    Args:
        metrics: sends all metrics at once.
        logs: sends a batch of events.
        lost: counts collections of metrics, and events, that were given up.
    """

    def __init__(
        self, metrics: MetricExporter, logs: LogRecordExporter, lost: Counter[str]
    ) -> None:
        self._metrics = metrics
        self._logs = logs
        self._lost = lost
        lost.update(dict.fromkeys(Telemetry, 0))
        self._lock = threading.Lock()
        self._collected: Callable[[], MetricsData] | None = None
        self._events: deque[ReadableLogRecord] = deque()
        self._closing = threading.Event()
        self._refused: set[Telemetry] = set()
        self._complaints = _Complaints()
        self._thread = threading.Thread(target=self._run, name="steerscope-otlp", daemon=True)
        self._thread.start()

    @property
    def is_sending(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def offer_metrics(self, collected: Callable[[], MetricsData]) -> None:
        """Send these instead of those that still wait. They are made in the thread."""
        with self._lock:
            self._lost[Telemetry.METRICS] += self._collected is not None
            self._collected = collected

    def offer_event(self, event: ReadableLogRecord) -> None:
        """Send this after those that still wait."""
        with self._lock:
            self._events.append(event)
            self._give_up()

    def close(self) -> None:
        """Send once more what waits, then end the thread."""
        self._closing.set()

    def abandon(self) -> None:
        """End it now, whatever is not sent."""
        self._metrics.shutdown()
        self._logs.shutdown()  # type: ignore[no-untyped-call]
        if self._events:
            _log.warning("%d events never reached the OTLP collector", len(self._events))

    def _run(self) -> None:
        while not self._closing.wait(SEND_EVERY_SECONDS):
            self._send()
        self._send()

    def _send(self) -> None:
        with self._lock:
            collected, self._collected = self._collected, None
        if collected is not None and not self._is_taken(
            Telemetry.METRICS, lambda: self._metrics.export(collected())
        ):
            with self._lock:
                self._lost[Telemetry.METRICS] += 1
        while self._send_events():
            pass

    def _send_events(self) -> bool:
        """Whether there may be more to send now."""
        with self._lock:
            number = min(len(self._events), EVENTS_PER_REQUEST)
            batch = [self._events.popleft() for _ in range(number)]
        if not batch:
            return False
        is_taken = self._is_taken(Telemetry.LOGS, lambda: self._logs.export(batch))
        if not is_taken:
            with self._lock:
                self._events.extendleft(reversed(batch))
                self._give_up()
        return is_taken

    def _give_up(self) -> None:
        while len(self._events) > MAX_EVENTS:
            self._events.popleft()
            self._lost[Telemetry.LOGS] += 1

    def _is_taken(self, kind: Telemetry, export: Callable[[], enum.Enum]) -> bool:
        """Whether the export succeeded; the log is told when that changes."""
        try:
            is_taken = export() in (MetricExportResult.SUCCESS, LogRecordExportResult.SUCCESS)
        except Exception as error:
            is_taken, self._complaints.newest = False, repr(error)
        if is_taken and kind in self._refused:
            self._refused.remove(kind)
            _log.info("the OTLP collector takes %s again", kind)
        elif not is_taken and kind not in self._refused and not self._closing.is_set():
            self._refused.add(kind)
            _log.warning("the OTLP collector takes no %s: %s", kind, self._complaints.newest)
        return is_taken


class _Complaints(logging.Handler):
    """Keeps the exporters' newest complaint, instead of a line in the log for each attempt."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.newest = ""
        exporters = logging.getLogger("opentelemetry")
        exporters.addHandler(self)
        exporters.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        """See ``logging.Handler``."""
        self.newest = record.getMessage()
