"""The policies an operator declares: checked against the catalog before anything starts."""

from __future__ import annotations

from collections import Counter

from steerscope.catalog.store import Catalog
from steerscope.errors import ConfigError, SpecError
from steerscope.steering.admission import RESERVED_NAMES
from steerscope.steering.interventions import Policy


def check_declared(catalog: Catalog, declared: tuple[Policy, ...]) -> None:
    """Raise ``ConfigError`` naming the first policy that is malformed or declared twice."""
    names = [policy.name for policy in (*catalog.policies, *declared)]
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"policy {name!r} is declared {count} times")
        if name in RESERVED_NAMES:
            raise ConfigError(f"policy {name!r}: the name is reserved")
    for policy in declared:
        try:
            catalog.check(policy.spec)
        except SpecError as error:
            raise ConfigError(f"policy {policy.name!r}: {error}") from None
