"""Policies between the API's messages and our own types, both ways."""

from __future__ import annotations

import math
from types import MappingProxyType

from steerscope.api.v1 import steering_pb2 as pb
from steerscope.errors import SpecError
from steerscope.hub.policies import Origin, StoredPolicy
from steerscope.steering.interventions import Intervention, Op, Phase, Policy, When

FEATURES = "features/"
POLICIES = "policies/"
REQUESTS = "requests/"

_PHASES = MappingProxyType(
    {
        pb.PHASE_UNSPECIFIED: Phase.ALL,
        pb.PHASE_PROMPT: Phase.PROMPT,
        pb.PHASE_GENERATION: Phase.GENERATION,
        pb.PHASE_ALL: Phase.ALL,
    }
)
_PHASE_MESSAGES = MappingProxyType(
    {
        Phase.PROMPT: pb.PHASE_PROMPT,
        Phase.GENERATION: pb.PHASE_GENERATION,
        Phase.ALL: pb.PHASE_ALL,
    }
)
_ORIGINS = MappingProxyType(
    {
        Origin.CATALOG: pb.POLICY_ORIGIN_CATALOG,
        Origin.CONFIG: pb.POLICY_ORIGIN_CONFIG,
        Origin.CREATED: pb.POLICY_ORIGIN_CREATED,
    }
)


def resource_id(name: str, prefix: str) -> str:
    """The id in a resource name like ``policies/x``; raise ``SpecError`` on another shape."""
    resource = name.removeprefix(prefix)
    if resource == name or not resource:
        raise SpecError("name", f"must be {prefix}<id>, got {name!r}")
    return resource


def policy_from_message(message: pb.Policy, policy_id: str) -> Policy:
    """Our policy; raise ``SpecError`` naming the field of the message."""
    interventions = []
    for i, each in enumerate(message.interventions):
        try:
            interventions.append(intervention_from_message(each))
        except SpecError as error:
            raise error.under(f"interventions[{i}]") from None
    return Policy(
        name=policy_id, interventions=tuple(interventions), description=message.description
    )


def intervention_from_message(message: pb.Intervention) -> Intervention:
    """Our intervention, not yet checked beyond what its types cannot say."""
    phase = _PHASES.get(message.phase)
    if phase is None:
        raise SpecError("phase", f"{message.phase} is none of the enum's values")
    op = message.WhichOneof("op")
    return Intervention(
        feature=message.feature.removeprefix(FEATURES),
        phase=phase,
        only_if_active=message.only_if_active,
        when=_when(message.when) if message.HasField("when") else None,
        span=(message.span.start, message.span.end) if message.HasField("span") else None,
        **({op: getattr(message, op)} if op else {}),
    )


def policy_to_message(stored: StoredPolicy) -> pb.Policy:
    """The API's policy, output-only fields included."""
    policy = stored.policy
    return pb.Policy(
        name=POLICIES + policy.name,
        description=policy.description,
        interventions=[intervention_to_message(each) for each in policy.interventions],
        origin=_ORIGINS[stored.origin],
        etag=stored.etag,
        revision=policy.revision,
    )


def intervention_to_message(intervention: Intervention) -> pb.Intervention:
    """The API's intervention, for one that has passed ``check``."""
    message = pb.Intervention(
        feature=intervention.feature,
        phase=_PHASE_MESSAGES[intervention.phase],
        only_if_active=intervention.only_if_active,
    )
    ablate = intervention.op is Op.ABLATE
    setattr(message, intervention.op.value, True if ablate else intervention.value)
    if intervention.when is not None:
        message.when.CopyFrom(
            pb.When(
                feature=intervention.when.feature,
                above=intervention.when.above,
                below=intervention.when.below,
            )
        )
    if intervention.span is not None:
        start, end = intervention.span
        message.span.CopyFrom(pb.Span(start=start, end=end))
    return message


def _when(message: pb.When) -> When:
    return When(
        feature=message.feature.removeprefix(FEATURES),
        above=message.above if message.HasField("above") else None,
        below=message.below if message.HasField("below") else None,
    )


def duration_seconds(seconds: int, nanos: int, field: str, longest: float) -> float:
    """A wait in seconds; raise ``SpecError`` unless it is within ``[0, longest]``."""
    total = seconds + nanos * 1e-9
    if not math.isfinite(total) or not 0.0 <= total <= longest:
        raise SpecError(field, f"must be between 0 and {longest:g} s, got {total:g} s")
    return total
