"""What a policy is to the hub: its origin, whether it is in force, what its features are."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from steerscope.catalog.store import Catalog
from steerscope.errors import SteerscopeError
from steerscope.hub.storage.documents import Answered, Revision
from steerscope.steering.interventions import Policy, SteeringSpec, canonical_json, digest


class Origin(enum.StrEnum):
    """Where a policy was declared; only created ones can be changed."""

    CATALOG = "catalog"
    CONFIG = "config"
    CREATED = "created"


class State(enum.StrEnum):
    """Whether requests may name a policy."""

    ACTIVE = "active"
    INVALID = "invalid"
    """Kept, but it does not fit the catalog or the operator's limits."""


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy with its origin and an etag that changes whenever it does.

    Times are microseconds since 1970. ``state`` is None for a revision that is not the latest.
    """

    policy: Policy
    origin: Origin
    etag: str = ""
    revision_id: str = ""
    create_time: int | None = None
    update_time: int | None = None
    expire_time: int | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)
    state: State | None = State.ACTIVE
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a policy is to be; checked against the catalog and the operator's limits."""

    policy: Policy
    expire_time: int | None = None
    annotations: Mapping[str, str] = field(default_factory=dict)

    def is_met_by(self, stored: StoredPolicy) -> bool:
        """Whether there is nothing to change."""
        asked = msgspec.structs.replace(self.policy, revision=stored.policy.revision)
        there = (stored.policy, stored.expire_time, dict(stored.annotations))
        return there == (asked, self.expire_time, dict(self.annotations))


class Repeatable(NamedTuple):
    """A call that may be made again: its id, and a digest of all that it asks."""

    request_id: str
    fingerprint: str

    def answered(self, revision: Revision) -> Answered:
        """What to remember of it."""
        return Answered(
            request_id=self.request_id,
            fingerprint=self.fingerprint,
            at=revision.update_time,
            revision=revision,
        )


class PolicyNotFoundError(SteerscopeError):
    """There is no policy of that name."""


class PolicyConflictError(SteerscopeError):
    """The name is taken."""


class PolicyReadOnlyError(SteerscopeError):
    """The policy comes from the catalog or the config."""


class PolicyChangedError(SteerscopeError):
    """The etag given is not the policy's."""


class PolicyInUseError(SteerscopeError):
    """A rule names the policy."""


class PolicyLimitError(SteerscopeError):
    """There are as many policies as are allowed; each is a metric label."""


class RequestReusedError(SteerscopeError):
    """The request id was used for something else."""


def now() -> int:
    """Microseconds since 1970, UTC."""
    return time.time_ns() // 1000


def feature_names(spec: SteeringSpec) -> frozenset[str]:
    """The features that are edited, or looked at by a gate."""
    edits = spec.interventions
    gates = {edit.when.feature for edit in edits if edit.when is not None}
    return frozenset(gates.union(edit.feature for edit in edits))


def feature_digest(catalog: Catalog, name: str) -> str:
    """Names what a feature is, whatever it is called: a policy that edits it means just that.

    A topk feature depends on its whole dictionary, and so takes the catalog's digest in.
    """
    feature, vectors = catalog.feature(name), catalog.vectors[name]
    numbers = (feature.layer, vectors.b_enc, vectors.threshold, feature.latent)
    return digest(
        f"{feature.kind} {feature.site} {feature.activation}".encode(),
        repr(numbers).encode(),
        vectors.W_enc.tobytes(),
        b"" if vectors.W_dec is None else vectors.W_dec.tobytes(),
        b"" if feature.dictionary is None else catalog.digest.encode(),
    )


def has_expired(expire_time: int | None) -> bool:
    """Whether that moment has come, by our clock."""
    return expire_time is not None and expire_time <= now()


def preview(draft: Draft) -> StoredPolicy:
    """The policy that the draft would become."""
    return StoredPolicy(
        draft.policy,
        Origin.CREATED,
        expire_time=draft.expire_time,
        annotations=draft.annotations,
    )


def kept_policy(revision: Revision) -> StoredPolicy:
    """A created policy, as it was stored."""
    etag = digest(msgspec.json.encode(revision))[:16]
    return StoredPolicy(
        revision.policy,
        Origin.CREATED,
        etag,
        revision_id=etag[:8],
        create_time=revision.create_time,
        update_time=revision.update_time,
        expire_time=revision.expire_time,
        annotations=revision.annotations,
    )


def declared_policy(policy: Policy, origin: Origin) -> StoredPolicy:
    """A policy of the catalog or the config."""
    etag = digest(
        policy.description.encode(),
        canonical_json(policy.interventions),
        repr(policy.max_dose).encode(),
    )[:16]
    return StoredPolicy(policy, origin, etag, revision_id=etag[:8])
