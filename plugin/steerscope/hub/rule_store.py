"""The rules in force, kept beside the policies they name. On the hub's loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from steerscope.config import SteeringSettings
from steerscope.errors import SpecError
from steerscope.hub.policies import PolicyChangedError, State, now
from steerscope.hub.policy_store import PolicyStore
from steerscope.hub.storage.documents import Change, RulesDocument, next_mark
from steerscope.steering.interventions import digest
from steerscope.steering.rules import Rules, check


@dataclass(frozen=True, slots=True)
class StoredRules:
    """The rules, with an etag that changes whenever they do."""

    rules: Rules
    update_time: int | None = None
    """Microseconds since 1970; None while they are those of the configuration."""

    @property
    def etag(self) -> str:
        """Names this state of them."""
        encoded = msgspec.json.encode(self.rules, order="deterministic")
        return digest(encoded, repr(self.update_time).encode())[:16]


class RuleStore:
    """Changes go through the policies' state: rules and policies never disagree.

    Args:
        policies: which must hold what rules name.
        declared: those of the configuration, in force until others are stored.
        steering: the operator's limits.
    """

    def __init__(self, policies: PolicyStore, declared: Rules, steering: SteeringSettings) -> None:
        self._policies = policies
        self._declared = declared
        self._headers = frozenset(steering.match_headers)

    @property
    def current(self) -> StoredRules:
        """What is in force."""
        kept = self._policies.state.snapshot.rules
        if kept is None:
            return StoredRules(self._declared)
        return StoredRules(kept.rules, kept.update_time)

    @property
    def override_mode(self) -> str:
        """That of the override in force, or ``none``."""
        override = self.current.rules.override
        return override.mode if override is not None else "none"

    @property
    def is_known(self) -> bool:
        """False from a start without the state store until it is there."""
        return self._policies.state.is_known

    async def update(
        self, merge: Callable[[Rules], Rules], *, etag: str = "", validate_only: bool = False
    ) -> StoredRules:
        """Make of the rules what ``merge`` makes of them; ``etag`` empty for whatever they are."""

        async def decide() -> tuple[StoredRules, Change | None]:
            current = self.current
            if etag and etag != current.etag:
                raise PolicyChangedError(f"the rules have etag {current.etag!r}")
            wanted = merge(current.rules)
            if wanted == current.rules:
                return current, None
            self._check(wanted)
            mark = next_mark(self._policies.state.snapshot.revision + 1)
            kept = RulesDocument(rules=wanted, update_time=now())
            return StoredRules(wanted, kept.update_time), Change(mark=mark, rules=kept)

        return (await decide())[0] if validate_only else await self._policies.state.settle(decide)

    def _check(self, rules: Rules) -> None:
        try:
            check(rules, self._headers)
            for field, name in rules.policies():
                stored = self._policies.get(name)
                if stored is None or stored.state is State.INVALID:
                    raise SpecError(field, f"no policy {name!r} is in force")
                if stored.expire_time is not None:
                    raise SpecError(field, f"policy {name!r} ends by itself, and rules do not")
        except SpecError as error:
            raise error.under("rules") from None
