"""What watches send, as protobuf messages."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.timestamp_pb2 import Timestamp

from steerscope.api.v1 import telemetry_pb2
from steerscope.hub.conversions import REQUESTS
from steerscope.hub.watches.chunks import Chunk, Run
from steerscope.telemetry.tracks import RequestTrack


def started_message(report: telemetry_pb2.RequestReport) -> telemetry_pb2.WatchRequestsResponse:
    """A start; the frame that told it may have told the end, too."""
    (completion,) = report.completions
    report.state = completion.state = telemetry_pb2.REQUEST_STATE_RUNNING
    del completion.signals[:]
    return telemetry_pb2.WatchRequestsResponse(started=report)


def finished_message(report: telemetry_pb2.RequestReport) -> telemetry_pb2.WatchRequestsResponse:
    """An end."""
    return telemetry_pb2.WatchRequestsResponse(finished=report)


def scores_message(track: RequestTrack, finish_time_ns: int) -> telemetry_pb2.WatchSignalsResponse:
    """All scores of a completion that finished."""
    seconds, nanos = divmod(finish_time_ns, 1_000_000_000)
    return telemetry_pb2.WatchSignalsResponse(
        request=REQUESTS + track.start.external_id,
        request_id=track.start.request_id,
        model_name=track.key.model_name,
        engine=track.key.engine,
        policy=track.policy,
        signals=[
            telemetry_pb2.SignalScore(signal=s.signal, score=s.score, label=s.label)
            for s in track.scores
        ],
        finish_time=Timestamp(seconds=seconds, nanos=nanos),
    )


def activations_message(
    chunk: Chunk, runs: Iterable[Run]
) -> telemetry_pb2.WatchActivationsResponse:
    """Some tokens of a completion."""
    return telemetry_pb2.WatchActivationsResponse(
        request=REQUESTS + chunk.external_id,
        request_id=chunk.request_id,
        num_prompt_tokens=chunk.num_prompt_tokens,
        features=[
            telemetry_pb2.FeatureTrack(
                feature=run.feature,
                first_position=run.first_position,
                activations=run.activations,
                deltas=run.deltas,
            )
            for run in runs
        ],
        finished=chunk.is_finished,
    )
