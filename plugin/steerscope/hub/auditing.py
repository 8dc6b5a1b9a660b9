"""What happens in the hub, as events of the audit log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from steerscope import __version__
from steerscope.catalog.store import Catalog
from steerscope.config import AuditSettings, Settings, to_tree
from steerscope.hub.audit.entries import AuditError
from steerscope.hub.audit.events import (
    AuditEvent,
    BindingChanged,
    Change,
    ConfigLoaded,
    DefaultChanged,
    Denied,
    KillMode,
    KillSwitch,
    PolicyCreated,
    PolicyDeleted,
    PolicyExpired,
    PolicyUpdated,
    Released,
    RequestRejected,
    RequestSteered,
    SteeringChanged,
    edits,
)
from steerscope.hub.audit.log import AuditLog, AuditUnavailableError, Fsync, OnError
from steerscope.hub.call_trace import current_trace_id
from steerscope.hub.policies import StoredPolicy
from steerscope.steering import traceparent
from steerscope.steering.admission import INLINE
from steerscope.steering.interventions import Policy, SteeringSpec, steering_digest
from steerscope.steering.rules import Binding, Override, OverrideMode, Rules, binding_digest
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.observer import Listener
from steerscope.telemetry.tracks import RequestTrack


def open_log(settings: AuditSettings) -> AuditLog:
    """The log that the settings name, or one that is off."""
    if settings.path is None:
        return AuditLog.off()
    return AuditLog.open(
        Path(settings.path),
        max_bytes=settings.max_bytes,
        keep=settings.keep,
        fsync=Fsync(settings.fsync),
        on_error=OnError(settings.on_error),
        key_file=Path(settings.key_file) if settings.key_file else None,
    )


class Auditor:
    """Writes events; belongs to the hub's loop.

    Changes are told before they are made and raise ``AuditUnavailableError`` if they cannot be
    recorded; what has happened already is only counted as lost then. What a call led to bears the
    trace that the call did, what became of a request that of the request.
    """

    def __init__(self, log: AuditLog, catalog: Catalog, asked: AskedLog) -> None:
        self.log = log
        self._catalog = catalog
        self._asked = asked

    def config_loaded(self, settings: Settings) -> None:
        """A hub started. What identities may do is in the digest; their hashes are not told."""
        tree = json.dumps(to_tree(settings), sort_keys=True).encode()
        self._tell(
            ConfigLoaded(
                steerscope=__version__,
                vllm="",
                catalog=self._catalog.document.name,
                catalog_digest=self._catalog.digest,
                config_digest=hashlib.sha256(tree).hexdigest(),
            )
        )

    def check(self) -> None:
        """Raise ``AuditUnavailableError`` while steering must not change unrecorded."""
        if self.log.refuses and not self.log.recovers():
            raise AuditUnavailableError("the audit log cannot be written, so nothing may change")

    def policy_stored(self, stored: StoredPolicy, before: StoredPolicy | None, who: str) -> None:
        """A policy was created, or replaced another of its name."""
        policy, expires = stored.policy, _moment(stored.expire_time)
        name, revision, digest = policy.name, policy.revision, self._digest(policy)
        made, cap = edits(policy.interventions), policy.max_dose
        if before is None:
            self._tell(PolicyCreated(name, revision, digest, made, cap, expires), who)
        else:
            replaced = self._digest(before.policy)
            self._tell(PolicyUpdated(name, revision, digest, replaced, made, cap, expires), who)

    def policy_deleted(self, before: StoredPolicy, who: str) -> None:
        """A policy is gone."""
        policy = before.policy
        self._tell(PolicyDeleted(policy.name, policy.revision, self._digest(policy)), who)

    def policy_expired(self, stored: StoredPolicy) -> None:
        """A policy's time was over."""
        policy = stored.policy
        self._tell(PolicyExpired(policy.name, policy.revision, self._digest(policy)))

    def rules_changed(self, before: Rules, after: Rules, who: str) -> None:
        """Other policies govern requests, or the kill switch was turned."""
        if before.override != after.override:
            self._tell(_kill_switch(after.override), who)
        if before.default_policy != after.default_policy:
            replaced = before.default_policy or ""
            self._tell(DefaultChanged(after.default_policy or "", replaced), who)
        for event in _bindings_changed(before, after):
            self._tell(event, who)

    def steering_ordered(self, external_id: str, policy: str, spec: SteeringSpec, who: str) -> None:
        """A request is about to be steered anew."""
        digest = steering_digest(self._catalog.digest, spec.interventions, spec.max_dose)
        inline = edits(spec.interventions) if policy == INLINE else ()
        event = SteeringChanged(external_id, policy, digest, edits=inline)
        self.log.record(event, who, current_trace_id())

    def released(self, external_id: str, who: str) -> None:
        """A request's steering is about to end."""
        self.log.record(Released(external_id), who, current_trace_id())

    def denied(self, who: str, rpc: str, scope: str, reason: str) -> None:
        """Someone may not do what they asked."""
        self._tell(Denied(rpc, scope, reason), who)

    def rejected(self, external_id: str, policy: str, field: str, reason: str) -> None:
        """A request's steering was refused by its front end."""
        self._tell(
            RequestRejected(external_id=external_id, policy=policy, field=field, reason=reason)
        )

    def finished(self, track: RequestTrack) -> None:
        """A sequence ended; told if it was steered at any time."""
        asked = self._asked.digest(track.start.external_id)
        if not (track.interventions or asked):
            return
        trace = traceparent.parse(track.start.traceparent)
        self._tell(
            RequestSteered(
                external_id=track.start.external_id,
                policy=track.policy,
                asked=asked or "",
                applied=track.digest,
                engine=track.key.engine,
                model=track.key.model_name,
                request_id=track.start.request_id,
                num_prompt_tokens=track.start.num_prompt_tokens,
                num_tokens=track.end,
                num_steered_tokens=track.steered.num_tokens,
                dose_max=track.steered.dose_max,
                complete=track.is_complete and track.digest == asked,
                edits=edits(track.interventions) if track.policy == INLINE else (),
            ),
            trace_id=trace.trace_id if trace is not None else "",
        )

    def _digest(self, policy: Policy) -> str:
        return steering_digest(self._catalog.digest, policy.interventions, policy.max_dose)

    def _tell(self, event: AuditEvent, who: str = "", trace_id: str = "") -> None:
        """Of what has happened already: a failure is counted by the log itself."""
        try:
            self.log.record(event, who, trace_id or current_trace_id())
        except AuditError:
            return


