"""The policies an operator declares: checked against the catalog before anything starts."""

from __future__ import annotations

from collections import Counter

from steerscope.catalog.store import Catalog
from steerscope.config import Settings, SteeringSettings
from steerscope.errors import ConfigError, SpecError
from steerscope.steering.admission import RESERVED_NAMES, check_asked
from steerscope.steering.interventions import Policy
from steerscope.steering.rules import check


def check_declared(catalog: Catalog, settings: Settings) -> None:
    """Raise ``ConfigError`` naming the first policy or rule that no request could get.

    Policies that the catalog ships are held to the operator's limits when they are asked for.
    """
    _check_policies(catalog, settings.steering, settings.policies)
    known = {policy.name for policy in (*catalog.policies, *settings.policies)}
    try:
        check(settings.rules, frozenset(settings.steering.match_headers))
        for field, name in settings.rules.policies():
            if name not in known:
                raise SpecError(field, f"no policy {name!r} is declared")
    except SpecError as error:
        raise ConfigError(f"rules.{error}") from None


def _check_policies(
    catalog: Catalog, settings: SteeringSettings, declared: tuple[Policy, ...]
) -> None:
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
