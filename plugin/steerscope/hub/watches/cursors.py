"""Cursors: where a consumer is, as a string that means nothing to it.

MessagePack in base64url. Numbers are only good for the hub that gave them, whose random id
each cursor holds.
"""

from __future__ import annotations

import base64
from typing import Annotated, TypeVar

import msgspec

from steerscope.errors import SpecError

MAX_CHARACTERS = 65_536

Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class FeedCursor(msgspec.Struct, frozen=True, array_like=True, tag="f", forbid_unknown_fields=True):
    """The last event received of a feed."""

    hub: str
    feed: str
    number: Number


class Reached(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """How far a consumer has got with one completion."""

    serial: Number
    """Of its track."""
    stops: tuple[Number, ...]
    """One past the last position received, of each pass."""
    is_finished: bool


class RequestCursor(
    msgspec.Struct, frozen=True, array_like=True, tag="r", forbid_unknown_fields=True
):
    """How far a consumer has got with one request."""

    hub: str
    completions: tuple[Reached, ...]


Cursor = TypeVar("Cursor", FeedCursor, RequestCursor)


def encode(cursor: FeedCursor | RequestCursor) -> str:
    """The cursor as consumers see it."""
    return base64.urlsafe_b64encode(msgspec.msgpack.encode(cursor)).rstrip(b"=").decode()


def decode(text: str, kind: type[Cursor]) -> Cursor:
    """The cursor that ``text`` stands for; raise ``SpecError`` if that is none of this kind."""
    refusal = SpecError("cursor", f"is not one of this watch: {text[:80]!r}")
    if len(text) > MAX_CHARACTERS:
        raise refusal
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError:
        raise refusal from None
    try:
        return msgspec.msgpack.decode(packed, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise refusal from None
