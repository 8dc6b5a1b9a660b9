"""Steering one request while it runs: who may, what is asked, what the engines answered."""

from __future__ import annotations

from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from steerscope.api.v1 import steering_pb2
from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import SpecError
from steerscope.hub.auditing import Auditor
from steerscope.hub.auth.identity import (
    authorise_spec,
    authorise_steers,
    authorise_use,
    current_identity,
)
from steerscope.hub.conversions import POLICIES, interventions
from steerscope.hub.engines import EnginePlane, Ordered
from steerscope.hub.fields import id_of_request, plain_name, ttl_of
from steerscope.hub.policies import State
from steerscope.hub.policy_store import PolicyStore
from steerscope.hub.refusals import NotFoundError, SteeringDeclinedError
from steerscope.security import Scope
from steerscope.steering.admission import INLINE, capped, check_asked
from steerscope.steering.interventions import SteeringSpec, steering_digest
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.requests import RequestLedger

MAX_WAIT_SECONDS = 5.0
"""How long a caller waits for engines whose request is known to run."""

RELEASED = SteeringSpec(interventions=())


class LiveSteering:
    """Orders, on the hub's loop."""

    def __init__(
        self,
        catalog: Catalog,
        settings: SteeringSettings,
        store: PolicyStore,
        engines: EnginePlane,
        ledger: RequestLedger,
        asked: AskedLog,
        auditor: Auditor,
    ) -> None:
        self._auditor = auditor
        self._catalog = catalog
        self._settings = settings
        self._store = store
        self._engines = engines
        self._ledger = ledger
        self._asked = asked
        self._steered_by: dict[str, str] = {}
        """By external id: who steers it."""

    async def steer(
        self, request: steering_pb2.SteerRequestRequest, context: Any
    ) -> steering_pb2.SteerRequestResponse:
        """Check, order, and say what became of it."""
        external_id = id_of_request(request.name)
        policy, spec = self._wanted(request)
        ttl_seconds = ttl_of(request)
        caller = current_identity()
        in_force = [i for i, who in self._steered_by.items() if who == caller.name]
        others = [i for i in in_force if i != external_id and self._is_in_force(i)]
        authorise_steers(caller, len(others))
        digest = steering_digest(self._catalog.digest, spec.interventions, spec.max_dose)
        if request.validate_only:
            return steering_pb2.SteerRequestResponse(steering_digest=digest)
        self._auditor.steering_ordered(external_id, policy, spec, caller.name)
        ordered = await self._order(external_id, policy, spec, ttl_seconds, context)
        self._steered_by = {i: who for i, who in self._steered_by.items() if self._is_in_force(i)}
        self._steered_by[external_id] = caller.name
        self._asked.change(external_id, digest)
        return _answer(ordered, digest)

    async def release(
        self, request: steering_pb2.ReleaseRequestRequest, context: Any
    ) -> steering_pb2.ReleaseRequestResponse:
        """End it, or void the order that waits."""
        external_id = id_of_request(request.name)
        self._auditor.released(external_id, current_identity().name)
        was_waiting = await self._engines.withdraw(external_id)
        if not self._num_running(external_id):
            if not was_waiting:
                raise NotFoundError(f"no request {external_id[:80]!r} runs, and no order waits")
            self._forget(external_id)
            return steering_pb2.ReleaseRequestResponse()
        ordered = await self._order(external_id, "", RELEASED, MAX_WAIT_SECONDS, context)
        self._forget(external_id)
        self._asked.change(external_id, "")
        return steering_pb2.ReleaseRequestResponse(sequences=_sequences(ordered))

    def _wanted(self, request: steering_pb2.SteerRequestRequest) -> tuple[str, SteeringSpec]:
        """The policy's name, or ``inline``, and the edits with the cap that holds."""
        if bool(request.policy) == bool(request.interventions):
            raise SpecError("policy", "either a policy or interventions are needed, not both")
        if request.policy:
            name = plain_name(request.policy, POLICIES, "policy")
            stored = self._store.get(name)
            if stored is None or stored.state is State.INVALID:
                raise SpecError("policy", f"no policy {name[:80]!r} is in force")
            if request.HasField("max_dose"):
                raise SpecError("max_dose", "a policy has its own; give it with interventions")
            authorise_use(current_identity(), name, stored.policy.spec)
            return name, capped(self._settings, stored.policy.spec)
        if self._settings.allow_inline is False:
            raise SpecError("interventions", "inline steering is off (steering.allow_inline)")
        spec = SteeringSpec(
            interventions=interventions(request.interventions),
            max_dose=request.max_dose if request.HasField("max_dose") else None,
        )
        check_asked(self._catalog, self._settings, spec)
        authorise_spec(current_identity(), spec)
        return INLINE, capped(self._settings, spec)

    async def _order(
        self, external_id: str, policy: str, spec: SteeringSpec, ttl_seconds: float, context: Any
    ) -> Ordered:
        left = context.time_remaining()
        ordered = await self._engines.steer(
            external_id,
            policy,
            spec,
            ttl_seconds=ttl_seconds,
            num_running=self._num_running(external_id),
            wait_seconds=min(MAX_WAIT_SECONDS, left * 0.8 if left else MAX_WAIT_SECONDS),
            over_bound=Scope.ADMIN in current_identity().granted,
        )
        if ordered.declined:
            raise SteeringDeclinedError("; ".join(sorted(set(ordered.declined.values()))))
        return ordered

    def _num_running(self, external_id: str) -> int:
        return sum(not track.finished for track in self._ledger.report(external_id))

    def _is_in_force(self, external_id: str) -> bool:
        ordered = self._engines.ordered(external_id)
        waits = ordered is not None and ordered.is_waiting
        return waits or self._num_running(external_id) > 0

    def _forget(self, external_id: str) -> None:
        self._steered_by.pop(external_id, None)


def _answer(ordered: Ordered, digest: str) -> steering_pb2.SteerRequestResponse:
    answer = steering_pb2.SteerRequestResponse(
        state=steering_pb2.STEER_STATE_APPLIED,
        sequences=_sequences(ordered),
        steering_digest=digest,
    )
    if not ordered.applied:
        answer.state = steering_pb2.STEER_STATE_WAITING
        expires = Timestamp()
        expires.FromNanoseconds(ordered.expire_time_ns)
        answer.expire_time.CopyFrom(expires)
    return answer


def _sequences(ordered: Ordered) -> list[steering_pb2.SteeredSequence]:
    return [
        steering_pb2.SteeredSequence(request_id=request_id, first_position=position)
        for request_id, position in sorted(ordered.applied.items())
    ]
