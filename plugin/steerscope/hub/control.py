"""The hub's side of the control wire: greets front ends, pushes policies, awaits their acks."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from typing import Protocol

from steerscope.hub.auditing import Auditor
from steerscope.hub.policy_store import PolicyStore
from steerscope.hub.protocol import (
    PROTOCOL_VERSION,
    Ack,
    Admitted,
    Answer,
    FromFrontend,
    Goodbye,
    Hello,
    MetricsAsked,
    Policies,
    Question,
    Recalled,
    Refused,
    Rejected,
    ReportAsked,
    control_address,
)
from steerscope.hub.router import Router
from steerscope.hub.rule_store import RuleStore
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.totals import HubTotals, Outcome

MAX_QUESTION_SECONDS = 10.0
ACK_TIMEOUT_SECONDS = 2.0
GREETING_SECONDS = 2.5
"""How long front ends and engines take to find a new hub: they greet every second."""
SILENT_AFTER_SECONDS = 10.0
"""A front end greets every second; one that did not for so long is not waited for."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _FrontEnd:
    pid: int
    pushed: int = 0
    acked: int = 0
    heard_at: float = 0.0

    @property
    def is_live(self) -> bool:
        return time.monotonic() - self.heard_at < SILENT_AFTER_SECONDS and _exists(self.pid)


class Pages(Protocol):
    """What front ends put into HTTP responses."""

    async def report(
        self, external_id: str, wait_seconds: float, activations: bool
    ) -> bytes | None:
        """A request's report as JSON, once it has ended or time is up; None for an unknown one."""

    def metrics(self, accept: str) -> bytes:
        """The metrics page."""


class ControlPlane:
    """The front ends' router. One per hub, on the hub's loop."""

    def __init__(
        self,
        endpoint: str,
        catalog_digest: str,
        store: PolicyStore,
        rules: RuleStore,
        totals: HubTotals,
        asked: AskedLog,
        pages: Pages,
        auditor: Auditor,
        *,
        is_restarted: bool = False,
    ) -> None:
        self._all_greeted_at = time.monotonic() + (GREETING_SECONDS if is_restarted else 0.0)
        self._auditor = auditor
        self._pages = pages
        self._answering: set[asyncio.Task[None]] = set()
        self._catalog_digest = catalog_digest
        self._store = store
        self._rules = rules
        self._totals = totals
        self._asked = asked
        self._front_ends: dict[bytes, _FrontEnd] = {}
        self._acked = asyncio.Condition()
        self._router: Router[FromFrontend] = Router(
            control_address(endpoint), FromFrontend, "a front end"
        )

    async def run(self) -> None:
        """Serve until cancelled; a message that cannot be read is logged and dropped."""
        await self._router.run(self._take)

    async def publish(self) -> bool:
        """Push the policies; whether every live front end acked them in time.

        A hub that replaced another first lets front ends and engines find it: nothing may be
        answered that one of them does not know.
        """
        await asyncio.sleep(self._all_greeted_at - time.monotonic())
        wanted = self._store.revision
        await self.push()
        async with self._acked:
            try:
                async with asyncio.timeout(ACK_TIMEOUT_SECONDS):
                    await self._acked.wait_for(lambda: self._all_acked(wanted))
            except TimeoutError:
                self._totals.propagation_timeouts += 1
                _log.warning("a front end did not ack revision %d", wanted)
                return False
        return True

    def close(self) -> None:
        """Free the socket."""
        self._router.close()

    def _all_acked(self, wanted: int) -> bool:
        return all(
            front_end.acked >= wanted
            for front_end in self._front_ends.values()
            if front_end.is_live
        )

    async def push(self) -> None:
        """Send what is in force to every front end that does not have it."""
        for identity, front_end in tuple(self._front_ends.items()):
            if front_end.pushed < self._store.revision:
                await self._push(identity, front_end)

    async def _take(self, identity: bytes, message: FromFrontend) -> None:
        match message:
            case Hello():
                await self._greet(identity, message)
            case Ack(revision):
                async with self._acked:
                    if (front_end := self._front_ends.get(identity)) is not None:
                        front_end.acked = max(front_end.acked, revision)
                    self._acked.notify_all()
            case Admitted(external_id, policy, digest, asked):
                self._asked.note(external_id, digest)
                if policy:
                    self._totals.outcomes[self._store.label(policy), Outcome.ADMITTED] += 1
                if asked:
                    self._totals.outcomes[self._store.label(asked), Outcome.OVERRULED] += 1
            case Recalled(digests):
                for external_id, digest in digests.items():
                    self._asked.note(external_id, digest)
            case Rejected(external_id, policy, field, reason):
                self._auditor.rejected(external_id, policy, field, reason)
                self._totals.outcomes[self._store.label(policy), Outcome.REJECTED] += 1
            case Question():
                task = asyncio.create_task(self._answer(identity, message))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)
            case Goodbye():
                self._front_ends.pop(identity, None)

    async def _answer(self, identity: bytes, question: Question) -> None:
        body: bytes | None = None
        match question.what:
            case ReportAsked(external_id, wait_seconds, activations):
                wait_seconds = min(wait_seconds, MAX_QUESTION_SECONDS)
                body = await self._pages.report(external_id, wait_seconds, activations)
            case MetricsAsked(accept):
                body = self._pages.metrics(accept)
        await self._router.send(identity, Answer(question.number, body))

    async def _greet(self, identity: bytes, hello: Hello) -> None:
        if reason := self._refusal(hello):
            await self._router.send(identity, Refused(reason))
            return
        known = self._front_ends.setdefault(identity, _FrontEnd(hello.pid))
        known.heard_at = time.monotonic()
        if known.acked < self._store.revision:
            await self._push(identity, known)

    def _refusal(self, hello: Hello) -> str | None:
        if hello.version != PROTOCOL_VERSION:
            return f"it speaks protocol {hello.version}, the hub {PROTOCOL_VERSION}"
        if hello.catalog_digest != self._catalog_digest:
            return f"its catalog is {hello.catalog_digest}, the hub's {self._catalog_digest}"
        return None

    async def _push(self, identity: bytes, front_end: _FrontEnd) -> None:
        revision = front_end.pushed = self._store.revision
        await self._router.send(
            identity,
            Policies(
                revision,
                self._store.in_force(),
                self._store.expire_times(),
                self._rules.current.rules if self._rules.is_known else None,
            ),
        )


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
