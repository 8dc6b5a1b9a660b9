"""The calls of ``SteeringService`` about rules."""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.field_mask_pb2 import FieldMask

from steerscope.api.v1 import steering_pb2
from steerscope.client.call import UNSET, Call, Unset
from steerscope.client.rules import RulesChange, RulesInForce, rules_change, rules_in_force
from steerscope.hub.rule_messages import rules_message
from steerscope.hub.rule_store import StoredRules
from steerscope.steering.rules import Binding, Override, Rules


def get_rules(*, timeout: float | None = None) -> Call[RulesInForce]:
    """Which policies govern requests beside what they ask for."""
    return Call(
        rpc="GetRules",
        request=steering_pb2.GetRulesRequest(),
        read=lambda answer: rules_in_force(answer.rules),
        is_repeatable=True,
        timeout=timeout,
    )


def update_rules(
    *,
    default_policy: str | Unset | None = UNSET,
    bindings: Iterable[Binding] | Unset = UNSET,
    override: Override | Unset | None = UNSET,
    etag: str = "",
    validate_only: bool = False,
    timeout: float | None = None,
) -> Call[RulesChange]:
    """Change what is given of the rules.

    Args:
        default_policy: a plain name; None for none.
        bindings: all of them, in the order in which they are tried.
        override: the kill switch; None lifts it.
        etag: change only that very version. Without it the call is not repeated by itself.
        validate_only: check everything, change nothing.
        timeout: seconds that the call may take.
    """
    given = {"default_policy": default_policy, "bindings": bindings, "override": override}
    rules = Rules(
        default_policy=None if isinstance(default_policy, Unset) else default_policy,
        bindings=() if isinstance(bindings, Unset) else tuple(bindings),
        override=None if isinstance(override, Unset) else override,
    )
    message = rules_message(StoredRules(rules))
    message.etag = etag
    request = steering_pb2.UpdateRulesRequest(
        rules=message,
        update_mask=FieldMask(paths=[name for name, value in given.items() if value is not UNSET]),
        validate_only=validate_only,
    )
    return Call(
        rpc="UpdateRules",
        request=request,
        read=rules_change,
        is_repeatable=bool(etag) or validate_only,
        timeout=timeout,
    )
