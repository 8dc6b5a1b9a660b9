"""The policies in force: those of the catalog and the config, and those created over gRPC.

Read on the hub's loop, without waiting. A change is decided on the latest state, stored, and
only then in force here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

import msgspec

from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import SpecError
from steerscope.hub.policies import (
    Draft,
    Origin,
    PolicyChangedError,
    PolicyConflictError,
    PolicyInUseError,
    PolicyLimitError,
    PolicyNotFoundError,
    PolicyReadOnlyError,
    Repeatable,
    RequestReusedError,
    State,
    StoredPolicy,
    declared_policy,
    feature_digest,
    feature_names,
    has_expired,
    kept_policy,
    now,
    preview,
)
from steerscope.hub.storage.documents import (
    MICROSECONDS,
    REQUEST_SECONDS,
    Answered,
    Change,
    Document,
    PolicyStorage,
    Revision,
    Snapshot,
    next_mark,
)
from steerscope.hub.storage.state import SharedState
from steerscope.steering.admission import INLINE, RESERVED_NAMES, UNKNOWN, check_asked
from steerscope.steering.interventions import Policy, SteeringSpec

MAX_REVISIONS = 20
"""How many revisions of a policy are kept, the one in force included."""
CLOCK_SECONDS = 1.0
"""The wall clock may be set: expiry is looked at this often at least."""

_log = logging.getLogger(__name__)


class PolicyStore:
    """Policies by name. Callers validate drafts; the store keeps at most ``max_policies``.

    Args:
        catalog: that the policies' features are of.
        declared: the policies of the configuration.
        steering: the operator's limits.
        storage: where created policies are kept.
        max_policies: of all origins together.
    """

    def __init__(
        self,
        catalog: Catalog,
        declared: tuple[Policy, ...],
        steering: SteeringSettings,
        storage: PolicyStorage,
        max_policies: int = 1000,
    ) -> None:
        # Front ends may still ack what an earlier hub sent them: no number is used again.
        self.revision = now()
        self.state = SharedState(storage, self._adopt)
        self._catalog = catalog
        self._steering = steering
        self._max_policies = max_policies
        self._declared = {
            policy.name: declared_policy(policy, origin)
            for origin, policies in (
                (Origin.CATALOG, catalog.policies),
                (Origin.CONFIG, declared),
            )
            for policy in policies
        }
        self._created: dict[str, StoredPolicy] = {}
        self._feature_digests: dict[str, str] = {}
        self._changed = asyncio.Event()
        self.expired: Callable[[StoredPolicy], None] = lambda _: None
        """Told of each policy whose time is over."""

    def get(self, name: str) -> StoredPolicy | None:
        """The policy of that name."""
        return self._declared.get(name) or self._live(name)

    def revisions(self, name: str) -> tuple[StoredPolicy, ...]:
        """A policy as it is and as it was, newest first; none if there is no such policy."""
        stored = self.get(name)
        if stored is None:
            return ()
        if stored.origin is not Origin.CREATED:
            return (stored,)
        older = self.state.snapshot.documents[name].revisions[1:]
        return stored, *(replace(kept_policy(revision), state=None) for revision in older)

    def all(self) -> tuple[StoredPolicy, ...]:
        """Every policy, in order of name."""
        live = (self._live(name) for name in self._created)
        by_name = {stored.policy.name: stored for stored in live if stored is not None}
        by_name |= self._declared
        return tuple(by_name[name] for name in sorted(by_name))

    def in_force(self) -> tuple[Policy, ...]:
        """What requests may name now."""
        return tuple(stored.policy for stored in self.all() if stored.state is State.ACTIVE)

    def expire_times(self) -> dict[str, int]:
        """When policies in force end by themselves, in microseconds since 1970."""
        return {
            stored.policy.name: stored.expire_time
            for stored in self._created.values()
            if stored.expire_time is not None
        }

    def label(self, name: str) -> str:
        """``name`` if it may be a metric label, else ``unknown``."""
        known = name in self._declared or name in self._created or name == INLINE
        return name if known else UNKNOWN

    async def create(
        self, draft: Draft, call: Repeatable | None = None, *, validate_only: bool = False
    ) -> StoredPolicy:
        """Keep a new policy, or tell what the same call got before."""

        async def decide() -> tuple[StoredPolicy, Change | None]:
            if call is not None and (answered := await self._answered(call)) is not None:
                return self._view(answered.revision), None
            self._check_free(draft.policy.name)
            revision = self._next_revision(draft, None)
            return self._view(revision), self._put(revision, (), call)

        if validate_only:
            self._check_free(draft.policy.name)
            return preview(draft)
        return await self.state.settle(decide)

    async def update(
        self,
        name: str,
        merge: Callable[[StoredPolicy | None], Draft],
        *,
        etag: str = "",
        allow_missing: bool = False,
        validate_only: bool = False,
    ) -> StoredPolicy:
        """Make of a created policy what ``merge`` makes of it.

        Args:
            name: the policy's plain name.
            merge: from the policy (None if it is to be created) to what it is to be; it may
                be called more than once.
            etag: of the policy that is meant; empty for whatever it is now.
            allow_missing: create it if there is none.
            validate_only: change nothing.
        """

        async def decide() -> tuple[StoredPolicy, Change | None]:
            current = self._changeable(name, etag, allow_missing)
            draft = merge(current)
            if current is None:
                self._check_free(name)
            elif current.state is State.ACTIVE and draft.is_met_by(current):
                return current, None
            if draft.expire_time is not None:
                self._check_unbound(name, "may not end by itself")
            if validate_only:
                return preview(draft), None
            revision = self._next_revision(draft, current)
            older = () if current is None else self.state.snapshot.documents[name].revisions
            return self._view(revision), self._put(revision, older)

        return (await decide())[0] if validate_only else await self.state.settle(decide)

    async def delete(
        self,
        name: str,
        *,
        etag: str = "",
        allow_missing: bool = False,
        validate_only: bool = False,
    ) -> None:
        """Drop a created policy; ``etag`` empty means whatever it is now."""

        async def decide() -> tuple[None, Change | None]:
            if self.get(name) is None and allow_missing:
                return None, None
            self._changeable(name, etag, allow_missing=False)
            self._check_unbound(name, "may not be deleted")
            mark = next_mark(self.state.snapshot.revision + 1)
            return None, Change(mark=mark, drop=(name, *self._expired(name)))

        await (decide() if validate_only else self.state.settle(decide))

    async def changed(self) -> None:
        """Return when other policies are in force than when this returned last."""
        while not self._changed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds_to_expiry()):
                    await self._changed.wait()
            self._drop_expired()
        self._changed.clear()

    def _live(self, name: str) -> StoredPolicy | None:
        stored = self._created.get(name)
        return None if stored is None or has_expired(stored.expire_time) else stored

    def _check_free(self, name: str) -> None:
        """Raise if the name cannot be given to a new policy, or there are too many."""
        if name in RESERVED_NAMES:
            raise PolicyConflictError(f"the name {name!r} is reserved")
        if self.get(name) is not None:
            raise PolicyConflictError(f"policy {name!r} exists already")
        if len(self._declared.keys() | self._created.keys()) >= self._max_policies:
            raise PolicyLimitError(f"there are {self._max_policies} policies, no more are allowed")

    def _check_unbound(self, name: str, what: str) -> None:
        rules = self.state.snapshot.rules
        for field, named in rules.rules.policies() if rules is not None else ():
            if named == name:
                raise PolicyInUseError(f"policy {name!r} {what}: rules.{field} names it")

    def _changeable(self, name: str, etag: str, allow_missing: bool) -> StoredPolicy | None:
        stored = self.get(name)
        if stored is None and not allow_missing:
            raise PolicyNotFoundError(f"no policy {name[:80]!r}")
        if stored is not None and stored.origin is not Origin.CREATED:
            raise PolicyReadOnlyError(f"policy {name!r} comes from the {stored.origin}")
        if etag and (stored is None or etag != stored.etag):
            told = "does not exist" if stored is None else f"has etag {stored.etag!r}"
            raise PolicyChangedError(f"policy {name!r} {told}")
        return stored

    async def _answered(self, call: Repeatable) -> Answered | None:
        since = now() - REQUEST_SECONDS * MICROSECONDS
        answered = await self.state.answered(call.request_id, since)
        if answered is not None and answered.fingerprint != call.fingerprint:
            raise RequestReusedError(f"request_id {call.request_id} was used for another request")
        return answered

    def _next_revision(self, draft: Draft, current: StoredPolicy | None) -> Revision:
        at = now()
        created = None if current is None else current.create_time
        number = self.state.snapshot.revision + 1
        return Revision(
            policy=msgspec.structs.replace(draft.policy, revision=number),
            create_time=at if created is None else created,
            update_time=at,
            expire_time=draft.expire_time,
            annotations=dict(sorted(draft.annotations.items())),
            features=self._digests(draft.policy.spec),
        )

    def _put(
        self, revision: Revision, older: Iterable[Revision], call: Repeatable | None = None
    ) -> Change:
        document = Document(revisions=(revision, *older)[:MAX_REVISIONS])
        return Change(
            mark=next_mark(revision.policy.revision),
            put=(document,),
            drop=self._expired(document.name),
            answered=None if call is None else call.answered(revision),
        )

    def _expired(self, but: str) -> tuple[str, ...]:
        """What is kept of policies that are gone by themselves: the next change drops it."""
        return tuple(
            name
            for name, document in self.state.snapshot.documents.items()
            if name != but and has_expired(document.revisions[0].expire_time)
        )

    def _adopt(self, snapshot: Snapshot) -> None:
        """Put a new state in force: it differs from ``self.state.snapshot``."""
        before, self._created = self._created, {}
        known = self.state.snapshot.documents
        for name, document in snapshot.documents.items():
            latest = document.revisions[0]
            if has_expired(latest.expire_time):
                continue
            is_same = known.get(name) is document and name in before
            self._created[name] = before[name] if is_same else self._view(latest)
            self._tell_of(self._created[name], before.get(name))
        for name in self._declared:
            self._declared[name] = replace(self._declared[name], reason=self._shadowed(name))
        self._note_change()

    def _tell_of(self, policy: StoredPolicy, before: StoredPolicy | None) -> None:
        """Log why a policy is not in force, once."""
        name = policy.policy.name
        is_told = before is not None and before.etag == policy.etag
        if not is_told and (why := policy.reason or self._shadowed(name)):
            _log.warning("created policy %r is kept, not in force: %s", name, why)

    def _shadowed(self, name: str) -> str:
        """What a declared policy of the name keeps from being in force; empty for nothing."""
        if name not in self._declared or name not in self._created:
            return ""
        kept = self._created[name].revision_id
        return f"the name is declared; a created policy of that name (revision {kept}) waits"

    def _note_change(self) -> None:
        self.revision += 1
        self._changed.set()

    def _drop_expired(self) -> None:
        created = self._created
        live = {name: s for name, s in created.items() if not has_expired(s.expire_time)}
        if len(live) < len(created):
            self._created = live
            self._note_change()
            for name in created.keys() - live.keys():
                self.expired(created[name])

    def _seconds_to_expiry(self) -> float:
        times = (s.expire_time for s in self._created.values() if s.expire_time is not None)
        soonest = min(times, default=None)
        if soonest is None:
            return CLOCK_SECONDS
        return min(max(soonest - now(), 0) / MICROSECONDS, CLOCK_SECONDS)

    def _view(self, revision: Revision) -> StoredPolicy:
        fault = self._fault(revision)
        kept = kept_policy(revision)
        return replace(kept, state=State.INVALID, reason=fault) if fault else kept

    def _fault(self, revision: Revision) -> str:
        """Why the policy cannot be in force here; empty if it can."""
        spec = revision.policy.spec
        if revision.policy.name in RESERVED_NAMES:
            return "the name is reserved"
        try:
            check_asked(self._catalog, self._steering, spec)
        except SpecError as error:
            return str(error)
        for name, digest in self._digests(spec).items():
            if revision.features.get(name) != digest:
                return f"feature {name!r} is another one than when the policy was stored"
        return ""

    def _digests(self, spec: SteeringSpec) -> dict[str, str]:
        names = sorted(feature_names(spec))
        for name in names:
            if name not in self._feature_digests:
                self._feature_digests[name] = feature_digest(self._catalog, name)
        return {name: self._feature_digests[name] for name in names}
