"""What a request may ask: interventions on named features.

The wire form is JSON (``vllm_xargs.steering``), the same tree in YAML policies:

    {"interventions": [{"feature": "known_entity", "clamp": 6.0, "phase": "all"}]}

Exactly one operation per intervention. In the terms of the equation
(``engine/reference.py``): clamp v: lo=hi=v, ablate: lo=hi=0, at_least v: lo=v,
at_most v: hi=v, scale s, add a. ``only_if_active`` edits only where the feature
itself is above zero, ``when`` only where another feature of the same site is
above or below a value, at the same token.
"""

from __future__ import annotations

import enum
import hashlib
import math
from functools import lru_cache
from typing import Annotated

import msgspec

from steerscope.errors import SpecError

MAX_INTERVENTIONS = 16
MAX_SPEC_BYTES = 64 * 1024
MAX_POSITION = (1 << 31) - 1
"""Of a token in a request: what an int32 of the API can say."""
POLICY_NAME_PATTERN = r"^[a-z][a-z0-9-]{0,62}\Z"

PolicyName = Annotated[str, msgspec.Meta(pattern=POLICY_NAME_PATTERN)]


class Phase(enum.StrEnum):
    """Which tokens an intervention covers: those of the prompt, those generated, or both."""

    PROMPT = "prompt"
    GENERATION = "generation"
    ALL = "all"


class Op(enum.StrEnum):
    """The operations; each is also the key that carries its value."""

    CLAMP = "clamp"
    ABLATE = "ablate"
    AT_LEAST = "at_least"
    AT_MOST = "at_most"
    SCALE = "scale"
    ADD = "add"


class When(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Gate: edit only where ``feature`` (same site and layer) is above and/or below a value."""

    feature: str
    above: float | None = None
    below: float | None = None


_OPS = tuple((op, op.value) for op in Op)


class Intervention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One edit of one feature.

    ``span`` is ``[start, end)`` in token positions of the request, prompt first;
    it narrows the phase, it does not widen it.
    """

    feature: str
    clamp: float | None = None
    ablate: bool | None = None
    at_least: float | None = None
    at_most: float | None = None
    scale: float | None = None
    add: float | None = None
    phase: Phase = Phase.ALL
    only_if_active: bool = False
    when: When | None = None
    span: tuple[int, int] | None = None

    @property
    def op(self) -> Op:
        """The one operation that is set (call ``check`` first)."""
        return next(op for op, field in _OPS if getattr(self, field) is not None)

    @property
    def value(self) -> float:
        """The operation's number; 0.0 for ``ablate``."""
        op = self.op
        return float(getattr(self, op)) if op is not Op.ABLATE else 0.0

    def check(self) -> None:
        """Raise ``SpecError`` unless the edit is well formed by itself."""
        ops = [op for op, field in _OPS if getattr(self, field) is not None]
        if len(ops) != 1:
            named = ", ".join(ops) or "none"
            raise SpecError("", f"exactly one of {', '.join(Op)} is needed, got {named}")
        if self.ablate is False:
            raise SpecError("ablate", "must be true when given")
        _check_finite(ops[0].value, self.value)
        _check_when(self.when)
        _check_span(self.span)


class SteeringSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole request's steering: the edits apply together.

    ``max_dose`` caps the dose of every token at every site: a change that is larger, relative
    to what it is added to, is scaled down to that.
    """

    interventions: tuple[Intervention, ...]
    max_dose: float | None = None


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A named, stored spec. ``revision`` counts changes of the whole policy store."""

    name: PolicyName
    interventions: tuple[Intervention, ...]
    max_dose: float | None = None
    description: str = ""
    revision: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)] = 0

    @property
    def spec(self) -> SteeringSpec:
        """What the policy asks."""
        return SteeringSpec(interventions=self.interventions, max_dose=self.max_dose)


