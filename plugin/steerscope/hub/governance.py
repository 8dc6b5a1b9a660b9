"""Rules brought to front ends and engines, and kept in force there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from steerscope.api.v1 import steering_pb2
from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.hub.auditing import Auditor
from steerscope.hub.auth.identity import current_identity
from steerscope.hub.control import ControlPlane
from steerscope.hub.engines import EnginePlane, Held
from steerscope.hub.orders import Applied, Standing
from steerscope.hub.policy_store import PolicyStore
from steerscope.hub.rule_messages import merged, rules_message, update_fields
from steerscope.hub.rule_store import RuleStore, StoredRules
from steerscope.steering.admission import NO_STEERING, capped
from steerscope.steering.interventions import SteeringSpec, steering_digest
from steerscope.steering.rules import OverrideMode, Rules
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.requests import RequestLedger


class Governance:
    """Makes the rules hold everywhere. On the hub's loop."""

    def __init__(
        self,
        catalog: Catalog,
        settings: SteeringSettings,
        policies: PolicyStore,
        rules: RuleStore,
        control: ControlPlane,
        engines: EnginePlane,
        ledger: RequestLedger,
        auditor: Auditor,
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._policies = policies
        self._rules = rules
        self._control = control
        self._engines = engines
        self._ledger = ledger
        self._auditor = auditor

    def get(self) -> steering_pb2.GetRulesResponse:
        """What is in force."""
        return steering_pb2.GetRulesResponse(rules=rules_message(self._rules.current))

    async def update(
        self, request: steering_pb2.UpdateRulesRequest
    ) -> steering_pb2.UpdateRulesResponse:
        """Store, tell the audit log, bring to front ends and engines; also if the caller leaves."""
        fields, caller = update_fields(request), current_identity().name

        def merge(current: Rules) -> Rules:
            return merged(current, request.rules, fields)

        if not request.validate_only:
            self._auditor.check()
        change = self._change(merge, request, caller)
        return await asyncio.shield(change)

    async def keep_current(self) -> None:
        """Bring policies and rules to everyone whenever others are in force, until cancelled."""
        while True:
            await self._policies.changed()
            await self._control.push()
            await self.hold()

    async def hold(self) -> Held | None:
        """Bring the override to the engines; None while it is not known, and they keep theirs."""
        if not self._rules.is_known:
            return None
        override = self._rules.current.rules.override
        if override is None:
            return await self._engines.hold(None)
        spec = NO_STEERING
        if override.policy is not None:
            if (stored := self._policies.get(override.policy)) is None:
                return None
            spec = capped(self._settings, stored.policy.spec)
        return await self._engines.hold(
            override.mode, override.policy or "", spec, running=self._others(override.mode, spec)
        )

    async def _change(
        self,
        merge: Callable[[Rules], Rules],
        request: steering_pb2.UpdateRulesRequest,
        caller: str,
    ) -> steering_pb2.UpdateRulesResponse:
        before = self._rules.current
        stored = await self._rules.update(
            merge, etag=request.rules.etag, validate_only=request.validate_only
        )
        answer = steering_pb2.UpdateRulesResponse(rules=rules_message(stored))
        if request.validate_only:
            answer.rules.ClearField("etag")
            return answer
        self._tell(before, stored, caller)
        await self._control.publish()
        if (held := await self.hold()) is not None and held.order.mode is not None:
            _fill(answer, held)
        return answer

    def _tell(self, before: StoredRules, after: StoredRules, caller: str) -> None:
        if before.rules != after.rules:
            self._auditor.rules_changed(before.rules, after.rules, caller)

    def _others(self, mode: OverrideMode, spec: SteeringSpec) -> list[str]:
        """Running sequences that are not steered as the override says."""
        wanted = ""
        if mode is OverrideMode.FORCE:
            wanted = steering_digest(self._catalog.digest, spec.interventions, spec.max_dose)
        running = self._ledger.running()
        return [track.start.request_id for track in running if track.digest != wanted]


def note_overridden(asked: AskedLog, catalog: Catalog, order: Standing, applied: Applied) -> None:
    """A running sequence is steered as the override says: so it is what was asked of it."""
    digest = steering_digest(catalog.digest, order.interventions, order.max_dose)
    asked.change(applied.external_id, digest if order.interventions else "")


def _fill(answer: steering_pb2.UpdateRulesResponse, held: Held) -> None:
    for request_id, applied in sorted(held.applied.items()):
        answer.sequences.add(request_id=request_id, first_position=applied.position)
    for request_id, reason in sorted(held.declined.items()):
        answer.declined.add(request_id=request_id, reason=reason)
