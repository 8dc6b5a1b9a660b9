"""Between protobuf messages and our own types; protobuf stays at the edge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import assert_never

from google.protobuf.timestamp_pb2 import Timestamp

from steerscope import __version__
from steerscope.api.v1 import catalog_pb2, steering_pb2, telemetry_pb2
from steerscope.catalog.model import (
    Activation,
    Calibration,
    Feature,
    FeatureKind,
    Isotonic,
    LabelSource,
    ModelMatch,
    Platt,
    Signal,
    Site,
    Term,
)
from steerscope.catalog.store import Catalog
from steerscope.errors import SpecError
from steerscope.hub.policies import Origin, State, StoredPolicy
from steerscope.steering.interventions import Intervention, Op, Phase, When
from steerscope.steering.rules import SteeringSource
from steerscope.telemetry.reductions import ON_FIRST_GENERATED
from steerscope.telemetry.tracks import RequestTrack, Unobserved

_KINDS = {
    FeatureKind.SAE_LATENT: catalog_pb2.FEATURE_KIND_SAE_LATENT,
    FeatureKind.TRANSCODER_LATENT: catalog_pb2.FEATURE_KIND_TRANSCODER_LATENT,
    FeatureKind.DIRECTION: catalog_pb2.FEATURE_KIND_DIRECTION,
    FeatureKind.PROBE: catalog_pb2.FEATURE_KIND_PROBE,
}
_SITES = {site: catalog_pb2.Site.Value(f"SITE_{site.name}") for site in Site}
_ACTIVATIONS = {
    Activation.RELU: catalog_pb2.ACTIVATION_RELU,
    Activation.JUMPRELU: catalog_pb2.ACTIVATION_JUMPRELU,
    Activation.IDENTITY: catalog_pb2.ACTIVATION_IDENTITY,
    Activation.TOPK: catalog_pb2.ACTIVATION_TOPK,
}
_STEERING_SOURCES = {
    source: steering_pb2.SteeringSource.Value(
        f"STEERING_SOURCE_{'UNSPECIFIED' if source is SteeringSource.NOTHING else source.name}"
    )
    for source in SteeringSource
}
_LABEL_SOURCES = {
    LabelSource.HUMAN: catalog_pb2.LABEL_SOURCE_HUMAN,
    LabelSource.AUTOMATIC: catalog_pb2.LABEL_SOURCE_AUTOMATIC,
}
_PHASES = {
    steering_pb2.PHASE_UNSPECIFIED: Phase.ALL,
    steering_pb2.PHASE_PROMPT: Phase.PROMPT,
    steering_pb2.PHASE_GENERATION: Phase.GENERATION,
    steering_pb2.PHASE_ALL: Phase.ALL,
}
_PHASE_NUMBERS = {phase: number for number, phase in _PHASES.items()}
_ORIGINS = {
    Origin.CATALOG: steering_pb2.POLICY_ORIGIN_CATALOG,
    Origin.CONFIG: steering_pb2.POLICY_ORIGIN_CONFIG,
    Origin.CREATED: steering_pb2.POLICY_ORIGIN_CREATED,
}
_STATES = {
    State.ACTIVE: steering_pb2.POLICY_STATE_ACTIVE,
    State.INVALID: steering_pb2.POLICY_STATE_INVALID,
    None: steering_pb2.POLICY_STATE_UNSPECIFIED,
}
_REASONS = {
    Unobserved.PREFIX_CACHE: telemetry_pb2.UNOBSERVED_REASON_PREFIX_CACHE,
    Unobserved.EXTERNAL_KV: telemetry_pb2.UNOBSERVED_REASON_EXTERNAL_KV,
    Unobserved.DROPPED_FRAME: telemetry_pb2.UNOBSERVED_REASON_DROPPED_FRAME,
    Unobserved.OVER_LIMIT: telemetry_pb2.UNOBSERVED_REASON_OVER_LIMIT,
    Unobserved.NOT_FINITE: telemetry_pb2.UNOBSERVED_REASON_NOT_FINITE,
}

FEATURES = "features/"
POLICIES = "policies/"
REQUESTS = "requests/"


def feature_message(catalog: Catalog, feature: Feature) -> catalog_pb2.Feature:
    """A feature as the API shows it."""
    return catalog_pb2.Feature(
        name=FEATURES + feature.name,
        kind=_KINDS[feature.kind],
        site=_SITES[feature.site],
        layer=feature.layer,
        activation=_ACTIVATIONS[feature.activation],
        label=feature.label,
        label_source=_LABEL_SOURCES[feature.label_source],
        description=feature.description,
        steerable=catalog.vectors[feature.name].W_dec is not None,
        source=feature.source,
    )


def signal_message(signal: Signal) -> catalog_pb2.Signal:
    """A signal as the API shows it."""
    message = catalog_pb2.Signal(
        name=signal.name,
        description=signal.description,
        terms=[_term(term) for term in signal.terms],
        bias=signal.bias,
        labels=[catalog_pb2.Label(label=b.label, below=b.below) for b in signal.labels],
    )
    if signal.calibration is not None:
        message.calibration.CopyFrom(_calibration(signal.calibration))
    if (target := signal.predicts) is not None:
        message.predicts.CopyFrom(catalog_pb2.Target(label=target.label, among=target.among))
    return message


def _term(term: Term) -> catalog_pb2.Term:
    message = catalog_pb2.Term(feature=term.feature, reduction=term.reduce, weight=term.weight)
    if term.reduce in ON_FIRST_GENERATED:
        message.first = term.first
    if (span := term.span) is not None:
        message.span.CopyFrom(catalog_pb2.EntitySpan(feature=span.feature, above=span.above))
    return message


def _calibration(calibration: Calibration) -> catalog_pb2.Calibration:
    message = catalog_pb2.Calibration(
        num_cases=calibration.num_cases,
        split=calibration.split,
        thresholds=[
            catalog_pb2.Threshold(score=t.score, max_fpr=t.max_fpr, num_negatives=t.num_negatives)
            for t in calibration.thresholds
        ],
    )
    match calibration.map:
        case Platt(scale=scale, offset=offset):
            message.platt.CopyFrom(catalog_pb2.Platt(scale=scale, offset=offset))
        case Isotonic(z=z, p=p):
            message.isotonic.CopyFrom(catalog_pb2.Isotonic(z=z, p=p))
        case _:
            assert_never(calibration.map)
    return message


def catalog_message(catalog: Catalog, model_match: ModelMatch) -> catalog_pb2.Catalog:
    """The catalog without its features."""
    document = catalog.document
    return catalog_pb2.Catalog(
        catalog=document.name,
        version=document.version,
        description=document.description,
        digest=catalog.digest,
        architecture=document.model.architecture,
        num_features=len(document.features),
        signals=[signal_message(signal) for signal in catalog.signals],
        model_match=model_match,
    )


def interventions(messages: Iterable[steering_pb2.Intervention]) -> tuple[Intervention, ...]:
    """A policy's edits as asked, not yet checked; ``SpecError`` where there is no such thing."""
    converted = []
    for i, message in enumerate(messages):
        if message.phase not in _PHASES:
            raise SpecError(f"interventions[{i}].phase", f"{message.phase} is not a phase")
        converted.append(_intervention(message))
    return tuple(converted)


