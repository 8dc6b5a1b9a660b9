"""What an operator declares: checked against the catalog before anything starts."""

from __future__ import annotations

from collections import Counter

from steerscope.catalog.store import Catalog
from steerscope.config import CanarySettings, Settings, SteeringSettings
from steerscope.errors import ConfigError, SpecError
from steerscope.steering.admission import RESERVED_NAMES, check_asked
from steerscope.steering.interventions import Policy
from steerscope.steering.rules import check


def check_declared(catalog: Catalog, settings: Settings) -> None:
    """Raise ``ConfigError`` naming the first policy, rule or expectation that cannot hold.

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
    if settings.canary is not None:
        _check_canary(catalog, settings.canary)


def _check_canary(catalog: Catalog, canary: CanarySettings) -> None:
    labels = {s.name: [band.label for band in s.labels] for s in catalog.signals}
    for name, asked in canary.checks.items():
        for signal, label in asked.expect.items():
            where = f"canary.checks.{name}.expect.{signal}"
            if signal not in labels:
                raise ConfigError(f"{where}: no signal {signal!r} in the catalog")
            if label not in labels[signal]:
                known = ", ".join(labels[signal])
                raise ConfigError(f"{where}: no label {label!r} (there are {known})")


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