def parse_spec(text: str) -> SteeringSpec:
    """Decode an inline JSON spec; raise ``SpecError`` naming the field."""
    if len(text) > MAX_SPEC_BYTES:
        raise SpecError("", f"longer than {MAX_SPEC_BYTES} characters")
    try:
        spec = msgspec.json.decode(text.encode(), type=SteeringSpec)
    except msgspec.ValidationError as error:
        raise _from_validation(error) from None
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise SpecError("", f"malformed JSON: {error}") from None
    check_spec(spec)
    return spec


def check_spec(spec: SteeringSpec) -> None:
    """Raise ``SpecError`` unless every edit is well formed and none fights another."""
    if not spec.interventions:
        raise SpecError("interventions", "must not be empty")
    if len(spec.interventions) > MAX_INTERVENTIONS:
        raise SpecError("interventions", f"more than {MAX_INTERVENTIONS} are not allowed")
    for i, intervention in enumerate(spec.interventions):
        try:
            intervention.check()
        except SpecError as error:
            raise error.under(f"interventions[{i}]") from None
    if spec.max_dose is not None:
        _check_finite("max_dose", spec.max_dose)
        if spec.max_dose <= 0.0:
            raise SpecError("max_dose", f"must be above zero, got {spec.max_dose}")
    _check_overlaps(spec.interventions)


def canonical_json(interventions: tuple[Intervention, ...]) -> bytes:
    """The interventions as JSON with every default spelled out and keys in order."""
    return msgspec.json.encode(interventions, order="deterministic")


def digest(*parts: bytes) -> str:
    """SHA-256 over length-prefixed parts, as hex."""
    h = hashlib.sha256()
    for part in parts:
        h.update(len(part).to_bytes(8, "little"))
        h.update(part)
    return h.hexdigest()


def steering_digest(
    catalog_digest: str, interventions: tuple[Intervention, ...], max_dose: float | None
) -> str:
    """Names what steering does, whatever the request: equal digests, equal effect."""
    return _steering_digest(catalog_digest, canonical_json(interventions), repr(max_dose))


@lru_cache(maxsize=4096)
def _steering_digest(catalog_digest: str, interventions: bytes, max_dose: str) -> str:
    return digest(catalog_digest.encode(), interventions, max_dose.encode())


def _check_finite(field: str, value: float) -> None:
    if not math.isfinite(value):
        raise SpecError(field, f"must be a finite number, got {value}")


def _check_when(when: When | None) -> None:
    if when is None:
        return
    if when.above is None and when.below is None:
        raise SpecError("when", "needs 'above', 'below' or both")
    for field in ("above", "below"):
        bound = getattr(when, field)
        if bound is not None:
            _check_finite(f"when.{field}", bound)


def _check_span(span: tuple[int, int] | None) -> None:
    if span is not None and not 0 <= span[0] < span[1] <= MAX_POSITION:
        raise SpecError(
            "span",
            f"must be [start, end) with 0 <= start < end <= {MAX_POSITION}, got {list(span)}",
        )


def _check_overlaps(interventions: tuple[Intervention, ...]) -> None:
    for i, second in enumerate(interventions):
        for j, first in enumerate(interventions[:i]):
            if first.feature == second.feature and _may_meet(first, second):
                raise SpecError(
                    f"interventions[{i}].feature",
                    f"{second.feature!r} is already edited by interventions[{j}] "
                    "at the same tokens",
                )


def _may_meet(a: Intervention, b: Intervention) -> bool:
    phases = Phase.ALL in (a.phase, b.phase) or a.phase is b.phase
    if a.span is None or b.span is None:
        return phases
    return phases and a.span[0] < b.span[1] and b.span[0] < a.span[1]


def _from_validation(error: msgspec.ValidationError) -> SpecError:
    """msgspec says ``Expected ... - at `$.interventions[0].clamp``; split the path off."""
    reason, _, path = str(error).partition(" - at `$")
    return SpecError(path.rstrip("`").lstrip("."), reason)
