"""Bearer tokens: 256 random bits in text form, kept only as their SHA-256.

A plain hash is enough because a token cannot be guessed: what slow, salted hashes protect
are passwords, which can. The prefix lets scanners of repositories find tokens that leaked.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import NamedTuple

from steerscope.errors import ConfigError

PREFIX = "sst_"
RANDOM_BYTES = 32
MIN_CHARACTERS = 43
"""What 256 bits take in base 64; anything shorter may have been thought up."""


class NewToken(NamedTuple):
    """A token and what the config keeps of it."""

    token: str
    sha256: str


def new_token() -> NewToken:
    """A token that nobody had before."""
    token = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    return NewToken(token, sha256(token))


def sha256(token: str) -> str:
    """The hash by which a token is known."""
    return hashlib.sha256(token.encode()).hexdigest()


def checked_sha256(token: str) -> str:
    """The hash of a token made elsewhere; raise ``ConfigError`` if it is too short to be safe."""
    if len(token.removeprefix(PREFIX)) < MIN_CHARACTERS or not token.isascii():
        raise ConfigError(
            f"token: must be at least {MIN_CHARACTERS} ASCII characters of 256 random bits; "
            "`steerscope token new` makes one"
        )
    return sha256(token)


def bearer(authorization: str) -> str | None:
    """The token of an ``Authorization`` header; None when it is of another kind."""
    kind, _, token = authorization.partition(" ")
    token = token.strip()
    return token if kind.lower() == "bearer" and token else None
