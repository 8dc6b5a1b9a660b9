"""Settings of who may do what: the ``security`` tree of the config, and files of identities.

    security:
      tls: {certificate: hub.pem, key: hub.key, client_ca: clients.pem}
      identities_file: identities.yaml
      identities:
        - name: team-a
          token_sha256: 9f86…          # what `steerscope token new` prints
          scopes: [steer]
          policies: ["force-*"]
          features: [unknown_entity]
          max_dose: 0.8

Read in every process; enforced in the hub (``hub/auth``).
"""

from __future__ import annotations

import datetime
import enum
import ipaddress
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from steerscope.errors import ConfigError

IDENTITY_NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}\Z"
ANONYMOUS = "anonymous"
"""The name of whoever shows no credentials; no identity may bear it."""

Above0 = Annotated[float, msgspec.Meta(gt=0, le=1e9)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
NonEmpty = Annotated[str, msgspec.Meta(min_length=1)]
Instant = Annotated[datetime.datetime, msgspec.Meta(tz=True)]


class Scope(enum.StrEnum):
    """What an identity may do; each includes those before it."""

    OBSERVE = "observe"
    STEER = "steer"
    ADMIN = "admin"

    @property
    def included(self) -> frozenset[Scope]:
        """This scope and those before it."""
        members = list(Scope)
        return frozenset(members[: members.index(self) + 1])


class Unauthenticated(enum.StrEnum):
    """What callers without credentials may do; ``admin`` is for loopback only."""

    NONE = "none"
    OBSERVE = "observe"
    ADMIN = "admin"


class _Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common decoding rules: immutable, strict, by keyword."""


class Rate(_Settings, frozen=True):
    """A token bucket: ``burst`` calls at once, then so many a second."""

    requests_per_second: Above0 = 100.0
    burst: Positive = 200


class Identity(_Settings, frozen=True):
    """Someone who may call, by bearer token or by client certificate.

    ``policies`` and ``features`` are patterns as ``fnmatch.fnmatchcase`` reads them, each
    against the whole name; none given, none allowed. They and ``max_dose`` bind the scope
    ``steer``: an admin is not bound, and may not be given any.
    """

    name: Annotated[str, msgspec.Meta(pattern=IDENTITY_NAME_PATTERN)]
    scopes: tuple[Scope, ...]
    token_sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None
    certificate_uri: NonEmpty | None = None
    """A URI in the client certificate's subject alternative names, a SPIFFE ID say."""
    certificate_subject: NonEmpty | None = None
    """The client certificate's subject, in the form of RFC 2253."""
    policies: tuple[NonEmpty, ...] = ()
    features: tuple[NonEmpty, ...] = ()
    max_dose: Above0 | None = None
    rate: Rate | None = Rate()
    max_concurrent_steers: Positive | None = 8
    max_concurrent_streams: Positive | None = 32
    expires: Instant | None = None

    @property
    def granted(self) -> frozenset[Scope]:
        """The scopes given and those they include."""
        return frozenset[Scope]().union(*(scope.included for scope in self.scopes))

    @property
    def credentials(self) -> tuple[tuple[str, str], ...]:
        """What proves it is them, as (field, value)."""
        fields = ("token_sha256", "certificate_uri", "certificate_subject")
        found = ((field, getattr(self, field)) for field in fields)
        return tuple((field, value) for field, value in found if value is not None)


class Tls(_Settings, frozen=True):
    """PEM files of the server. With ``client_ca`` gRPC clients must show a certificate of it."""

    certificate: str
    key: str
    client_ca: str | None = None


class Security(_Settings, frozen=True):
    """The whole tree. Paths are absolute once loaded."""

    tls: Tls | None = None
    identities: tuple[Identity, ...] = ()
    identities_file: str | None = None
    """YAML with ``identities``, beside those above; read again whenever it changes."""
    unauthenticated: Unauthenticated | None = None
    """Absent: ``admin`` while no identity is configured and all is on loopback, else ``none``."""
    metrics_open: bool = False
    """Serve ``/metrics`` beyond loopback without credentials."""
    reload_seconds: Above0 = 5.0
    """How often the files above are looked at."""

    @property
    def has_identities(self) -> bool:
        """Whether anyone is named, here or in the file."""
        return bool(self.identities) or self.identities_file is not None


class IdentitiesFile(_Settings, frozen=True):
    """What ``identities_file`` holds."""

    identities: tuple[Identity, ...]


def is_loopback(address: str) -> bool:
    """Whether ``host:port`` can only be reached from this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_private(security: Security, addresses: Iterable[str]) -> bool:
    """Whether this is a hub for oneself: nothing beyond loopback, nobody named."""
    return not security.has_identities and all(map(is_loopback, addresses))


def anonymous_may(security: Security, addresses: Iterable[str]) -> Unauthenticated:
    """What callers without credentials may do at these addresses."""
    if security.unauthenticated is not None:
        return security.unauthenticated
    private = is_private(security, addresses)
    return Unauthenticated.ADMIN if private else Unauthenticated.NONE


def resolved(security: Security, base: Path) -> Security:
    """The same with its paths taken from ``base``."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else str((base / path).absolute())

    tls = security.tls
    if tls is not None:
        paths = {field: absolute(getattr(tls, field)) for field in tls.__struct_fields__}
        tls = msgspec.structs.replace(tls, **paths)
    identities_file = absolute(security.identities_file)
    return msgspec.structs.replace(security, tls=tls, identities_file=identities_file)


def check(security: Security, addresses: Mapping[str, str]) -> None:
    """Raise ``ConfigError`` naming the setting, unless the tree is sound for these addresses."""
    check_identities(security.identities, security.tls, "security.identities")
    for field, address in addresses.items():
        if is_loopback(address):
            continue
        if security.unauthenticated is Unauthenticated.ADMIN:
            raise ConfigError(
                f"security.unauthenticated: admin is for loopback only, {field} is {address}"
            )
        if security.tls is None or not security.has_identities:
            raise ConfigError(
                f"{field}: {address}: beyond loopback security.tls and at least one of "
                "security.identities are needed"
            )


def check_identities(identities: Iterable[Identity], tls: Tls | None, where: str) -> None:
    """Raise ``ConfigError`` unless each can be told from the others and says what it means."""
    names: set[str] = set()
    owners: dict[tuple[str, str], str] = {}
    for identity in identities:
        if identity.name in names or identity.name == ANONYMOUS:
            raise ConfigError(f"{where}: the name {identity.name!r} is taken")
        names.add(identity.name)
        if reason := _unsound(identity, tls):
            raise ConfigError(f"{where}: {identity.name}: {reason}")
        for credential in identity.credentials:
            if (owner := owners.setdefault(credential, identity.name)) != identity.name:
                raise ConfigError(
                    f"{where}: {identity.name}: has the same {credential[0]} as {owner}"
                )


def read_identities(content: bytes, where: str) -> tuple[Identity, ...]:
    """Decode an identities file; raise ``ConfigError`` naming the field."""
    from steerscope import yamltext  # as in ``config``

    try:
        return msgspec.convert(yamltext.read(content), IdentitiesFile).identities
    except (ValueError, msgspec.ValidationError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _unsound(identity: Identity, tls: Tls | None) -> str:
    """What is wrong with an identity by itself; empty when nothing is."""
    if not identity.credentials:
        return "needs token_sha256, certificate_uri or certificate_subject"
    by_certificate = identity.certificate_uri or identity.certificate_subject
    if by_certificate and (tls is None or tls.client_ca is None):
        return "is known by a certificate, which takes security.tls.client_ca"
    if not identity.scopes:
        return "scopes: must not be empty"
    bounds = identity.policies or identity.features or identity.max_dose
    if Scope.ADMIN in identity.scopes and bounds:
        return "an admin is not bound by policies, features or max_dose; leave them out"
    if Scope.STEER not in identity.granted and bounds:
        return "policies, features and max_dose are for the scope steer; leave them out"
    return ""
