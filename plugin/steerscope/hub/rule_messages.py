"""Between the API's rules and our own; errors name the field of the message."""

from __future__ import annotations

import re

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from steerscope.api.v1 import steering_pb2
from steerscope.errors import SpecError
from steerscope.hub.conversions import POLICIES
from steerscope.hub.fields import plain_name
from steerscope.hub.rule_store import StoredRules
from steerscope.steering.rules import Binding, Match, Override, OverrideMode, Rules

NAME = "rules"
UPDATABLE = ("default_policy", "bindings", "override")

_MODES = {
    OverrideMode.OFF: steering_pb2.OVERRIDE_MODE_OFF,
    OverrideMode.FORCE: steering_pb2.OVERRIDE_MODE_FORCE,
}
_MODES_BY_NUMBER = {number: mode for mode, number in _MODES.items()}


def rules_message(stored: StoredRules) -> steering_pb2.Rules:
    """The rules as the API shows them."""
    rules = stored.rules
    message = steering_pb2.Rules(
        name=NAME,
        default_policy=_resource(rules.default_policy),
        bindings=[_binding_message(binding) for binding in rules.bindings],
        etag=stored.etag,
    )
    if (override := rules.override) is not None:
        message.override.mode = _MODES[override.mode]
        message.override.policy = _resource(override.policy)
        message.override.reason = override.reason
    if stored.update_time is not None:
        at = Timestamp()
        at.FromMicroseconds(stored.update_time)
        message.update_time.CopyFrom(at)
    return message


def merged(current: Rules, message: steering_pb2.Rules, fields: frozenset[str]) -> Rules:
    """The rules once ``fields`` are as in the message; not yet checked against policies."""
    changes: dict[str, object] = {}
    if "default_policy" in fields:
        changes["default_policy"] = _plain(message.default_policy, "rules.default_policy")
    if "bindings" in fields:
        changes["bindings"] = tuple(
            _binding(binding, f"rules.bindings[{i}]") for i, binding in enumerate(message.bindings)
        )
    if "override" in fields:
        changes["override"] = _override(message.override)
    return _checked(msgspec.structs.replace(current, **changes))


def update_fields(request: steering_pb2.UpdateRulesRequest) -> frozenset[str]:
    """What is to change: what the mask names or, without one, what is given."""
    paths = set(request.update_mask.paths)
    if not paths:
        given = {descriptor.name for descriptor, _ in request.rules.ListFields()}
        return frozenset(given.intersection(UPDATABLE))
    if "*" in paths:
        if len(paths) > 1:
            raise SpecError("update_mask", "'*' stands for all fields, and so alone")
        return frozenset(UPDATABLE)
    for path in sorted(paths.difference(UPDATABLE)):
        raise SpecError("update_mask", f"{path[:80]!r} cannot be updated")
    return frozenset(paths)


def _checked(rules: Rules) -> Rules:
    """The patterns and lengths that the types state hold also for what came over the wire."""
    try:
        return msgspec.convert(msgspec.to_builtins(rules), Rules)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at ")
        path = re.search(r"\$([^`]*)", place)
        raise SpecError(f"rules{path[1] if path else ''}", reason) from None


def _binding_message(binding: Binding) -> steering_pb2.Binding:
    match = binding.match
    return steering_pb2.Binding(
        binding=binding.name,
        match=steering_pb2.Match(
            model=match.model, lora=match.lora, identity=match.identity, headers=match.headers
        ),
        policy=_resource(binding.policy),
    )


def _binding(message: steering_pb2.Binding, field: str) -> Binding:
    match = message.match
    return Binding(
        name=message.binding,
        match=Match(
            model=match.model,
            lora=match.lora,
            identity=match.identity,
            headers=dict(sorted(match.headers.items())),
        ),
        policy=_plain(message.policy, f"{field}.policy"),
    )


def _override(message: steering_pb2.Override) -> Override | None:
    if message.mode == steering_pb2.OVERRIDE_MODE_UNSPECIFIED:
        if message.policy or message.reason:
            raise SpecError("rules.override.mode", "is needed")
        return None
    if message.mode not in _MODES_BY_NUMBER:
        raise SpecError("rules.override.mode", f"{message.mode} is not a mode")
    return Override(
        mode=_MODES_BY_NUMBER[message.mode],
        policy=_plain(message.policy, "rules.override.policy"),
        reason=message.reason,
    )


def _resource(name: str | None) -> str:
    return POLICIES + name if name else ""


def _plain(name: str, field: str) -> str | None:
    return plain_name(name, POLICIES, field) if name else None
