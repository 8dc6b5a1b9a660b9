"""From what a caller sends to a draft of a policy; errors name the field of the message."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from steerscope.api.v1 import steering_pb2
from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import SpecError
from steerscope.hub.conversions import interventions
from steerscope.hub.policies import Draft, Repeatable, StoredPolicy, now
from steerscope.hub.storage.documents import LATEST, MICROSECONDS
from steerscope.steering.admission import check_asked
from steerscope.steering.interventions import POLICY_NAME_PATTERN, Policy, digest

MAX_DESCRIPTION_CHARACTERS = 4096
MAX_ANNOTATIONS = 16
MAX_ANNOTATION_CHARACTERS = 1024
ANNOTATION_PATTERN = r"[a-z][a-z0-9._/-]{0,62}"

_EXPIRATION = "expire_time"
UPDATABLE = ("description", "interventions", "max_dose", "annotations", _EXPIRATION)


class Drafting:
    """Makes drafts, and checks them against the catalog and the operator's limits."""

    def __init__(self, catalog: Catalog, settings: SteeringSettings) -> None:
        self._catalog = catalog
        self._settings = settings

    def new(self, name: str, field: str, message: steering_pb2.Policy) -> Draft:
        """A policy that is to be created.

        Args:
            name: its plain name.
            field: where the caller gave that name.
            message: everything else.
        """
        if not re.fullmatch(POLICY_NAME_PATTERN, name):
            raise SpecError(field, f"must match {POLICY_NAME_PATTERN}")
        return self._checked(name, message, None, frozenset(UPDATABLE))

    def merged(
        self, current: StoredPolicy, message: steering_pb2.Policy, fields: frozenset[str]
    ) -> Draft:
        """A policy whose ``fields`` are to be as in the message."""
        return self._checked(current.policy.name, message, current, fields)

    def _checked(
        self,
        name: str,
        message: steering_pb2.Policy,
        current: StoredPolicy | None,
        fields: frozenset[str],
    ) -> Draft:
        try:
            draft = _draft(name, message, current, fields)
            check_asked(self._catalog, self._settings, draft.policy.spec)
        except SpecError as error:
            raise error.under("policy") from None
        return draft


def update_fields(request: steering_pb2.UpdatePolicyRequest) -> frozenset[str]:
    """What is to change: what the mask names or, without one, what is given."""
    message = request.policy
    if not request.update_mask.paths:
        given = {descriptor.name for descriptor, _ in message.ListFields()}
        return frozenset(given.intersection(UPDATABLE)) | _expiration(given)
    paths = set(request.update_mask.paths)
    if "*" in paths:
        if len(paths) > 1:
            raise SpecError("update_mask", "'*' stands for all fields, and so alone")
        return frozenset(UPDATABLE)
    for path in sorted(paths.difference(UPDATABLE, {"ttl"})):
        raise SpecError("update_mask", f"{path[:80]!r} cannot be updated")
    return frozenset(paths - {"ttl"}) | _expiration(paths)


def repeatable(request: steering_pb2.CreatePolicyRequest, caller: str) -> Repeatable | None:
    """What makes the call the same as another, if it has a ``request_id``."""
    if not request.request_id:
        return None
    try:
        parsed = uuid.UUID(request.request_id)
    except ValueError:
        parsed = uuid.UUID(int=0)
    if parsed.version != 4 or str(parsed) != request.request_id.lower():
        raise SpecError("request_id", "must be a UUID of version 4")
    asked = steering_pb2.CreatePolicyRequest()
    asked.CopyFrom(request)
    asked.ClearField("request_id")
    content = asked.SerializeToString(deterministic=True)
    return Repeatable(str(parsed), digest(caller.encode(), content))


def _expiration(fields: set[str]) -> frozenset[str]:
    return frozenset({_EXPIRATION} if fields & {"ttl", _EXPIRATION} else ())


def _draft(
    name: str,
    message: steering_pb2.Policy,
    current: StoredPolicy | None,
    fields: frozenset[str],
) -> Draft:
    """The draft; what is not in ``fields`` is as in ``current``, which may only then be None."""
    asked = Draft(
        Policy(
            name=name,
            interventions=interventions(message.interventions),
            max_dose=message.max_dose if message.HasField("max_dose") else None,
            description=_described(message.description),
        ),
        _expire_time(message),
        _annotations(message.annotations),
    )
    if current is None:
        return asked

    def chosen(field: str) -> Draft | StoredPolicy:
        return asked if field in fields else current

    return Draft(
        Policy(
            name=name,
            interventions=chosen("interventions").policy.interventions,
            max_dose=chosen("max_dose").policy.max_dose,
            description=chosen("description").policy.description,
        ),
        chosen(_EXPIRATION).expire_time,
        chosen("annotations").annotations,
    )


def _described(text: str) -> str:
    if len(text) > MAX_DESCRIPTION_CHARACTERS:
        raise SpecError("description", f"longer than {MAX_DESCRIPTION_CHARACTERS} characters")
    return text


def _annotations(given: Mapping[str, str]) -> dict[str, str]:
    if len(given) > MAX_ANNOTATIONS:
        raise SpecError("annotations", f"more than {MAX_ANNOTATIONS} are not allowed")
    for key, value in given.items():
        if not re.fullmatch(ANNOTATION_PATTERN, key):
            raise SpecError("annotations", f"key {key[:80]!r} must match {ANNOTATION_PATTERN}")
        if len(value) > MAX_ANNOTATION_CHARACTERS:
            limit = MAX_ANNOTATION_CHARACTERS
            raise SpecError("annotations", f"value of {key!r} is longer than {limit} characters")
    return dict(sorted(given.items()))


def _expire_time(message: steering_pb2.Policy) -> int | None:
    match message.WhichOneof("expiration"):
        case "ttl":
            ttl = message.ttl
            length = _microseconds(ttl.seconds, ttl.nanos, "ttl")
            if length <= 0:
                raise SpecError("ttl", "must be above zero")
            return _possible(now() + length, "ttl")
        case "expire_time":
            at: Timestamp = message.expire_time
            moment = _microseconds(at.seconds, at.nanos, "expire_time")
            if moment <= now():
                raise SpecError("expire_time", "must be in the future")
            return _possible(moment, "expire_time")
    return None


def _microseconds(seconds: int, nanos: int, field: str) -> int:
    if not 0 <= nanos < 10**9:
        raise SpecError(field, f"nanos must be from 0 to 999999999, got {nanos}")
    return seconds * MICROSECONDS + nanos // 1000


def _possible(moment: int, field: str) -> int:
    if moment > LATEST:
        raise SpecError(field, "is past the year 9999")
    return moment
