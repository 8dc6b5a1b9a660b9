"""The one gate both ports go through: who calls, may they, and not too often."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

from steerscope.errors import ConfigError
from steerscope.hub.auth.denials import AccessError, DeniedError, UnauthenticatedError
from steerscope.hub.auth.directory import Directory, IdentitiesFromFile, Shown
from steerscope.hub.auth.files import WatchedFiles
from steerscope.hub.auth.identity import anonymous
from steerscope.hub.auth.limits import Limits, network
from steerscope.hub.auth.tls import Certificates
from steerscope.hub.call_trace import current_trace_id
from steerscope.security import (
    ANONYMOUS,
    Identity,
    Scope,
    Security,
    anonymous_may,
    check,
    is_loopback,
)

_log = logging.getLogger(__name__)


class Gate:
    """Lets callers in. Runs on the hub's loop."""

    def __init__(self, directory: Directory, limits: Limits) -> None:
        self.directory = directory
        self.limits = limits
        self.denied: Callable[[str, str, str, str], None] = _nobody
        """Told of each refusal: who, what, the scope it takes, why."""

    def admit(self, shown: Shown, required: Scope | None, target: str) -> Identity:
        """Who calls ``target``, where that scope is required; None is one that nobody has.

        Raises:
            AccessError: they may not, or not now. It is logged, without what they showed.
        """
        try:
            identity = self.directory.find(shown)
            self.limits.call(identity, shown.peer)
            _authorise(identity, required, target)
        except UnauthenticatedError as error:
            self.denied("", target, required or "", error.reason)
            raise _told(self.limits.failure(error, shown.peer), target, shown) from None
        except DeniedError as error:
            self.denied(identity.name, target, required or "", error.reason)
            raise _told(error, target, shown) from None
        return identity

    def check_still(self, identity: Identity) -> None:
        """Raise ``UnauthenticatedError`` if someone admitted before would not be now."""
        if not self.directory.vouches_for(identity):
            raise UnauthenticatedError(
                "CREDENTIALS_CHANGED", f"{identity.name} has changed or expired; call again"
            )


class Guard(NamedTuple):
    """All that guards a hub."""

    gate: Gate
    certificates: Certificates | None
    watched: tuple[WatchedFiles, ...]

    @property
    def problems(self) -> list[str]:
        """What is wrong with files that changed, for health."""
        return [files.problem for files in self.watched if files.problem]


def guard(security: Security, addresses: Mapping[str, str]) -> Guard:
    """Read every file that ``security`` names; raise ``ConfigError`` if that is not enough.

    Args:
        security: with absolute paths.
        addresses: where the hub will listen, by setting.
    """
    check(security, addresses)
    certificates = Certificates(security.tls) if security.tls else None
    path = security.identities_file
    file = IdentitiesFromFile(security, path) if path else None
    nobody = anonymous(anonymous_may(security, addresses.values()))
    directory = Directory(security, file, nobody)
    if not directory.identities and not all(map(is_loopback, addresses.values())):
        raise ConfigError(f"security.identities_file: {path}: beyond loopback one is needed")
    watched = tuple(files for files in (certificates, file) if files is not None)
    return Guard(Gate(directory, Limits()), certificates, watched)


def _authorise(identity: Identity, required: Scope | None, target: str) -> None:
    if required in identity.granted:
        return
    if identity.name == ANONYMOUS and required is not None:
        raise UnauthenticatedError("NO_CREDENTIALS", f"credentials are needed for {target}")
    wanted = "a scope that nobody has" if required is None else f"the scope {required}"
    raise DeniedError(
        "SCOPE_MISSING",
        f"{target} needs {wanted}",
        identity=identity.name,
        scope=required or "",
    )


def _nobody(who: str, target: str, scope: str, reason: str) -> None:
    """Where nobody wants to know."""


def _told(error: AccessError, target: str, shown: Shown) -> AccessError:
    trace = f" (trace {trace_id})" if (trace_id := current_trace_id()) else ""
    _log.warning(
        "refused %s from %s: %s: %s%s", target, network(shown.peer), error.reason, error, trace
    )
    return error
