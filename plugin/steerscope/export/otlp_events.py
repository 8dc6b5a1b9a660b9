"""Scores as events: one ``gen_ai.evaluation.result`` for each score, through the Logs API.

The names are those of OpenTelemetry's conventions for generative AI, which are in development and
have no package of their own; here is the only place that spells them. An event belongs to the
client's trace, under the client's span, since vLLM's own request span, that span's child, has no
id before the request ends. ``gen_ai.response.id`` is vLLM's ``gen_ai.request.id``. No text of
prompts or answers is in an event, nor in the hub.
"""

from __future__ import annotations

from opentelemetry._logs import Logger, SeverityNumber
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    set_span_in_context,
)

from steerscope.steering import traceparent
from steerscope.telemetry.tracks import RequestTrack

EVENT = "gen_ai.evaluation.result"
NAME = "gen_ai.evaluation.name"
SCORE = "gen_ai.evaluation.score.value"
LABEL = "gen_ai.evaluation.score.label"
RESPONSE_ID = "gen_ai.response.id"
REQUEST_MODEL = "gen_ai.request.model"
PROVIDER = "gen_ai.provider.name"

ENGINE = "steerscope.engine"
SEQUENCE = "steerscope.sequence.id"
"""vLLM's internal id, which tells the several completions of one request apart."""
POLICY = "steerscope.steering.policy"
CANARY = "steerscope.canary"
"""There, and true, where no user asked but the canary."""
COMPLETE = "steerscope.complete"
"""Whether every token of the sequence was observed."""

MAX_ID_LENGTH = 1024
"""Clients name their requests, and a batch of events must not outgrow what collectors take."""


def emit(logger: Logger, track: RequestTrack, time_ns: int) -> None:
    """One event for each signal that the sequence has a score for."""
    scores = [score for score in track.scores if score.score is not None]
    if not scores:
        return
    context, common = _context(track), _common(track)
    for score in scores:
        logger.emit(
            timestamp=time_ns,
            observed_timestamp=time_ns,
            context=context,
            severity_number=SeverityNumber.INFO,
            event_name=EVENT,
            attributes={
                NAME: score.signal,
                SCORE: score.score,
                LABEL: score.label,
                **common,
            },
        )


def _common(track: RequestTrack) -> dict[str, str | bool]:
    common: dict[str, str | bool] = {
        RESPONSE_ID: track.start.external_id[:MAX_ID_LENGTH],
        REQUEST_MODEL: track.key.model_name,
        PROVIDER: "vllm",
        ENGINE: track.key.engine,
        SEQUENCE: track.start.request_id[:MAX_ID_LENGTH],
        COMPLETE: track.is_complete,
    }
    if track.is_canary:
        common[CANARY] = True
    return {**common, POLICY: track.policy} if track.policy else common


def _context(track: RequestTrack) -> Context:
    """The client's span; for a request without one, no span at all."""
    trace = traceparent.parse(track.start.traceparent)
    if trace is None:
        return Context()
    flags = TraceFlags(TraceFlags.SAMPLED if trace.is_sampled else TraceFlags.DEFAULT)
    ids = int(trace.trace_id, 16), int(trace.span_id, 16)
    return set_span_in_context(NonRecordingSpan(SpanContext(*ids, True, flags)), Context())
