"""Exemplars: for each bucket of a signal's scores, a request whose trace can be looked up."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from steerscope.steering import traceparent
from steerscope.steering.traceparent import Traceparent
from steerscope.telemetry.tracks import EngineKey, RequestTrack


class Exemplar(NamedTuple):
    """One score of a sequence that belongs to a trace."""

    trace: Traceparent
    score: float
    time_ns: int
    """When the sequence ended, since the epoch."""


class Exemplars:
    """The newest of each engine, signal and bucket; only of traces that the client records.

    ``bounds`` are those of ``EngineTotals.score``.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._newest: dict[tuple[EngineKey, str], dict[int, Exemplar]] = {}

    def note(self, track: RequestTrack, time_ns: int) -> None:
        """Take the scores of a sequence that ended."""
        trace = traceparent.parse(track.start.traceparent)
        if track.is_canary or trace is None or not trace.is_sampled:
            return
        for scored in track.scores:
            if scored.score is not None:
                kept = self._newest.setdefault((track.key, scored.signal), {})
                bucket = bisect_left(self._bounds, scored.score)
                kept[bucket] = Exemplar(trace, scored.score, time_ns)

    def of(self, key: EngineKey, signal: str) -> Mapping[int, Exemplar]:
        """By bucket, counted from the lowest; the one above all bounds comes last."""
        return self._newest.get((key, signal), {})
