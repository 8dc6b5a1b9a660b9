"""The caller of the RPC being served, and what their allow-lists let them ask for.

Services ask ``current_identity()`` and one of the ``authorise_*``; these raise ``DeniedError``.
An admin is not bound by allow-lists.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar
from fnmatch import fnmatchcase

from steerscope.hub.auth.denials import DeniedError, ExhaustedError
from steerscope.security import ANONYMOUS, Identity, Scope, Unauthenticated
from steerscope.steering.interventions import Intervention, Policy, SteeringSpec

_current: ContextVar[Identity] = ContextVar("steerscope_identity")


def current_identity() -> Identity:
    """Who makes the call that this task serves; ``LookupError`` outside of calls."""
    return _current.get()


def enter(identity: Identity) -> None:
    """The task serves a call of that identity from here on."""
    _current.set(identity)


def anonymous(may: Unauthenticated) -> Identity:
    """The identity of those who show no credentials. On a hub for oneself it has no limits."""
    match may:
        case Unauthenticated.NONE:
            return Identity(name=ANONYMOUS, scopes=())
        case Unauthenticated.OBSERVE:
            return Identity(name=ANONYMOUS, scopes=(Scope.OBSERVE,))
        case Unauthenticated.ADMIN:
            return Identity(
                name=ANONYMOUS,
                scopes=(Scope.ADMIN,),
                rate=None,
                max_concurrent_steers=None,
                max_concurrent_streams=None,
            )


def authorise_policy(identity: Identity, policy: Policy) -> None:
    """May they store this policy: its name, what it edits, how much?"""
    authorise_policy_name(identity, policy.name)
    _authorise_edits(identity, policy.interventions)
    _authorise_dose(identity, policy.max_dose)


def authorise_use(identity: Identity, name: str, spec: SteeringSpec) -> None:
    """May they steer by this stored policy: its name, how much? Its features are its author's."""
    authorise_policy_name(identity, name)
    _authorise_dose(identity, spec.max_dose)


def authorise_spec(identity: Identity, spec: SteeringSpec) -> None:
    """May they steer by these edits, which have no name?"""
    _authorise_edits(identity, spec.interventions)
    _authorise_dose(identity, spec.max_dose)


def authorise_policy_name(identity: Identity, name: str) -> None:
    """May they use, change or delete the policy of that name?"""
    if not _allows(identity, identity.policies, name):
        raise DeniedError(
            "POLICY_NOT_ALLOWED",
            f"{identity.name} may not use or change policy {name[:80]!r}",
            identity=identity.name,
            policy=name[:80],
        )


def authorise_steers(identity: Identity, num_in_force: int) -> None:
    """May they steer one more request, with so many of theirs in force?"""
    most = identity.max_concurrent_steers
    if most is not None and num_in_force >= most:
        raise ExhaustedError(
            "TOO_MANY_STEERS",
            f"{identity.name} steers {num_in_force} requests already, {most} are allowed",
            identity=identity.name,
        )


def _authorise_edits(identity: Identity, edits: Iterable[Intervention]) -> None:
    for edit in edits:
        if not _allows(identity, identity.features, edit.feature):
            raise DeniedError(
                "FEATURE_NOT_ALLOWED",
                f"{identity.name} may not edit feature {edit.feature[:80]!r}",
                identity=identity.name,
                feature=edit.feature[:80],
            )


def _authorise_dose(identity: Identity, max_dose: float | None) -> None:
    most = identity.max_dose
    if most is not None and (max_dose is None or max_dose > most):
        asked = "none is given" if max_dose is None else f"{max_dose:g} is asked"
        raise DeniedError(
            "DOSE_NOT_ALLOWED",
            f"{identity.name} needs a max_dose of at most {most:g}, {asked}",
            identity=identity.name,
            max_dose=f"{most:g}",
        )


def _allows(identity: Identity, patterns: Iterable[str], name: str) -> bool:
    if Scope.ADMIN in identity.granted:
        return True
    return any(fnmatchcase(name, pattern) for pattern in patterns)
