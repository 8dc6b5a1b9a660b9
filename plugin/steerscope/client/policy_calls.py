"""The calls of ``SteeringService`` about policies."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from steerscope.api.v1 import steering_pb2
from steerscope.client.call import PAGE_SIZE, UNSET, Call, Listing, Unset, duration
from steerscope.errors import SpecError
from steerscope.hub.conversions import POLICIES, intervention_message
from steerscope.steering.interventions import Intervention, SteeringSpec, check_spec

Edit = Intervention | Mapping[str, Any]


def create_policy(
    name: str,
    interventions: Iterable[Edit],
    *,
    max_dose: float | None = None,
    description: str = "",
    ttl: float | None = None,
    expire_time: datetime | None = None,
    annotations: Mapping[str, str] | None = None,
    request_id: str = "",
    validate_only: bool = False,
    timeout: float | None = None,
) -> Call[steering_pb2.Policy]:
    """Store a policy; when this returns, requests may name it.

    Args:
        name: its plain name.
        interventions: the edits, at least one.
        max_dose: caps the dose of every token.
        description: a text for people.
        ttl: seconds after which the policy is gone; None for never.
        expire_time: the moment instead, with its time zone.
        annotations: your own.
        request_id: a UUID (version 4) with which it is safe to call again for an hour. The
            client makes one itself where none is given.
        validate_only: check everything, store nothing.
        timeout: seconds that the call may take.
    """
    policy = steering_pb2.Policy(
        description=description,
        max_dose=max_dose,
        interventions=messages(interventions, "policy"),
        annotations=annotations,
    )
    _expire(policy, ttl, expire_time)
    request = steering_pb2.CreatePolicyRequest(
        policy=policy,
        policy_id=name,
        validate_only=validate_only,
        request_id=request_id or ("" if validate_only else str(uuid.uuid4())),
    )
    return Call(
        rpc="CreatePolicy",
        request=request,
        read=lambda answer: answer.policy,
        is_repeatable=True,
        timeout=timeout,
    )


def get_policy(
    name: str, revision_id: str = "", *, timeout: float | None = None
) -> Call[steering_pb2.Policy]:
    """One policy by its plain name, as it is or as it was at a revision."""
    full = POLICIES + name + (f"@{revision_id}" if revision_id else "")
    return Call(
        rpc="GetPolicy",
        request=steering_pb2.GetPolicyRequest(name=full),
        read=lambda answer: answer.policy,
        is_repeatable=True,
        timeout=timeout,
    )


def list_policies(
    filter: str = "", *, timeout: float | None = None
) -> Listing[steering_pb2.Policy]:
    """The policies for which ``filter`` holds, e.g. ``origin = "created"``; it is AIP-160."""
    return Listing(
        rpc="ListPolicies",
        request=steering_pb2.ListPoliciesRequest(page_size=PAGE_SIZE, filter=filter),
        items=lambda page: page.policies,
        timeout=timeout,
    )


def list_policy_revisions(
    name: str, *, timeout: float | None = None
) -> Listing[steering_pb2.Policy]:
    """A policy as it is and as it was, newest first."""
    return Listing(
        rpc="ListPolicyRevisions",
        request=steering_pb2.ListPolicyRevisionsRequest(name=POLICIES + name, page_size=PAGE_SIZE),
        items=lambda page: page.policies,
        timeout=timeout,
    )


def update_policy(
    name: str,
    *,
    interventions: Iterable[Edit] | Unset = UNSET,
    max_dose: float | Unset | None = UNSET,
    description: str | Unset = UNSET,
    ttl: float | Unset | None = UNSET,
    expire_time: datetime | Unset | None = UNSET,
    annotations: Mapping[str, str] | Unset = UNSET,
    etag: str = "",
    allow_missing: bool = False,
    validate_only: bool = False,
    timeout: float | None = None,
) -> Call[steering_pb2.Policy]:
    """Change what is given of a policy that was created; None clears.

    Args:
        name: its plain name.
        interventions: the edits, all of them.
        max_dose: see ``create_policy``.
        description: see ``create_policy``.
        ttl: seconds from now.
        expire_time: the moment instead, with its time zone.
        annotations: all of them.
        etag: change only that very version. Without it the call is not repeated by itself.
        allow_missing: create it if there is none.
        validate_only: check everything, change nothing.
        timeout: seconds that the call may take.
    """
    given = {
        "interventions": interventions,
        "max_dose": max_dose,
        "description": description,
        "ttl": ttl,
        "expire_time": expire_time,
        "annotations": annotations,
    }
    policy = steering_pb2.Policy(name=POLICIES + name, etag=etag)
    if not isinstance(interventions, Unset):
        policy.interventions.extend(messages(interventions, "policy"))
    if isinstance(max_dose, float | int):
        policy.max_dose = max_dose
    if isinstance(description, str):
        policy.description = description
    _expire(policy, _given(ttl), _given(expire_time))
    if not isinstance(annotations, Unset):
        policy.annotations.update(annotations)
    request = steering_pb2.UpdatePolicyRequest(
        policy=policy,
        update_mask=FieldMask(paths=[name for name, value in given.items() if value is not UNSET]),
        allow_missing=allow_missing,
        validate_only=validate_only,
    )
    return Call(
        rpc="UpdatePolicy",
        request=request,
        read=lambda answer: answer.policy,
        is_repeatable=bool(etag) or validate_only,
        timeout=timeout,
    )


def delete_policy(
    name: str,
    *,
    etag: str = "",
    allow_missing: bool = False,
    validate_only: bool = False,
    timeout: float | None = None,
) -> Call[None]:
    """Remove a policy that was created.

    Args:
        name: its plain name.
        etag: remove only that very version. Without it the call is not repeated by itself.
        allow_missing: succeed where there is none.
        validate_only: check everything, remove nothing.
        timeout: seconds that the call may take.
    """
    request = steering_pb2.DeletePolicyRequest(
        name=POLICIES + name, etag=etag, allow_missing=allow_missing, validate_only=validate_only
    )
    return Call(
        rpc="DeletePolicy",
        request=request,
        read=lambda _: None,
        is_repeatable=bool(etag) or validate_only,
        timeout=timeout,
    )


def messages(edits: Iterable[Edit], where: str = "") -> list[steering_pb2.Intervention]:
    """The edits for the wire; what cannot be put on it is refused here, the hub checks the rest."""
    return [intervention_message(edit) for edit in _checked(edits, where)]


def timestamp(moment: datetime) -> Timestamp:
    """A moment as the API has it."""
    if moment.tzinfo is None:
        raise SpecError("expire_time", "needs its time zone")
    made = Timestamp()
    made.FromDatetime(moment)
    return made


def _given(value: Any) -> Any:
    return None if value is UNSET else value


def _expire(policy: steering_pb2.Policy, ttl: float | None, expire_time: datetime | None) -> None:
    if ttl is not None and expire_time is not None:
        raise SpecError("expire_time", "either it or ttl")
    if ttl is not None:
        policy.ttl.CopyFrom(duration(ttl))
    if expire_time is not None:
        policy.expire_time.CopyFrom(timestamp(expire_time))


def _checked(edits: Iterable[Edit], where: str) -> tuple[Intervention, ...]:
    prefix = f"{where}." if where else ""
    converted = []
    for i, edit in enumerate(edits):
        try:
            converted.append(msgspec.convert(edit, Intervention))
        except msgspec.ValidationError as error:
            raise SpecError(f"{prefix}interventions[{i}]", str(error)) from None
    try:
        check_spec(SteeringSpec(interventions=tuple(converted)))
    except SpecError as error:
        raise (error.under(where) if where else error) from None
    return tuple(converted)
