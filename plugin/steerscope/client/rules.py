"""The rules as the hub has them, read from the wire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from steerscope.api.v1 import steering_pb2
from steerscope.hub.rule_messages import UPDATABLE, merged
from steerscope.steering.rules import Rules


@dataclass(frozen=True, slots=True)
class RulesInForce:
    """The rules; ``etag`` is for changing that very version, empty when validate_only.

    ``update_time`` is None where they never were changed.
    """

    rules: Rules
    etag: str
    update_time: datetime | None


@dataclass(frozen=True, slots=True)
class RulesChange:
    """The rules now in force, and what a changed override did to running sequences.

    Attributes:
        in_force: the rules now, or as they would be.
        changed: the first position that the override holds for, by the engine's own id.
        declined: why the override could not be carried out, by the engine's own id.
    """

    in_force: RulesInForce
    changed: Mapping[str, int]
    declined: Mapping[str, str]


def rules_in_force(message: steering_pb2.Rules) -> RulesInForce:
    """What a message says."""
    was_changed = message.HasField("update_time")
    return RulesInForce(
        merged(Rules(), message, frozenset(UPDATABLE)),
        message.etag,
        message.update_time.ToDatetime(UTC) if was_changed else None,
    )


def rules_change(answer: steering_pb2.UpdateRulesResponse) -> RulesChange:
    """What an answer to a change says."""
    return RulesChange(
        rules_in_force(answer.rules),
        {each.request_id: each.first_position for each in answer.sequences},
        {each.request_id: each.reason for each in answer.declined},
    )
