"""The front end's half: admission wired to the hub's policies and rules. One per vLLM front end."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec

from steerscope.catalog.store import Catalog
from steerscope.config import Settings
from steerscope.errors import HubError, SpecError
from steerscope.hub.auth.denials import AccessError, UnauthenticatedError
from steerscope.hub.auth.identity import authorise_spec, authorise_use
from steerscope.hub.link import FrontendLink
from steerscope.hub.protocol import MetricsAsked, ReportAsked
from steerscope.security import Identity, Scope
from steerscope.steering.admission import (
    INLINE,
    REPORT_KEY,
    STEERING_KEY,
    UNKNOWN,
    Admission,
    Asked,
    Wanted,
    wanted,
)
from steerscope.steering.callers import Callers
from steerscope.steering.exchange import Exchange, Headers
from steerscope.steering.stamp import encode

REPORT_WAIT_SECONDS = 1.5
"""How long a response waits for the hub to have seen its request end."""


class FrontEnd:
    """Admits requests, and tells the hub which were steered and which refused.

    Args:
        catalog: the catalog being served.
        settings: the whole tree.
        link: to the hub.
        model: the served model's name.
        refused: why nothing may be steered in this engine; empty where it may.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        link: FrontendLink,
        model: str = "",
        refused: str = "",
    ) -> None:
        self._link = link
        # One at a time: the largest report keeps the hub's loop busy for half a second.
        self._asking = asyncio.Lock()
        self._requires_identity = settings.steering.require_identity
        self._callers = Callers(settings, model)
        self._admission = Admission(
            catalog,
            settings.steering,
            lambda: link.policies,
            lambda: link.rules,
            refused,
        )

    def resolve(
        self,
        external_id: str,
        extra_args: Mapping[str, Any] | None,
        exchange: Exchange | None = None,
        lora: str = "",
    ) -> Asked | None:
        """The steering that the request gets, or None. A refusal is counted, then raised.

        ``exchange`` is the HTTP request, if it came by HTTP; its response gets the report that the
        flags ask for.
        """
        headers = exchange.headers if exchange is not None else ()
        identity = self._callers.identity(headers)
        traits = self._callers.traits(headers, identity, lora)
        try:
            asked = self._admission.resolve(extra_args, traits)
            if asked is not None and asked.by_request:
                self._authorise(asked, identity)
            self._note_report(external_id, wanted(extra_args), exchange)
        except SpecError as error:
            self.rejected(external_id, (extra_args or {}).get(STEERING_KEY), error)
            raise
        return asked

    async def metrics(self, accept: str) -> bytes:
        """The hub's metrics page in a format that ``accept`` names; empty if the hub is away."""
        try:
            return await self._link.ask(MetricsAsked(accept)) or b""
        except HubError:
            return b""

    async def report(self, external_id: str, headers: Headers) -> bytes | None:
        """A request's report as JSON, as the hub's own page has it; None for an unknown one.

        Raises:
            UnauthenticatedError: those headers show nobody who may observe.
            HubError: the hub is away.
        """
        if not self._callers.may_observe(headers):
            raise UnauthenticatedError("NO_CREDENTIALS", "a token with the scope observe is needed")
        async with self._asking:
            return await self._link.ask(ReportAsked(external_id, 0.0, True))

    def stamp(
        self,
        external_id: str,
        asked: Asked | None,
        num_prompt_tokens: int,
        traceparent: str = "",
        is_awaited: bool = False,
    ) -> bytes:
        """The bytes that travel with the request. A refusal is counted, then raised.

        ``is_awaited``: a response waits for the request's report.
        """
        try:
            made = self._admission.stamp(external_id, asked, num_prompt_tokens)
        except SpecError as error:
            self.rejected(external_id, asked.policy if asked else None, error)
            raise
        if asked is not None:
            self._link.admitted(external_id, made.policy, made.digest, asked.beaten)
        made = msgspec.structs.replace(made, traceparent=traceparent, is_awaited=is_awaited)
        return encode(made)

    def rejected(self, external_id: str, flag: object, error: SpecError) -> None:
        """Count a refusal under the policy's name if there is such a policy."""
        policy = flag if isinstance(flag, str) and flag in self._link.policies else UNKNOWN
        self._link.rejected(external_id, policy, error.field, error.reason)

    def _note_report(self, external_id: str, want: Wanted, exchange: Exchange | None) -> None:
        if want is Wanted.NOTHING:
            return
        if exchange is None:
            raise SpecError(REPORT_KEY, "goes into an HTTP response; else call GetRequestReport")
        asked = ReportAsked(external_id, REPORT_WAIT_SECONDS, want is Wanted.ACTIVATIONS)

        async def report() -> bytes:
            try:
                found = await self._link.ask(asked)
            except HubError:
                return _unavailable(external_id, "the hub is away")
            return found or _unavailable(external_id, "the hub does not know it")

        exchange.reports.append(report)

    def _authorise(self, asked: Asked, identity: Identity | None) -> None:
        """What someone who is known asks for must be allowed to them; others by the settings."""
        if identity is None:
            if self._requires_identity:
                raise SpecError(STEERING_KEY, "needs a bearer token (steering.require_identity)")
            return
        try:
            if Scope.STEER not in identity.granted:
                raise SpecError(STEERING_KEY, f"{identity.name} has not the scope steer")
            if asked.policy == INLINE:
                authorise_spec(identity, asked.spec)
            else:
                authorise_use(identity, asked.policy, asked.spec)
        except AccessError as error:
            raise SpecError(STEERING_KEY, str(error)) from None


def _unavailable(external_id: str, reason: str) -> bytes:
    return msgspec.json.encode({"name": f"requests/{external_id}", "unavailable": reason})
