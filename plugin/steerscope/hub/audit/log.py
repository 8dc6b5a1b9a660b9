"""The log as the hub writes it. One owner, one thread.

    log = AuditLog.open(Path("audit.jsonl"), keep=None)
    log.record(KillSwitch(mode=KillMode.STEERING_OFF), identity="alice")

Record a change before it is made: if ``record`` raises, do not make it. A line is with the
kernel when ``record`` returns, so that it outlives this process whatever ends it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from steerscope.hub.audit import entries, files
from steerscope.hub.audit.entries import AuditError, Entry
from steerscope.hub.audit.events import (
    REPORTED,
    AuditEvent,
    EntriesLost,
    LogRotated,
    LogStarted,
)
from steerscope.hub.audit.resuming import Head, resume

MIN_FILE_BYTES = 4096

_log = logging.getLogger(__name__)


class Fsync(enum.StrEnum):
    """When the disk must have it: only a power cut or a kernel crash can tell the difference."""

    EVERY = "every"
    CHANGES = "changes"
    """Each change, and so all that came before it; not each steered request."""
    NEVER = "never"


class OnError(enum.StrEnum):
    """What happens to changes that cannot be recorded."""

    REFUSE = "refuse"
    CONTINUE = "continue"


class AuditUnavailableError(AuditError):
    """An event could not be recorded; the change it tells of must not be made."""


class AuditLog:
    """Appends entries to a file; ``open`` it, or have one that is ``off``.

    Attributes:
        lost: how many events could not be written since the log was opened.
        failing: whether the last attempt to write failed.
    """

    def __init__(self) -> None:
        self.lost = 0
        self.failing = False
        self._path: Path | None = None
        self._max_bytes = 0
        self._keep: int | None = None
        self._fsync, self._on_error = Fsync.CHANGES, OnError.REFUSE
        self._key: bytes | None = None
        self._clock: Callable[[], float] = time.time
        self._unsaid, self._why = 0, ""
        self._head, self._first_seq, self._size = Head(), 1, 0
        self._fd = self._lock = -1

    @classmethod
    def off(cls) -> Self:
        """No log: takes events and keeps none."""
        return cls()

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        max_bytes: int = 64 * 1024 * 1024,
        keep: int | None = None,
        fsync: Fsync = Fsync.CHANGES,
        on_error: OnError = OnError.REFUSE,
        key_file: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Continue the log at ``path``, or begin one; ``AuditError`` says why it cannot be.

        Args:
            path: the file; its folder must exist.
            max_bytes: a file is rotated before it grows beyond that.
            keep: how many rotated files to keep; the rest are deleted. None deletes nothing.
            fsync: when to wait for the disk.
            on_error: whether ``record`` raises when it cannot write.
            key_file: adds an HMAC with the key in that file to each line.
            clock: seconds since 1970.
        """
        if max_bytes < MIN_FILE_BYTES:
            raise AuditError(f"{path}: max_bytes must be at least {MIN_FILE_BYTES}")
        if keep is not None and keep < 1:
            raise AuditError(f"{path}: keep must be at least 1, or absent to delete nothing")
        log = cls()
        log._path, log._max_bytes, log._keep = path.absolute(), max_bytes, keep
        log._fsync, log._on_error, log._clock = fsync, on_error, clock
        log._key = entries.read_key(key_file) if key_file else None
        try:
            log._start(path.absolute())
        except OSError as error:
            log.close()
            raise AuditError(f"{path}: {error.strerror or error}") from None
        except BaseException:
            log.close()
            raise
        return log

    @property
    def head(self) -> Head:
        """The newest line's number, hash and time."""
        return self._head

    @property
    def refuses(self) -> bool:
        """Whether steering must be refused for now, since it could not be recorded."""
        return self.failing and self._on_error is OnError.REFUSE

    def record(self, event: AuditEvent, identity: str = "", trace_id: str = "") -> None:
        """Append an event, in the name of who caused it (empty for the hub itself), in what trace.

        Raises:
            AuditUnavailableError: it could not be written, and ``on_error`` is ``refuse``.
        """
        if self._path is None:
            return
        try:
            self._tell_losses()
            self._append(event, identity, trace_id)
        except OSError as error:
            self._fail(error)
            self.lost += 1
            self._unsaid += 1
            if self._on_error is OnError.REFUSE:
                raise AuditUnavailableError(
                    f"audit log {self._path}: {error.strerror or error}"
                ) from None

    def recovers(self) -> bool:
        """Whether the log can be written; if it could not, try. To be called now and then."""
        if self.failing:
            try:
                self._tell_losses()
            except OSError as error:
                self._fail(error)
        return not self.failing

    def close(self) -> None:
        """Put everything on disk and let others open the log. May be called again."""
        for fd in (self._fd, self._lock):
            if fd >= 0:
                with contextlib.suppress(OSError):
                    os.fsync(fd)
                os.close(fd)
        self._fd = self._lock = -1

    def _start(self, path: Path) -> None:
        self._lock = files.lock(path)
        at = resume(path, self._key)
        self._fd, self._size, self._first_seq, self._head = at.fd, at.size, at.first_seq, at.head
        if at.torn is not None:
            _log.warning("%s: the last line was cut off; it is in %s", path, at.torn.file)
            self._append(at.torn)
        self._append(LogStarted(pid=os.getpid()))

    def _append(self, event: AuditEvent, identity: str = "", trace_id: str = "") -> None:
        if self.failing:
            self._cut_back()
        line, head = self._next(event, identity, trace_id)
        if self._size and self._size + len(line) + 1 > self._max_bytes:
            self._rotate()
            line, head = self._next(event, identity, trace_id)
        self._write(line, isinstance(event, REPORTED))
        self._head = head

    def _next(self, event: AuditEvent, identity: str, trace_id: str) -> tuple[bytes, Head]:
        seq, previous, before = self._head
        now = entries.moment(self._clock())
        entry = Entry(
            seq=seq + 1,
            time=now,
            behind_us=entries.behind_us(now, before),
            identity=identity,
            trace_id=trace_id,
            event=event,
            previous=previous,
        )
        line = entries.encode(entry, self._key)
        return line, Head(seq + 1, entries.digest(line), now)

    def _write(self, line: bytes, is_report: bool) -> None:
        """Write a line whole, or raise."""
        written = os.write(self._fd, line + b"\n")
        if written <= len(line):
            raise OSError(f"only {written} of {len(line) + 1} bytes could be written")
        if self._fsync is Fsync.EVERY or (self._fsync is Fsync.CHANGES and not is_report):
            os.fdatasync(self._fd)
        self._size += len(line) + 1

    def _rotate(self) -> None:
        """Give the file its number and begin another; the chain goes on in its first line."""
        assert self._path is not None
        os.fsync(self._fd)
        old = files.numbered(self._path, self._first_seq)
        fresh = _replaced(self._path, old)
        os.close(self._fd)
        self._fd, self._size, self._first_seq = fresh, 0, self._head.seq + 1
        rotated = files.rotated(self._path)
        surplus = rotated[: -self._keep] if self._keep else []
        kept_from = files.first_seq(rotated[len(surplus)]) if surplus else None
        self._append(LogRotated(file=old.name, kept_from=kept_from))
        files.sync_folder(self._path)  # only now: readers wait for the first line
        _delete(surplus)

    def _tell_losses(self) -> None:
        if self._unsaid:
            self._append(EntriesLost(num_entries=self._unsaid, reason=self._why))
            self._unsaid = 0
        if self.failing:
            self.failing = False
            _log.warning("audit log %s: can be written again", self._path)

    def _fail(self, error: OSError) -> None:
        self._why = error.strerror or str(error)
        if not self.failing:
            _log.error("audit log %s: %s", self._path, self._why)
        self.failing = True
        with contextlib.suppress(OSError):
            self._cut_back()

    def _cut_back(self) -> None:
        """Back to whole lines that count: what was not acknowledged must not stand."""
        if os.fstat(self._fd).st_size > self._size:
            os.ftruncate(self._fd, self._size)


def _replaced(path: Path, old: Path) -> int:
    """Call the file ``old`` from now on, and open a new one in its place."""
    if os.path.lexists(old):
        raise OSError(f"cannot be rotated: {old.name} exists")
    os.rename(path, old)
    try:
        return files.open_private(path, os.O_EXCL)
    except AuditError as error:
        os.rename(old, path)
        raise OSError(f"cannot be rotated: {error}") from None


def _delete(surplus: list[Path]) -> None:
    for path in surplus:
        try:
            path.unlink()
        except OSError as error:  # it is surplus at the next rotation, too
            _log.warning("audit log %s: cannot be deleted: %s", path, error)