def _intervention(message: steering_pb2.Intervention) -> Intervention:
    op = message.WhichOneof("op")
    span = (message.span.start, message.span.end) if message.HasField("span") else None
    return Intervention(
        feature=message.feature.removeprefix(FEATURES),
        phase=_PHASES[message.phase],
        only_if_active=message.only_if_active,
        when=_when(message.when) if message.HasField("when") else None,
        span=span,
        **({op: getattr(message, op)} if op else {}),
    )


def intervention_message(edit: Intervention) -> steering_pb2.Intervention:
    """An edit as the API shows it."""
    message = steering_pb2.Intervention(
        feature=edit.feature,
        phase=_PHASE_NUMBERS[edit.phase],
        only_if_active=edit.only_if_active,
    )
    setattr(message, edit.op.value, True if edit.op is Op.ABLATE else edit.value)
    if (when := edit.when) is not None:
        message.when.CopyFrom(
            steering_pb2.When(feature=when.feature, above=when.above, below=when.below)
        )
    if edit.span is not None:
        message.span.CopyFrom(steering_pb2.Span(start=edit.span[0], end=edit.span[1]))
    return message


def policy_message(stored: StoredPolicy, *, with_revision: bool = False) -> steering_pb2.Policy:
    """A policy as the API shows it; its name says the revision where one was asked for."""
    policy = stored.policy
    return steering_pb2.Policy(
        name=POLICIES + policy.name + (f"@{stored.revision_id}" if with_revision else ""),
        description=policy.description,
        interventions=[intervention_message(edit) for edit in policy.interventions],
        origin=_ORIGINS[stored.origin],
        etag=stored.etag,
        revision=policy.revision,
        max_dose=policy.max_dose,
        expire_time=_timestamp(stored.expire_time),
        create_time=_timestamp(stored.create_time),
        update_time=_timestamp(stored.update_time),
        revision_id=stored.revision_id,
        annotations=stored.annotations,
        state=_STATES[stored.state],
        state_reason=stored.reason,
    )


