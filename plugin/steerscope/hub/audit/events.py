"""What the audit log tells: a closed set of events, none of which has room for text.

Policies go by ``policy``, requests by the client's id in ``external_id``. A digest is that of
``steering_digest``: equal digests, equal effect. ``edits`` say what a digest stands for.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from datetime import datetime

from steerscope.hub.audit.fields import (
    Checked,
    Digest,
    FeatureName,
    FieldPath,
    Id,
    PolicyName,
    Reason,
    RpcName,
    Word,
)
from steerscope.steering.interventions import Intervention, Op, Phase


class Edit(Checked, frozen=True):
    """An intervention, in as few bytes as it takes."""

    feature: FeatureName
    op: Op
    value: float = 0.0
    phase: Phase = Phase.ALL
    only_if_active: bool = False
    when: FeatureName = ""
    above: float | None = None
    below: float | None = None
    span: tuple[int, int] | None = None


def edits(interventions: Iterable[Intervention]) -> tuple[Edit, ...]:
    """The interventions (checked ones) as the log tells them."""
    return tuple(_edit(intervention) for intervention in interventions)


def _edit(asked: Intervention) -> Edit:
    when = asked.when
    return Edit(
        feature=asked.feature,
        op=asked.op,
        value=asked.value,
        phase=asked.phase,
        only_if_active=asked.only_if_active,
        when=when.feature if when else "",
        above=when.above if when else None,
        below=when.below if when else None,
        span=asked.span,
    )


class _Event(Checked, frozen=True, tag_field="type"):
    """Common to all events."""


class PolicyCreated(_Event, frozen=True, tag="policy_created"):
    """A policy was stored under a new name."""

    policy: PolicyName
    revision: int
    digest: Digest
    edits: tuple[Edit, ...] = ()
    max_dose: float | None = None
    expires: datetime | None = None


class PolicyUpdated(_Event, frozen=True, tag="policy_updated"):
    """A policy was replaced by another of its name."""

    policy: PolicyName
    revision: int
    digest: Digest
    replaced: Digest
    edits: tuple[Edit, ...] = ()
    max_dose: float | None = None
    expires: datetime | None = None


class PolicyDeleted(_Event, frozen=True, tag="policy_deleted"):
    """A policy was deleted by someone."""

    policy: PolicyName
    revision: int
    digest: Digest


class PolicyExpired(_Event, frozen=True, tag="policy_expired"):
    """A policy's time was over."""

    policy: PolicyName
    revision: int
    digest: Digest


class RequestSteered(_Event, frozen=True, kw_only=True, tag="request_steered"):
    """A steered request finished. ``asked`` and ``applied`` differ only if something is wrong."""

    external_id: Id
    policy: PolicyName
    asked: Digest
    applied: Digest
    engine: Id
    model: Id = ""
    request_id: Id = ""
    """The engine's id: one of several completions of the client's request."""
    num_prompt_tokens: int
    num_tokens: int
    num_steered_tokens: int
    dose_max: float | None = None
    complete: bool
    """Whether every token was observed, so that the counts hold for the whole request."""
    edits: tuple[Edit, ...] = ()
    """For inline steering, which is written nowhere else."""


class RequestRejected(_Event, frozen=True, kw_only=True, tag="request_rejected"):
    """A request's steering was refused."""

    external_id: Id
    policy: PolicyName = ""
    field: FieldPath
    reason: Reason


class SteeringChanged(_Event, frozen=True, tag="steering_changed"):
    """A request's steering was changed while it ran, or before it came."""

    external_id: Id
    policy: PolicyName
    digest: Digest
    position: int | None = None
    """The token from which it holds; absent when the request has not arrived."""
    edits: tuple[Edit, ...] = ()


class Released(_Event, frozen=True, tag="released"):
    """A request's steering was ended while it ran, or before it came."""

    external_id: Id
    position: int | None = None


class KillMode(enum.StrEnum):
    """What the kill switch does."""

    RESUME = "resume"
    STEERING_OFF = "steering_off"
    FORCE_POLICY = "force_policy"


class KillSwitch(_Event, frozen=True, tag="kill_switch"):
    """Steering was switched off, forced, or resumed, for everything."""

    mode: KillMode
    policy: PolicyName = ""


class DefaultChanged(_Event, frozen=True, tag="default_changed"):
    """Another policy governs requests that name none; empty for none."""

    policy: PolicyName
    replaced: PolicyName


class Change(enum.StrEnum):
    """What happened to something."""

    CREATED = "created"
    UPDATED = "updated"
    DELETED = "deleted"


class BindingChanged(_Event, frozen=True, tag="binding_changed"):
    """A rule binds other requests to a policy. The rule goes by its digest: it may hold headers."""

    binding: Id
    change: Change
    policy: PolicyName
    rule: Digest


class Denied(_Event, frozen=True, tag="denied"):
    """An identity may not do what it asked."""

    rpc: RpcName
    scope: Word
    """What it would take."""
    reason: Reason = ""


class ConfigLoaded(_Event, frozen=True, tag="config_loaded"):
    """A hub started, with this."""

    steerscope: Id
    vllm: Id
    catalog: Id
    catalog_digest: Digest
    config_digest: Digest = ""


class LogStarted(_Event, frozen=True, tag="log_started"):
    """A process opened the log."""

    pid: int


class LogRotated(_Event, frozen=True, tag="log_rotated"):
    """The first entry of a new file: ``file`` is the one before it."""

    file: Id
    kept_from: int | None = None
    """The oldest entry kept. Present if files before it are deleted, as the settings say."""


class LogTorn(_Event, frozen=True, tag="log_torn"):
    """The log ended in part of a line, which was put into ``file``."""

    file: Id
    num_bytes: int
    digest: Digest


class EntriesLost(_Event, frozen=True, tag="entries_lost"):
    """So many events could not be written just before this entry."""

    num_entries: int
    reason: Reason


AuditEvent = (
    PolicyCreated
    | PolicyUpdated
    | PolicyDeleted
    | PolicyExpired
    | RequestSteered
    | RequestRejected
    | SteeringChanged
    | Released
    | KillSwitch
    | DefaultChanged
    | BindingChanged
    | Denied
    | ConfigLoaded
    | LogStarted
    | LogRotated
    | LogTorn
    | EntriesLost
)

REPORTED = (RequestSteered, RequestRejected, Denied)
"""Events that tell of traffic; all others change what governs it, or the log itself."""
