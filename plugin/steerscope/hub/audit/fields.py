"""What an audit event may hold in a text field: nothing that a prompt fits into by mistake.

Every text field is one of the types below. Each has a bound and a way to be cleaned, which
``Checked`` applies when a struct is made, so that there are no events but clean ones:

    Digest, TraceId, PolicyName, Word, FieldPath, RpcName, FeatureName   of one form, else ``?``
    Id       chosen by others (request ids, identities): printable, cut at 128 characters
    Reason   a message of ours: what it quotes of others is taken out, cut at 200 characters
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import msgspec

MAX_ID = 128
MAX_REASON = 200
OTHER = "?"
"""Stands for text that is not of the field's form; it is not repeated."""

_CUT_HASH = 16
_NOT_AN_APOSTROPHE = re.compile(r"[\"`]|(?<![a-z])'|'(?![st]\b)")
_QUOTES = "'\"`"


def printable(text: str) -> str:
    """The text with every control, format or surrogate character spelled out."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def clean_id(text: str) -> str:
    """Printable, and short: a long one is cut, and told from others by part of its SHA-256."""
    clean = printable(text)
    if len(clean) <= MAX_ID:
        return clean
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:_CUT_HASH]
    return f"{clean[: MAX_ID - _CUT_HASH - 1]}…{digest}"


def _clean_reason(text: str) -> str:
    """Leave out all from the first quote to the last one: there our errors repeat their input."""
    opening = _NOT_AN_APOSTROPHE.search(text)
    if opening is not None:
        last = max(text.rfind(quote) for quote in _QUOTES)
        after = text[last + 1 :] if last > opening.start() else ""
        text = f"{text[: opening.start()]}'…'{after}"
    clean = printable(text)
    return clean if len(clean) <= MAX_REASON else clean[: MAX_REASON - 1] + "…"


def _only(pattern: str) -> msgspec.Meta:
    """Text of that form in full; anything else becomes ``?``."""
    matches = re.compile(pattern).fullmatch
    return msgspec.Meta(
        pattern=rf"\A(?:{pattern}|\?)\Z",
        max_length=MAX_ID,
        extra={"clean": lambda text: text if matches(text) else OTHER},
    )


Id = Annotated[str, msgspec.Meta(max_length=MAX_ID, extra={"clean": clean_id})]
Reason = Annotated[str, msgspec.Meta(max_length=MAX_REASON, extra={"clean": _clean_reason})]
Digest = Annotated[str, _only(r"[0-9a-f]{0,64}")]
TraceId = Annotated[str, _only(r"(?:[0-9a-f]{32})?")]
PolicyName = Annotated[str, _only(r"(?:[a-z][a-z0-9-]{0,62})?")]
FeatureName = Annotated[str, _only(r"(?:[a-z][a-z0-9_]{0,62})?")]
Word = Annotated[str, _only(r"[a-z0-9_]{0,32}")]
FieldPath = Annotated[str, _only(r"[A-Za-z0-9_.\[\]-]{0,128}")]
RpcName = Annotated[str, _only(r"[A-Za-z0-9_./]{0,128}")]


class Checked(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """A struct whose text fields are clean from the start, made here or read from a file."""

    def __post_init__(self) -> None:
        for name, clean in cleaners(type(self)):
            given = getattr(self, name)
            cleaned = clean(given)
            if cleaned is not given:
                msgspec.structs.force_setattr(self, name, cleaned)


@functools.cache
def cleaners(struct: type[Checked]) -> tuple[tuple[str, Callable[[str], str]], ...]:
    """The text fields of a struct, each with what cleans it."""
    hints: dict[str, Any] = get_type_hints(struct, include_extras=True)
    return tuple(
        (name, meta.extra["clean"])
        for name, hint in hints.items()
        for meta in getattr(hint, "__metadata__", ())
        if isinstance(meta, msgspec.Meta) and meta.extra and "clean" in meta.extra
    )
