"""One line of the log: JSON, and how it is bound to the line before it.

``previous`` is the SHA-256 of the previous line's bytes without its newline, 64 zeros in the
first line of all. With a key, ``mac`` is the last field: HMAC-SHA256 of the line's bytes as they
are without it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from steerscope.errors import SteerscopeError
from steerscope.hub.audit.events import AuditEvent
from steerscope.hub.audit.fields import Checked, Id, TraceId, printable

GENESIS = "0" * 64
MIN_KEY_BYTES = 32
_MAC = b',"mac":"'
_MAC_BYTES = len(_MAC) + 64 + len(b'"}')

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Time = Annotated[str, msgspec.Meta(pattern=r"\A\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\Z")]


class AuditError(SteerscopeError):
    """The audit log cannot be opened or read; names the file."""


class Entry(Checked, frozen=True, kw_only=True):
    """A line. ``identity`` is who did it, empty for the hub itself.

    ``trace_id`` is the W3C trace of the call or request that led to it, if its caller showed one.
    """

    seq: Annotated[int, msgspec.Meta(ge=1)]
    time: Time
    behind_us: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """How far the clock was behind the line before: it was set back."""
    identity: Id
    trace_id: TraceId = ""
    event: AuditEvent
    previous: Sha256
    mac: Sha256 | None = None


_encode = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(Entry)


def encode(entry: Entry, key: bytes | None) -> bytes:
    """The line, without its newline."""
    body = _encode(entry)
    if key is None:
        return body
    return b'%s%s%s"}' % (body[:-1], _MAC, _mac(key, body).encode())


def decode(line: bytes) -> Entry:
    """The line back; ``ValueError`` if it is none."""
    try:
        entry = _decoder.decode(line)
        datetime.fromisoformat(entry.time)  # of the form, and yet there may be no such day
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ValueError(printable(str(error))) from None
    return entry


def digest(line: bytes) -> str:
    """What the next line will give as ``previous``."""
    return hashlib.sha256(line).hexdigest()


def has_true_mac(line: bytes, key: bytes) -> bool:
    """Whether the line ends with its own HMAC under ``key``."""
    body, mac = line[:-_MAC_BYTES] + b"}", line[-_MAC_BYTES:]
    return hmac.compare_digest(mac, b'%s%s"}' % (_MAC, _mac(key, body).encode()))


def moment(seconds: float) -> str:
    """RFC 3339 in UTC with microseconds; such texts sort as their times do."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


def behind_us(time: str, before: str) -> int | None:
    """By how many microseconds ``time`` is earlier than ``before``; None if it is not."""
    if time >= before:
        return None
    back = datetime.fromisoformat(before) - datetime.fromisoformat(time)
    return round(back.total_seconds() * 1e6)


def read_key(path: Path) -> bytes:
    """The key in a file that only its owner can read; ``AuditError`` says what is wrong."""
    try:
        with path.open("rb") as file:
            mode, key = os.fstat(file.fileno()).st_mode, file.read().strip()
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror or error}") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise AuditError(f"{path}: a key that others can read is none: chmod 600")
    if len(key) < MIN_KEY_BYTES:
        raise AuditError(f"{path}: a key has at least {MIN_KEY_BYTES} bytes, this one {len(key)}")
    return key


def _mac(key: bytes, body: bytes) -> str:
    return hmac.digest(key, body, "sha256").hex()
