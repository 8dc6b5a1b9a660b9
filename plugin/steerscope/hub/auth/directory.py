"""Who is known: the identities of the config and of ``identities_file``, by what they show."""

from __future__ import annotations

import datetime
import hmac
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from steerscope.hub.auth import tokens
from steerscope.hub.auth.denials import UnauthenticatedError
from steerscope.hub.auth.files import WatchedFiles
from steerscope.security import (
    ANONYMOUS,
    Identity,
    Security,
    check_identities,
    read_identities,
)

Clock = Callable[[], datetime.datetime]


class Shown(NamedTuple):
    """What a caller shows, and where from. A header that is given decides alone."""

    peer: str
    authorization: str | None = None
    certificate_uris: tuple[str, ...] = ()
    certificate_subject: str | None = None

    def __repr__(self) -> str:
        return f"Shown(peer={self.peer!r})"


class IdentitiesFromFile(WatchedFiles):
    """The file's identities, which must get on with those of the config."""

    def __init__(self, security: Security, path: str) -> None:
        self._security = security
        self.identities: tuple[Identity, ...] = ()
        super().__init__("security.identities_file", [path])

    def take(self, contents: tuple[bytes, ...]) -> None:
        """Put a new list in force."""
        where = str(self._paths[0])
        found = read_identities(contents[0], where)
        check_identities((*self._security.identities, *found), self._security.tls, where)
        self.identities = found


class Directory:
    """Finds the identity of a caller.

    Args:
        security: whose identities are known.
        file: further ones.
        nobody: the identity of those who show nothing.
        clock: the time by which identities expire.
    """

    def __init__(
        self,
        security: Security,
        file: IdentitiesFromFile | None,
        nobody: Identity,
        clock: Clock = lambda: datetime.datetime.now(datetime.UTC),
    ) -> None:
        self._configured = security.identities
        self._file = file
        self.nobody = nobody
        self._clock = clock

    @property
    def identities(self) -> tuple[Identity, ...]:
        """Everyone known now, expired or not."""
        return (*self._configured, *(self._file.identities if self._file else ()))

    def find(self, shown: Shown) -> Identity:
        """Who it is; raise ``UnauthenticatedError`` for what is wrong or has expired."""
        if shown.authorization is not None:
            return self._in_time(self._by_token(shown.authorization))
        found = [identity for identity in self.identities if _is_certified(identity, shown)]
        if len(found) > 1:
            raise UnauthenticatedError(
                "AMBIGUOUS_CERTIFICATE", "the certificate is that of several identities"
            )
        return self._in_time(found[0]) if found else self.nobody

    def vouches_for(self, identity: Identity) -> bool:
        """Whether that identity, found before, is still known unchanged and has not expired."""
        if identity.name == ANONYMOUS:
            return identity == self.nobody
        return identity in self.identities and not self._has_expired(identity)

    def _by_token(self, authorization: str) -> Identity:
        token = tokens.bearer(authorization)
        if token is None:
            raise UnauthenticatedError(
                "MALFORMED_CREDENTIALS", "the authorization must be: Bearer TOKEN"
            )
        digest = tokens.sha256(token)
        found = None
        for identity in self.identities:  # all of them, so that time tells nothing
            if hmac.compare_digest(identity.token_sha256 or "", digest):
                found = identity
        if found is None:
            raise UnauthenticatedError("UNKNOWN_TOKEN", "nobody has that token")
        return found

    def _in_time(self, identity: Identity) -> Identity:
        if self._has_expired(identity):
            raise UnauthenticatedError(
                "EXPIRED", f"{identity.name} has expired", identity=identity.name
            )
        return identity

    def _has_expired(self, identity: Identity) -> bool:
        return identity.expires is not None and self._clock() >= identity.expires


def shown_over_grpc(
    peer: str,
    metadata: Sequence[tuple[str, str | bytes]],
    auth_context: Mapping[str, Sequence[bytes]],
) -> Shown:
    """What a gRPC caller shows. Raises ``UnauthenticatedError`` on two headers."""
    headers = [value for key, value in metadata if key == "authorization"]
    if len(headers) > 1:
        raise UnauthenticatedError("MALFORMED_CREDENTIALS", "more than one authorization is given")
    subjects = auth_context.get("x509_subject", ())
    return Shown(
        peer,
        _text(headers[0]) if headers else None,
        tuple(map(_text, auth_context.get("peer_uri", ()))),
        _text(subjects[0]) if subjects else None,
    )


def _is_certified(identity: Identity, shown: Shown) -> bool:
    by_uri = identity.certificate_uri in shown.certificate_uris
    by_subject = identity.certificate_subject == shown.certificate_subject is not None
    return by_uri or by_subject


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")
