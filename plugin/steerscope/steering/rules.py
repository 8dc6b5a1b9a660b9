"""Which policy governs a request beside what it asks for: a default, bindings, an override.

Precedence: default, inline, named, bound, ordered, override; the later wins.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import msgspec

from steerscope.errors import SpecError
from steerscope.steering.interventions import PolicyName, digest

MAX_BINDINGS = 100
MAX_HEADERS = 8
MAX_TEXT_CHARACTERS = 256

Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARACTERS)]
HeaderName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9!#$%&'*+.^_`|~-]{1,64}\Z")]
"""As HTTP/2 has them: lower case."""


class SteeringSource(enum.StrEnum):
    """What decided how a request is steered; each beats those before it."""

    NOTHING = ""
    DEFAULT = "default"
    INLINE = "inline"
    NAMED = "named"
    BOUND = "bound"
    ORDERED = "ordered"
    """``SteerRequest`` or ``ReleaseRequest``."""
    OVERRIDE = "override"


class _Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common decoding rules: immutable, strict, by keyword."""


class Match(_Rule, frozen=True):
    """Which requests a rule is for: all that is given must hold, and something must be."""

    model: Text = ""
    """The served model's name."""
    lora: Text = ""
    """The name of the LoRA adapter."""
    identity: Text = ""
    """Whose token the HTTP request bears (``security.identities``)."""
    headers: Annotated[dict[HeaderName, Text], msgspec.Meta(max_length=MAX_HEADERS)] = {}
    """HTTP headers and their exact values."""


class Binding(_Rule, frozen=True):
    """Requests that match are steered by ``policy`` whatever they ask; empty for not at all."""

    name: PolicyName
    match: Match
    policy: PolicyName | None = None


class OverrideMode(enum.StrEnum):
    """What an override does to everything."""

    OFF = "off"
    """Nothing is steered."""
    FORCE = "force"
    """Everything is steered by one policy."""


class Override(_Rule, frozen=True):
    """The kill switch."""

    mode: OverrideMode
    policy: PolicyName | None = None
    reason: Text = ""


class Rules(_Rule, frozen=True):
    """All of them. ``bindings`` are tried in order; the first that matches decides."""

    default_policy: PolicyName | None = None
    bindings: Annotated[tuple[Binding, ...], msgspec.Meta(max_length=MAX_BINDINGS)] = ()
    override: Override | None = None

    def policies(self) -> Iterator[tuple[str, str]]:
        """Every policy named, with the field that names it."""
        if self.default_policy is not None:
            yield "default_policy", self.default_policy
        for i, binding in enumerate(self.bindings):
            if binding.policy is not None:
                yield f"bindings[{i}].policy", binding.policy
        if self.override is not None and self.override.policy is not None:
            yield "override.policy", self.override.policy


class Traits(NamedTuple):
    """What is known of a request besides its prompt and its flag."""

    model: str = ""
    lora: str = ""
    identity: str = ""
    headers: Mapping[str, str] = {}


class Ruling(NamedTuple):
    """What the rules say: which policy (None for no steering), and what decided."""

    source: SteeringSource
    policy: str | None
    rule: str = ""
    """The binding's name."""


def ruling(rules: Rules, traits: Traits, has_asked: bool) -> Ruling | None:
    """What governs a request; None where it gets what it asks for, if anything."""
    if rules.override is not None:
        return Ruling(SteeringSource.OVERRIDE, rules.override.policy)
    for binding in rules.bindings:
        if _matches(binding.match, traits):
            return Ruling(SteeringSource.BOUND, binding.policy, binding.name)
    if not has_asked and rules.default_policy is not None:
        return Ruling(SteeringSource.DEFAULT, rules.default_policy)
    return None


def check(rules: Rules, known_headers: frozenset[str]) -> None:
    """Raise ``SpecError`` unless the rules are well formed by themselves.

    ``known_headers`` are those that front ends look at (``steering.match_headers``).
    """
    names: set[str] = set()
    for i, binding in enumerate(rules.bindings):
        try:
            _check_binding(binding, names, known_headers)
        except SpecError as error:
            raise error.under(f"bindings[{i}]") from None
        names.add(binding.name)
    if (override := rules.override) is not None:
        has_policy = override.policy is not None
        if has_policy != (override.mode is OverrideMode.FORCE):
            needed = "takes none" if has_policy else "needs one"
            raise SpecError("override.policy", f"mode {override.mode} {needed}")


def binding_digest(binding: Binding) -> str:
    """Names a rule without telling what its headers hold."""
    return digest(msgspec.json.encode(binding, order="deterministic"))


def _check_binding(binding: Binding, names: set[str], known_headers: frozenset[str]) -> None:
    match = binding.match
    if binding.name in names:
        raise SpecError("binding", f"{binding.name!r} is there twice")
    if not (match.model or match.lora or match.identity or match.headers):
        raise SpecError("match", "must not be empty; what is for everyone is the default")
    for header in match.headers:
        if header not in known_headers:
            raise SpecError(
                "match.headers", f"{header!r} is not looked at; list it in steering.match_headers"
            )


def _matches(match: Match, traits: Traits) -> bool:
    wanted = ((match.model, traits.model), (match.lora, traits.lora))
    if any(want and want != have for want, have in (*wanted, (match.identity, traits.identity))):
        return False
    return all(traits.headers.get(name) == value for name, value in match.headers.items())
