"""The log's files, all in one folder.

audit.jsonl                     the newest entries; only this one is written
audit.jsonl.000000000001        rotated; the number is that of its first entry
audit.jsonl.000000000815.torn   what a crash left of entry 815
audit.jsonl.lock                locked for as long as a process has the log open
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import NamedTuple

from steerscope.hub.audit.entries import AuditError

_FOREIGN_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_DIGITS = 12
_SUFFIX = re.compile(rf"\.(\d{{{_DIGITS}}})\Z")
_BLOCK = 64 * 1024


class LastLine(NamedTuple):
    """Where a file's last whole line is, and how many bytes follow it."""

    line: bytes | None
    end: int
    num_torn: int


def numbered(path: Path, seq: int) -> Path:
    """What the file that begins with entry ``seq`` is called once rotated."""
    return path.with_name(f"{path.name}.{seq:0{_DIGITS}d}")


def torn(path: Path, seq: int) -> Path:
    """Where the remains of entry ``seq`` go."""
    return path.with_name(f"{path.name}.{seq:0{_DIGITS}d}.torn")


def first_seq(path: Path) -> int | None:
    """The number in a rotated file's name."""
    match = _SUFFIX.search(path.name)
    return int(match[1]) if match else None


def rotated(path: Path) -> list[Path]:
    """The log's rotated files, oldest first."""
    prefix = path.name + "."
    with os.scandir(path.parent) as found:
        names = [f.name for f in found if f.name.startswith(prefix) and _SUFFIX.search(f.name)]
    own = [name for name in names if len(name) == len(prefix) + _DIGITS]
    return [path.with_name(name) for name in sorted(own)]


def lock(path: Path) -> int:
    """Keep other processes out until the descriptor is closed; ``AuditError`` if one is in."""
    fd = open_private(path.with_name(path.name + ".lock"))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise AuditError(f"{path}: the log is open in another process") from None
        raise AuditError(f"{path}: {error.strerror or error}") from None
    return fd


def open_private(path: Path, extra_flags: int = 0) -> int:
    """A descriptor that appends to a file of ours, made if need be; ``AuditError`` if unsafe."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | extra_flags
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        reason = "is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise AuditError(f"{path}: {reason}") from None
    if reason := _unsafe(os.fstat(fd)):
        os.close(fd)
        raise AuditError(f"{path}: {reason}")
    return fd


def _unsafe(found: os.stat_result) -> str | None:
    if not stat.S_ISREG(found.st_mode):
        return "is not a plain file"
    if found.st_uid != os.geteuid():
        return f"belongs to user {found.st_uid}, not to us"
    if found.st_mode & _FOREIGN_WRITABLE:
        return f"others may write to it (mode {stat.S_IMODE(found.st_mode):04o}): chmod 600"
    return None


def last_line(fd: int) -> LastLine:
    """The last line that ends with a newline, without it."""
    size = os.fstat(fd).st_size
    tail, start = b"", size
    while start and tail.count(b"\n") < 2:
        start = max(start - max(_BLOCK, len(tail)), 0)
        tail = os.pread(fd, size - start, start)
    whole, newline, rest = tail.rpartition(b"\n")
    line = whole.rpartition(b"\n")[2] if newline else None
    return LastLine(line, size - len(rest), len(rest))


def first_line(fd: int) -> bytes:
    """The first line, without its newline. There must be one."""
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.readline().removesuffix(b"\n")


def put_aside(fd: int, end: int, path: Path) -> None:
    """Append all that follows ``end`` to ``path``, safely on disk, then cut it off."""
    kept = open_private(path)
    try:
        offset = end
        while block := os.pread(fd, _BLOCK, offset):
            offset += os.write(kept, block)
        os.fsync(kept)
    finally:
        os.close(kept)
    sync_folder(path)
    os.ftruncate(fd, end)
    os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Make the names in the file's folder last, where the file system can."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)
