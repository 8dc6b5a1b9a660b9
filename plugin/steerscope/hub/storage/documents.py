"""What is kept of created policies, and what a place to keep it must be able to do.

A policy is one document: its revisions, newest first. The whole state has one ``mark``, which
every change replaces, and a change only goes through on top of the mark it was made for: two
hubs that share a store never lose each other's updates.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Protocol

import msgspec

from steerscope.errors import HubError, SpecError
from steerscope.steering.interventions import Policy, check_spec
from steerscope.steering.rules import Rules

REQUEST_SECONDS = 3600
"""How long the answer to a ``request_id`` is kept."""
MAX_REQUESTS = 10_000
"""How many such answers are kept; the oldest go first."""

MAX_DIGITS = 20
"""Of the number in a mark."""

MICROSECONDS = 1_000_000
LATEST = 253_402_300_799 * MICROSECONDS
"""The last second that a ``Timestamp`` can say: 9999-12-31T23:59:59Z."""

Moment = Annotated[int, msgspec.Meta(ge=0, le=LATEST)]


class StateError(HubError):
    """The state store cannot be read or written; the message names it."""


class StateAwayError(StateError):
    """The state store cannot be reached now; it may come back."""


class StaleStateError(StateError):
    """The state has changed since it was read; read it again, and decide again."""


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Common decoding rules: immutable, strict, by keyword."""


class Revision(_Kept, frozen=True):
    """A policy as it was stored at one time. Times are microseconds since 1970, UTC."""

    policy: Policy
    create_time: Moment
    update_time: Moment
    expire_time: Moment | None = None
    annotations: dict[str, str] = {}
    features: dict[str, str] = {}
    """What the features named were when this was stored; see ``policies.feature_digest``."""


class Document(_Kept, frozen=True):
    """A created policy: what it is, and what it was before."""

    revisions: tuple[Revision, ...]

    @property
    def name(self) -> str:
        """The policy's plain name."""
        return self.revisions[0].policy.name


class RulesDocument(_Kept, frozen=True):
    """The rules as they were stored last."""

    rules: Rules
    update_time: Moment
    """Microseconds since 1970, UTC."""


class Answered(_Kept, frozen=True):
    """What a request with a ``request_id`` asked (as a digest), and what it got."""

    request_id: str
    fingerprint: str
    at: int
    revision: Revision


class Snapshot(_Kept, frozen=True):
    """All of the state at one mark: ``<number of changes>:<random>``.

    The random part tells a store that was rolled back and written to again from one that
    was not.
    """

    mark: str
    documents: Mapping[str, Document]
    rules: RulesDocument | None = None
    """None until they are stored for the first time."""

    @property
    def revision(self) -> int:
        """How many changes led here."""
        return number(self.mark)


class Change(_Kept, frozen=True):
    """One step from a snapshot to the next."""

    mark: str
    put: tuple[Document, ...] = ()
    drop: tuple[str, ...] = ()
    answered: Answered | None = None
    rules: RulesDocument | None = None
    """None leaves them as they are."""

    def on(self, base: Snapshot) -> Snapshot:
        """The state after this."""
        documents = dict(base.documents)
        for name in self.drop:
            documents.pop(name, None)
        documents.update((document.name, document) for document in self.put)
        return Snapshot(
            mark=self.mark,
            documents=MappingProxyType(documents),
            rules=base.rules if self.rules is None else self.rules,
        )


EMPTY = Snapshot(mark="1:", documents=MappingProxyType({}))


class PolicyStorage(Protocol):
    """Where created policies are kept. On the hub's loop; nothing here blocks it."""

    @property
    def place(self) -> str:
        """What and where this is, for people; never with a password."""
        ...

    async def open(self) -> None:
        """Make ready, once; ``StateError`` if that cannot be, ``StateAwayError`` if not yet."""

    async def load(self, unless: str = "") -> Snapshot | None:
        """All of it; None if the mark is ``unless``."""

    async def commit(self, base: Snapshot, change: Change) -> None:
        """Keep the change for good, or raise; ``StaleStateError`` if ``base`` is not the latest."""

    async def answered(self, request_id: str, since: int) -> Answered | None:
        """What a request of that id got, if that was at ``since`` or later."""

    async def changes(self, seconds: float) -> None:
        """Return when somebody else may have changed the state, or after so long."""

    async def close(self) -> None:
        """Let go of it."""


def next_mark(revision: int) -> str:
    """A mark that none had before."""
    return f"{revision}:{secrets.token_hex(4)}"


def number(mark: str) -> int:
    """How many changes a mark stands for; ``StateError`` if it is none of ours."""
    digits = mark.partition(":")[0]
    if not (digits.isascii() and digits.isdecimal() and len(digits) < MAX_DIGITS):
        raise StateError(f"{mark[:40]!r} is no mark of a state")
    return int(digits)


def encode(kept: Document | RulesDocument | Answered) -> bytes:
    """As JSON."""
    return msgspec.json.encode(kept)


def decode_document(name: str, payload: bytes, place: str) -> Document:
    """A document as stored under ``name``; ``StateError`` if it is not that."""
    try:
        document = msgspec.json.decode(payload, type=Document)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"{place}: policy {name[:80]!r} cannot be read: {error}") from None
    if not document.revisions or any(r.policy.name != name for r in document.revisions):
        raise StateError(f"{place}: what is kept as policy {name[:80]!r} is another one")
    for revision in document.revisions:
        _check(revision, f"{place}: policy {name[:80]!r}")
    return document


def decode_rules(payload: bytes, place: str) -> RulesDocument:
    """The rules as stored; ``StateError`` if they are not that."""
    try:
        return msgspec.json.decode(payload, type=RulesDocument)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"{place}: the rules cannot be read: {error}") from None


def decode_answered(payload: bytes, place: str) -> Answered:
    """An answer as stored; ``StateError`` if it is none."""
    try:
        answered = msgspec.json.decode(payload, type=Answered)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StateError(f"{place}: a kept answer cannot be read: {error}") from None
    _check(answered.revision, f"{place}: a kept answer")
    return answered


def _check(revision: Revision, where: str) -> None:
    """Raise ``StateError`` unless it can be shown: its edits are edits, whatever they name."""
    try:
        check_spec(revision.policy.spec)
    except SpecError as error:
        raise StateError(f"{where} is damaged: {error}") from None