def _timestamp(microseconds: int | None) -> Timestamp | None:
    if microseconds is None:
        return None
    seconds, rest = divmod(microseconds, 1_000_000)
    return Timestamp(seconds=seconds, nanos=rest * 1000)


def report_message(
    external_id: str,
    tracks: Sequence[RequestTrack],
    catalog: Catalog,
    asked_digest: str | None,
    model_match: ModelMatch,
    *,
    features: bool = True,
) -> telemetry_pb2.RequestReport:
    """What is known of one request; the activations only if wanted.

    Args:
        external_id: the id the client knows.
        tracks: its sequences.
        catalog: that the hub serves.
        asked_digest: of the steering admitted; empty for none, None if it is not known.
        model_match: how the served model compares with the catalog's.
        features: whether the activations go in.
    """
    finished = all(track.finished for track in tracks)
    return telemetry_pb2.RequestReport(
        name=REQUESTS + external_id,
        state=_state(finished),
        completions=[_completion(track, asked_digest, features) for track in tracks],
        catalog_digest=catalog.digest,
        catalog_version=catalog.document.version,
        asked_steering_digest=asked_digest or "",
        plugin_version=__version__,
        model_match=model_match,
    )


def _completion(
    track: RequestTrack, asked_digest: str | None, features: bool
) -> telemetry_pb2.Completion:
    message = telemetry_pb2.Completion(
        request_id=track.start.request_id,
        model_name=track.key.model_name,
        engine=track.key.engine,
        state=_state(track.finished),
        policy=track.policy,
        steering_digest=track.digest,
        num_prompt_tokens=track.start.num_prompt_tokens,
        num_observed_tokens=track.num_observed,
        unobserved=[
            telemetry_pb2.UnobservedTokens(reason=_REASONS[reason], num_tokens=count)
            for reason, count in track.unobserved().items()
        ],
        complete=track.is_complete and track.digest == asked_digest,
        steering_source=_STEERING_SOURCES[track.source],
        steering_rule=track.rule,
        asked_policy=track.asked,
        num_cached_tokens=track.num_cached,
        signals=[
            telemetry_pb2.SignalScore(signal=s.signal, score=s.score, label=s.label)
            for s in track.scores
        ],
    )
    if track.start.policy or track.changed_at:
        message.steering.CopyFrom(_steering(track))
    if features:
        message.features.extend(_tracks(track))
    return message


def _steering(track: RequestTrack) -> telemetry_pb2.SteeringSummary:
    steered = track.steered
    any_steered = steered.num_tokens > 0
    return telemetry_pb2.SteeringSummary(
        num_tokens=steered.num_tokens,
        first_position=steered.first_position if any_steered else None,
        last_position=steered.last_position if any_steered else None,
        dose_mean=steered.dose_mean,
        dose_max=steered.dose_max,
        changed_at=track.changed_at or None,
    )


def _tracks(track: RequestTrack) -> list[telemetry_pb2.FeatureTrack]:
    return [
        telemetry_pb2.FeatureTrack(
            feature=name,
            first_position=first,
            activations=acts.tolist(),
            deltas=() if deltas is None else deltas.tolist(),
        )
        for name in track.columns.features
        for first, acts, deltas in track.runs(name)
    ]


def _state(finished: bool) -> telemetry_pb2.RequestState.ValueType:
    return telemetry_pb2.REQUEST_STATE_FINISHED if finished else telemetry_pb2.REQUEST_STATE_RUNNING


def _when(message: steering_pb2.When) -> When:
    return When(
        feature=message.feature.removeprefix(FEATURES),
        above=message.above if message.HasField("above") else None,
        below=message.below if message.HasField("below") else None,
    )
