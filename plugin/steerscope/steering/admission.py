"""The gate: a request's steering flag is resolved and stamped, or refused.

Runs in the front-end process (API server or ``LLM``), once per request, before the
engine sees it. Nothing past this point can reject, so everything that can be wrong
is checked here.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import msgspec

from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import SpecError, UnknownPolicyError
from steerscope.steering import segments
from steerscope.steering.interventions import (
    Policy,
    SteeringSpec,
    parse_spec,
    steering_digest,
)
from steerscope.steering.rules import Rules, Ruling, SteeringSource, Traits, ruling
from steerscope.steering.stamp import ASKED, Stamp

STEERING_KEY = "steering"
REPORT_KEY = "steerscope_report"
OUR_KEYS = (STEERING_KEY, REPORT_KEY)
INLINE = "inline"
UNKNOWN = "unknown"
RESERVED_NAMES = frozenset({INLINE, UNKNOWN})
"""Policy labels that stand for something else; no policy may bear them."""

MAX_CHECKED = 1024
"""Specs that are remembered to be right."""

NO_STEERING = SteeringSpec(interventions=())
NO_TRAITS = Traits()

_OUR_PREFIX = "steer"


@dataclass(frozen=True, slots=True)
class Asked:
    """The steering that a request gets: which policy (or ``inline``) and what it does.

    Without a policy it is none, since a rule says so.
    """

    policy: str
    spec: SteeringSpec
    source: SteeringSource = SteeringSource.NAMED
    rule: str = ""
    """The binding's name, if one decided."""
    beaten: str = ""
    """What the request itself asked for, if something else decided."""

    @property
    def by_request(self) -> bool:
        """Whether the request gets what it asked for itself."""
        return self.source in ASKED


def check_asked(catalog: Catalog, settings: SteeringSettings, spec: SteeringSpec) -> None:
    """Raise ``SpecError`` unless the catalog can do it and the operator allows as much."""
    if len(spec.interventions) > settings.max_interventions:
        raise SpecError("interventions", f"more than {settings.max_interventions} are not allowed")
    if settings.max_dose is not None and (spec.max_dose or 0.0) > settings.max_dose:
        raise SpecError("max_dose", f"{spec.max_dose} is over the cap of {settings.max_dose}")
    catalog.check(spec)


def capped(settings: SteeringSettings, spec: SteeringSpec) -> SteeringSpec:
    """The steering with the cap on its dose that holds: its own, or else the operator's."""
    return SteeringSpec(
        interventions=spec.interventions, max_dose=spec.max_dose or settings.max_dose
    )


class Wanted(enum.IntEnum):
    """What the response is to hold."""

    NOTHING = 0
    REPORT = 1
    ACTIVATIONS = 2
    """The report with every token's activations."""


def wanted(extra_args: Mapping[str, Any] | None) -> Wanted:
    """Read the report flag; raise ``SpecError`` unless it is one of the numbers above."""
    flag = (extra_args or {}).get(REPORT_KEY, 0)
    if flag == 0 and not isinstance(flag, bool):
        return Wanted.NOTHING
    if isinstance(flag, bool) or flag not in tuple(Wanted):
        raise SpecError(REPORT_KEY, "must be 0, 1 for the report or 2 for its activations too")
    return Wanted(flag)


class Admission:
    """Resolves flags against the catalog and the policies in force.

    Args:
        catalog: the catalog being served.
        settings: limits per request.
        policies: called per request for the current snapshot, name to policy.
        rules: called per request for those in force.
        refused: why nothing may be steered in this engine; empty where it may.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: SteeringSettings,
        policies: Callable[[], Mapping[str, Policy]],
        rules: Callable[[], Rules] = Rules,
        refused: str = "",
    ) -> None:
        self._rules = rules
        self._catalog = catalog
        self._settings = settings
        self._policies = policies
        self._refused = refused
        self._check = lru_cache(MAX_CHECKED)(partial(check_asked, catalog, settings))

    def resolve(
        self, extra_args: Mapping[str, Any] | None, traits: Traits = NO_TRAITS
    ) -> Asked | None:
        """The steering that the request gets; None for none. Raises ``SpecError``.

        A flag that is wrong is refused also where a rule beats it.
        """
        asked = self._asked(extra_args)
        ruled = ruling(self._rules(), traits, asked is not None)
        return asked if ruled is None else self._ruled(ruled, asked)

    def _asked(self, extra_args: Mapping[str, Any] | None) -> Asked | None:
        extra_args = extra_args or {}
        for key in extra_args:
            if isinstance(key, str) and key.startswith(_OUR_PREFIX) and key not in OUR_KEYS:
                raise SpecError(key, f"not a key of ours; those are {', '.join(OUR_KEYS)}")
        if STEERING_KEY not in extra_args:
            return None
        if self._refused:
            raise SpecError(STEERING_KEY, self._refused)
        try:
            return self._resolve(extra_args[STEERING_KEY])
        except SpecError as error:
            raise error.under(STEERING_KEY) from None

    def _ruled(self, ruled: Ruling, asked: Asked | None) -> Asked:
        beaten = asked.policy if asked is not None else ""
        if ruled.policy is None:
            return Asked("", NO_STEERING, ruled.source, ruled.rule, beaten)
        by = f"{ruled.source} {ruled.rule}".strip()
        policy = self._policies().get(ruled.policy)
        if policy is None:
            reason = f"policy {ruled.policy!r} ({by}) is not in force, so nothing is served"
            raise UnknownPolicyError(STEERING_KEY, reason)
        if self._refused:
            raise SpecError(STEERING_KEY, f"policy {ruled.policy!r} ({by}): {self._refused}")
        self._check(policy.spec)
        return Asked(policy.name, policy.spec, ruled.source, ruled.rule, beaten)

    def stamp(self, external_id: str, asked: Asked | None, num_prompt_tokens: int) -> Stamp:
        """The stamp for a request of that length. Raises ``SpecError`` past the row limit."""
        if asked is None:
            return Stamp(external_id)
        spec = capped(self._settings, asked.spec)
        edits, max_dose = spec.interventions, spec.max_dose
        bare = Stamp(external_id, source=asked.source, rule=asked.rule, asked=asked.beaten)
        if not edits:
            return bare
        parts = segments.build(self._catalog.digest, edits, num_prompt_tokens, max_dose)
        distinct = len({part.digest for part in parts})
        if distinct > self._settings.max_rows_per_request:
            raise SpecError(
                f"{STEERING_KEY}.interventions",
                f"phases and spans make {distinct} different combinations of edits, "
                f"at most {self._settings.max_rows_per_request} are allowed",
            )
        digest = steering_digest(self._catalog.digest, edits, max_dose)
        return msgspec.structs.replace(
            bare,
            policy=asked.policy,
            digest=digest,
            interventions=edits,
            segments=parts,
            max_dose=max_dose,
        )

    def _resolve(self, flag: object) -> Asked:
        if not isinstance(flag, str):
            kind = type(flag).__name__
            raise SpecError("", f"must be a policy name or a JSON string, got {kind}")
        text = flag.strip()
        asked = self._inline(text) if text.startswith("{") else self._named(text)
        self._check(asked.spec)
        return asked

    def _inline(self, text: str) -> Asked:
        if self._settings.allow_inline is False:
            raise SpecError("", "inline steering is off (steering.allow_inline); name a policy")
        return Asked(INLINE, parse_spec(text), SteeringSource.INLINE)

    def _named(self, name: str) -> Asked:
        policy = self._policies().get(name)
        if policy is None:
            raise UnknownPolicyError("", f"no policy {name[:80]!r}")
        return Asked(policy.name, policy.spec)
