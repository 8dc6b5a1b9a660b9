"""Where a log goes on: after its last whole line, whatever ended the process that wrote it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from steerscope.hub.audit import entries, files
from steerscope.hub.audit.entries import GENESIS, AuditError, Entry
from steerscope.hub.audit.events import LogTorn


class Head(NamedTuple):
    """The newest line: what the next one follows. ``hash`` is the anchor to keep elsewhere."""

    seq: int = 0
    hash: str = GENESIS
    time: str = ""


class Resumed(NamedTuple):
    """The open file, of ``size`` bytes, all of them whole lines; ``torn`` is to be told first."""

    fd: int
    size: int
    first_seq: int
    head: Head
    torn: LogTorn | None


def resume(path: Path, key: bytes | None) -> Resumed:
    """Open the log, or make it; ``AuditError`` if it is not one to go on with. Hold its lock."""
    fd = files.open_private(path)
    try:
        files.sync_folder(path)
        last = files.last_line(fd)
        if last.line is not None:
            head = _head(path, last.line, key)
            first_seq = _entry(path, files.first_line(fd)).seq
        else:
            head = _rotated_head(path, key)
            first_seq = head.seq + 1
        return Resumed(fd, last.end, first_seq, head, _torn(path, fd, last, head.seq + 1))
    except BaseException:
        os.close(fd)
        raise


def _rotated_head(path: Path, key: bytes | None) -> Head:
    """The file has no line yet: it follows the newest rotated one, if there is any."""
    for newest in files.rotated(path)[-1:]:
        fd = os.open(newest, os.O_RDONLY | os.O_NOFOLLOW)
        last = files.last_line(fd)
        os.close(fd)
        if last.line is None or last.num_torn:
            raise AuditError(f"{newest}: is cut off; see steerscope audit verify")
        return _head(newest, last.line, key)
    return Head()


def _head(path: Path, line: bytes, key: bytes | None) -> Head:
    entry = _entry(path, line)
    if (entry.mac is None) != (key is None):
        raise AuditError(f"{path}: the log was begun {'without' if key else 'with'} a key")
    if key is not None and not entries.has_true_mac(line, key):
        raise AuditError(f"{path}: the last line was not written with this key")
    return Head(entry.seq, entries.digest(line), entry.time)


def _entry(path: Path, line: bytes) -> Entry:
    try:
        return entries.decode(line)
    except ValueError as error:
        reason = f"a line of it is no entry ({error})"
        raise AuditError(f"{path}: {reason}; see steerscope audit verify") from None


def _torn(path: Path, fd: int, last: files.LastLine, seq: int) -> LogTorn | None:
    """Put aside what a crash left of entry ``seq``, also if the next crash came just then."""
    remains = files.torn(path, seq)
    if last.num_torn:
        files.put_aside(fd, last.end, remains)
    if not remains.exists():
        return None
    content = remains.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return LogTorn(file=remains.name, num_bytes=len(content), digest=digest)
