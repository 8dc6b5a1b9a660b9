"""The policies an operator declares: checked against the catalog before anything starts."""

from __future__ import annotations

from collections import Counter

from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import ConfigError, SpecError
from steerscope.steering.admission import RESERVED_NAMES, check_asked
from steerscope.steering.interventions import Policy


def check_declared(
    catalog: Catalog, settings: SteeringSettings, declared: tuple[Policy, ...]
) -> None:
    """Raise ``ConfigError`` naming the first policy that no request could ask for.

    Those the catalog ships are held to the operator's limits when they are asked for.
    """
    names = [policy.name for policy in (*catalog.policies, *declared)]
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"policy {name!r} is declared {count} times")
        if name in RESERVED_NAMES:
            raise ConfigError(f"policy {name!r}: the name is reserved")
    for policy in declared:
        try:
            check_asked(catalog, settings, policy.spec)
        except SpecError as error:
            raise ConfigError(f"policy {policy.name!r}: {error}") from None
