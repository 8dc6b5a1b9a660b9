"""A request's tracks as the API's report."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from google.protobuf.json_format import MessageToDict

from steerscope import __version__
from steerscope.api.v1 import telemetry_pb2 as pb
from steerscope.hub.convert import REQUESTS
from steerscope.telemetry.steered import SteeredTokens
from steerscope.telemetry.tracks import RequestTrack, Score, Unobserved

_REASONS = MappingProxyType(
    {
        Unobserved.PREFIX_CACHE: pb.UNOBSERVED_REASON_PREFIX_CACHE,
        Unobserved.DROPPED_FRAME: pb.UNOBSERVED_REASON_DROPPED_FRAME,
        Unobserved.OVER_LIMIT: pb.UNOBSERVED_REASON_OVER_LIMIT,
        Unobserved.NOT_FINITE: pb.UNOBSERVED_REASON_NOT_FINITE,
    }
)


def report(tracks: Sequence[RequestTrack], catalog_digest: str) -> pb.RequestReport:
    """The whole report of one request; ``tracks`` are all its sequences, at least one."""
    finished = all(track.finished for track in tracks)
    return pb.RequestReport(
        name=REQUESTS + tracks[0].start.external_id,
        state=_state(finished),
        completions=[_completion(track, track.finished, features=True) for track in tracks],
        catalog_digest=catalog_digest,
        plugin_version=__version__,
    )


def summary(track: RequestTrack, finished: bool, catalog_digest: str) -> pb.RequestReport:
    """One sequence without its activations, for an event of its start or end."""
    return pb.RequestReport(
        name=REQUESTS + track.start.external_id,
        state=_state(finished),
        completions=[_completion(track, finished, features=False)],
        catalog_digest=catalog_digest,
        plugin_version=__version__,
    )


def as_json(message: pb.RequestReport) -> dict[str, Any]:
    """The report as JSON-able data, with the field names of the proto files."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _state(finished: bool) -> pb.RequestState.ValueType:
    return pb.REQUEST_STATE_FINISHED if finished else pb.REQUEST_STATE_RUNNING


def _completion(track: RequestTrack, finished: bool, *, features: bool) -> pb.Completion:
    start = track.start
    return pb.Completion(
        request_id=start.request_id,
        model_name=track.key.model_name,
        engine=track.key.engine,
        state=_state(finished),
        policy=start.policy,
        steering_digest=start.digest,
        num_prompt_tokens=start.num_prompt_tokens,
        num_observed_tokens=track.num_observed,
        unobserved=[
            pb.UnobservedTokens(reason=_REASONS[reason], num_tokens=count)
            for reason, count in track.unobserved().items()
        ],
        complete=track.is_complete,
        steering=_steering(track.steered) if start.policy else None,
        signals=[_score(score) for score in track.scores] if finished else (),
        features=_features(track) if features else (),
    )


def _steering(steered: SteeredTokens) -> pb.SteeringSummary:
    some = steered.num_tokens > 0
    return pb.SteeringSummary(
        num_tokens=steered.num_tokens,
        first_position=steered.first_position if some else None,
        last_position=steered.last_position if some else None,
        dose_mean=steered.dose_mean,
        dose_max=steered.dose_max,
    )


def _score(score: Score) -> pb.SignalScore:
    return pb.SignalScore(signal=score.signal, score=score.score, label=score.label)


def _features(track: RequestTrack) -> list[pb.FeatureTrack]:
    return [
        pb.FeatureTrack(
            feature=feature,
            first_position=first,
            activations=acts.tolist(),
            deltas=() if deltas is None else deltas.tolist(),
        )
        for feature in track.columns.features
        for first, acts, deltas in track.runs(feature)
    ]