class Audited:
    """An observer's listener that also tells the audit log of every end."""

    def __init__(self, listener: Listener, auditor: Auditor) -> None:
        self._listener = listener
        self._auditor = auditor

    def started(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        self._listener.started(track)

    def finished(self, track: RequestTrack) -> None:
        """See ``telemetry.observer.Listener``."""
        self._auditor.finished(track)
        self._listener.finished(track)


_KILL_MODES = {
    OverrideMode.OFF: KillMode.STEERING_OFF,
    OverrideMode.FORCE: KillMode.FORCE_POLICY,
}


def _kill_switch(override: Override | None) -> KillSwitch:
    if override is None:
        return KillSwitch(KillMode.RESUME)
    return KillSwitch(_KILL_MODES[override.mode], override.policy or "")


def _bindings_changed(before: Rules, after: Rules) -> Iterator[BindingChanged]:
    """Each binding that came, went or changed; a change of their order alone is told of all."""
    old = {binding.name: binding for binding in before.bindings}
    new = {binding.name: binding for binding in after.bindings}
    moved = [n for n in old if n in new] != [n for n in new if n in old]
    for name, binding in new.items():
        if name not in old:
            yield _binding_changed(binding, Change.CREATED)
        elif moved or binding != old[name]:
            yield _binding_changed(binding, Change.UPDATED)
    for name, binding in old.items():
        if name not in new:
            yield _binding_changed(binding, Change.DELETED)


def _binding_changed(binding: Binding, change: Change) -> BindingChanged:
    return BindingChanged(binding.name, change, binding.policy or "", binding_digest(binding))


def _moment(microseconds: int | None) -> datetime | None:
    return None if microseconds is None else datetime.fromtimestamp(microseconds / 1e6, UTC)
