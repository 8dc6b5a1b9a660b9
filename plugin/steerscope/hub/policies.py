"""The policies in force: those of the catalog and the config, and those created over gRPC.

Kept in memory by the hub's one loop; every change makes a new revision.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import msgspec

from steerscope.catalog.store import Catalog
from steerscope.errors import SteerscopeError
from steerscope.steering.admission import INLINE, RESERVED_NAMES, UNKNOWN
from steerscope.steering.interventions import Policy, canonical_json, digest


class Origin(enum.Enum):
    """Where a policy was declared; only created ones can be deleted."""

    CATALOG = "catalog"
    CONFIG = "config"
    CREATED = "created"


@dataclass(frozen=True, slots=True)
class StoredPolicy:
    """A policy with its origin and an etag that changes whenever it does."""

    policy: Policy
    origin: Origin
    etag: str


class PolicyConflictError(SteerscopeError):
    """The name is taken."""


class PolicyReadOnlyError(SteerscopeError):
    """The policy comes from the catalog or the config."""


class PolicyChangedError(SteerscopeError):
    """The etag given is not the policy's."""


class PolicyLimitError(SteerscopeError):
    """There are as many policies as are allowed; each is a metric label."""


class PolicyStore:
    """Policies by name. Callers validate; the store keeps at most ``max_policies``."""

    def __init__(
        self, catalog: Catalog, declared: tuple[Policy, ...], max_policies: int = 1000
    ) -> None:
        self.revision = 1
        self._max_policies = max_policies
        self._stored = {
            policy.name: _stored(policy, origin)
            for origin, policies in (
                (Origin.CATALOG, catalog.policies),
                (Origin.CONFIG, declared),
            )
            for policy in policies
        }

    def get(self, name: str) -> StoredPolicy | None:
        """The policy of that name."""
        return self._stored.get(name)

    def all(self) -> tuple[StoredPolicy, ...]:
        """Every policy, in order of name."""
        return tuple(self._stored[name] for name in sorted(self._stored))

    def label(self, name: str) -> str:
        """``name`` if it may be a metric label, else ``unknown``."""
        return name if name in self._stored or name == INLINE else UNKNOWN

    def check_free(self, name: str) -> None:
        """Raise if the name cannot be given to a new policy, or there are too many."""
        if name in RESERVED_NAMES:
            raise PolicyConflictError(f"the name {name!r} is reserved")
        if name in self._stored:
            raise PolicyConflictError(f"policy {name!r} exists already")
        if len(self._stored) >= self._max_policies:
            raise PolicyLimitError(f"there are {self._max_policies} policies, no more are allowed")

    def create(self, policy: Policy) -> StoredPolicy:
        """Keep a new policy."""
        self.check_free(policy.name)
        self.revision += 1
        stored = _stored(msgspec.structs.replace(policy, revision=self.revision), Origin.CREATED)
        self._stored[policy.name] = stored
        return stored

    def delete(self, name: str, etag: str) -> None:
        """Drop a created policy; ``etag`` empty means whatever it is now. It must exist."""
        stored = self._stored[name]
        if stored.origin is not Origin.CREATED:
            raise PolicyReadOnlyError(f"policy {name!r} comes from the {stored.origin.value}")
        if etag and etag != stored.etag:
            raise PolicyChangedError(f"policy {name!r} has etag {stored.etag!r}")
        self.revision += 1
        del self._stored[name]


def _stored(policy: Policy, origin: Origin) -> StoredPolicy:
    content = digest(
        policy.description.encode(),
        canonical_json(policy.interventions),
        repr(policy.max_dose).encode(),
        str(policy.revision).encode(),
    )
    return StoredPolicy(policy, origin, content[:16])
