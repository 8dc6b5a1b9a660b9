"""Everything that is watched, fed by the observer as frames arrive."""

from __future__ import annotations

import secrets
import time
from typing import TypeVar

from steerscope.api.v1 import telemetry_pb2
from steerscope.catalog.model import ModelMatch
from steerscope.catalog.store import Catalog
from steerscope.hub.conversions import report_message
from steerscope.hub.watches.chunks import (
    Chunk,
    chunks,
    num_chunks,
    of_track,
    tokens_per_message,
)
from steerscope.hub.watches.feed import Feed
from steerscope.hub.watches.messages import finished_message, scores_message, started_message
from steerscope.hub.watches.waiters import Waiters
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.requests import Step
from steerscope.telemetry.tracks import RequestTrack

MAX_MESSAGES_BYTES = 8 * 1024 * 1024
"""Of starts and ends, and again of scores."""
MESSAGES_LINGER_SECONDS = 600.0
MAX_ACTIVATIONS_BYTES = 64 * 1024 * 1024
"""Of frames; the oldest one counts in parts, but goes as a whole."""
ACTIVATIONS_LINGER_SECONDS = 60.0


Told = TypeVar("Told", telemetry_pb2.WatchRequestsResponse, telemetry_pb2.WatchSignalsResponse)


class Watches:
    """The observer's listener: makes an event once, and only where someone may read it."""

    def __init__(self, catalog: Catalog, asked: AskedLog, model_match: ModelMatch) -> None:
        self._catalog = catalog
        self._asked = asked
        self._model_match = model_match
        self.hub = secrets.token_hex(8)
        """Tells this hub's cursors from those of any other."""
        self.columns = Columns(catalog)
        self._max_tokens = tokens_per_message(self.columns)
        self.waiters = Waiters()
        self.requests: Feed[telemetry_pb2.WatchRequestsResponse] = Feed(
            "requests", self.hub, MAX_MESSAGES_BYTES, MESSAGES_LINGER_SECONDS
        )
        self.signals: Feed[telemetry_pb2.WatchSignalsResponse] = Feed(
            "signals", self.hub, MAX_MESSAGES_BYTES, MESSAGES_LINGER_SECONDS
        )
        self.activations: Feed[Chunk] = Feed(
            "activations", self.hub, MAX_ACTIVATIONS_BYTES, ACTIVATIONS_LINGER_SECONDS
        )

    def started(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        self.waiters.tell(track.start.external_id)
        self.requests.add(lambda: _sized(started_message(self._report(track))))

    def computed(self, step: Step) -> None:
        """Take a frame's tokens; see ``telemetry.observer.Observer``."""
        if self.waiters:
            for news in step.blocks:
                for share in news.shares:
                    self.waiters.tell(share.track.start.external_id)
        if self.activations.is_kept:
            for chunk, num_bytes in chunks(step, self._max_tokens):
                self.activations.append(chunk, num_bytes)
        else:
            self.activations.skip(num_chunks(step, self._max_tokens))

    def finished(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        self.waiters.tell(track.start.external_id)
        now_ns = time.time_ns()
        self.requests.add(lambda: _sized(finished_message(self._report(track))))
        self.signals.add(lambda: _sized(scores_message(track, now_ns)))
        self.activations.add(lambda: (of_track(track)._replace(is_finished=True), 0))

    def _report(self, track: RequestTrack) -> telemetry_pb2.RequestReport:
        name = track.start.external_id
        asked = self._asked.digest(name)
        return report_message(
            name, (track,), self._catalog, asked, self._model_match, features=False
        )


def _sized(message: Told) -> tuple[Told, int]:
    return message, message.ByteSize()
