"""Payloads in; totals, reports and events out. Pure: no socket, no clock, no thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec

from steerscope.catalog.store import Catalog
from steerscope.telemetry import signals
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.frames import Frame, decode
from steerscope.telemetry.marks import Mark, Marks
from steerscope.telemetry.reductions import Missing
from steerscope.telemetry.requests import Limits, RequestLedger, Step
from steerscope.telemetry.totals import Bounds, EngineTotals, FrameLoss, HubTotals
from steerscope.telemetry.tracks import EngineKey, RequestTrack, Score
from steerscope.telemetry.windows import DriftWindow

MAX_ENGINES = 1024
"""Engines that one hub keeps apart; frames of further ones are refused and counted."""


class Listener(Protocol):
    """Who wants to know of each sequence's start and end. Must return at once."""

    def started(self, track: RequestTrack) -> None:
        """The first token of a sequence was seen."""

    def finished(self, track: RequestTrack) -> None:
        """A sequence ended and has its scores."""


class Observer:
    """Owns the ledger and the totals of every engine that sends to this hub.

    ``computed`` is told of each frame's tokens, after the starts and before the ends that the
    same frame tells. It must return at once. ``marks`` say how far the hub before came,
    ``is_canary`` whether a request, by the client's id, is the canary's; drift is measured over
    the newest ``drift_seconds``.
    """

    def __init__(
        self,
        catalog: Catalog,
        limits: Limits,
        bounds: Bounds,
        totals: HubTotals,
        listener: Listener,
        policy_label: Callable[[str], str],
        computed: Callable[[Step], object] | None = None,
        marks: Marks | None = None,
        is_canary: Callable[[str], bool] = lambda _: False,
        drift_seconds: float = 900.0,
    ) -> None:
        self._catalog = catalog
        self._columns = Columns(catalog)
        self.ledger = RequestLedger(self._columns, limits, self._score)
        self._bounds = bounds
        self._totals = totals
        self._listener = listener
        self._policy_label = policy_label
        self._computed = computed
        self._marks = marks or Marks()
        self._is_canary = is_canary
        self._drift_seconds = drift_seconds
        self._engines: dict[EngineKey, EngineTotals] = {}

    @property
    def engines(self) -> Mapping[EngineKey, EngineTotals]:
        """The totals of each engine heard of so far."""
        return self._engines

    def take(self, payload: bytes, now_ns: int, stale_ns: int = 0) -> None:
        """Count one payload off the wire; never raises, whatever it holds.

        Of a frame that was read out before ``stale_ns``, the activations are shed.
        """
        try:
            frame = decode(payload)
            self._take(frame, now_ns, stale_ns)
        except (msgspec.MsgspecError, ValueError, IndexError, RecursionError):
            self._totals.frames_lost[FrameLoss.MALFORMED] += 1

    def expire(self, now_ns: int) -> None:
        """Forget old reports. A sequence that never finished counts as unobserved."""
        for track in self.ledger.expire(now_ns * 1e-9):
            track.tail_lost = True
            if track.is_canary:
                continue
            labels = self._engines[track.key].labels
            labels.update((s.name, Missing.UNOBSERVED) for s in self._catalog.signals)

    def _take(self, frame: Frame, now_ns: int, stale_ns: int) -> None:
        key = EngineKey(frame.model_name, frame.engine)
        engine = self._engine(key)
        if engine is None:
            self._totals.frames_lost[FrameLoss.TOO_MANY_ENGINES] += 1
            return
        if frame.catalog_digest != self._catalog.digest:
            engine.refuse(frame, FrameLoss.CATALOG_MISMATCH)
            return
        is_shed = frame.monotonic_ns < stale_ns and bool(frame.request_ids)
        step = self.ledger.feed(frame, now_ns * 1e-9, is_shed=is_shed)
        engine.frames_lost[FrameLoss.SHED] += is_shed
        for track in step.started:
            track.is_canary = self._is_canary(track.start.external_id)
        engine.receive(frame, now_ns, self._marks.of(key, frame.rank))
        engine.add(step, now_ns)
        for track in step.started:
            if track.start.policy and track.start.resumed_at is None:
                engine.applied[self._policy_label(track.start.policy)] += 1
            self._listener.started(track)
        if self._computed is not None:
            self._computed(step)
        for track in step.finished:
            self._listener.finished(track)
        self._marks.note(key, frame.rank, Mark.after(frame))

    def _engine(self, key: EngineKey) -> EngineTotals | None:
        engine = self._engines.get(key)
        if engine is None and len(self._engines) < MAX_ENGINES:
            baselines = self._catalog.document.baselines
            window = DriftWindow(baselines, self._columns, self._drift_seconds)
            engine = EngineTotals(self._columns, self._catalog.signals, self._bounds, window)
            self._engines[key] = engine
            self.ledger.expect(key, self._marks.ranks(key))
        return engine

    def _score(self, track: RequestTrack) -> tuple[Score, ...]:
        return tuple(signals.evaluate(signal, track) for signal in self._catalog.signals)
