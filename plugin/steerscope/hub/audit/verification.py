"""Whether a log is as it was written. What a chain proves, and what not: docs/audit.md."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from steerscope.hub.audit import entries, files, reading
from steerscope.hub.audit.entries import GENESIS, Entry
from steerscope.hub.audit.events import LogRotated
from steerscope.hub.audit.reading import Line


class Damage(enum.StrEnum):
    """What differs from what was written."""

    EDITED = "edited"
    REMOVED = "removed"
    REORDERED = "reordered"
    TRUNCATED = "truncated"
    MISSING_FILE = "missing file"
    BAD_MAC = "bad mac"


class Problem(NamedTuple):
    """One difference; ``line`` counts from 1, 0 means the file as a whole."""

    damage: Damage
    path: Path
    line: int
    detail: str


@dataclass(slots=True)
class Findings:
    """What was found. ``anchor_seq`` is the entry that the anchor is the hash of."""

    num_entries: int = 0
    first_seq: int = 0
    head: str = GENESIS
    head_seq: int = 0
    has_macs: bool = False
    anchor_seq: int | None = None
    problems: list[Problem] = field(default_factory=list)


def verify(
    paths: Sequence[Path], *, key: bytes | None = None, anchor: str | None = None
) -> Findings:
    """Walk the chain to its end; never stops at a problem. ``AuditError`` if it cannot be read.

    Args:
        paths: the log, whose rotated files come with it, or only rotated files.
        key: to check each line's HMAC; None checks none.
        anchor: a hash noted earlier, which must be that of one of the lines.
    """
    walk = _Walk(key, anchor)
    with reading.lines(paths) as lines:
        for line in lines:
            walk.take(line)
    return walk.end(reading.is_whole_log(paths))


class _Walk:
    """``_due`` is the number that the next entry must have, ``_at`` the line before it."""

    def __init__(self, key: bytes | None, anchor: str | None) -> None:
        self.found = Findings()
        self._key, self._anchor = key, anchor
        self._at: Line | None = None
        self._hash, self._due, self._time = GENESIS, 1, ""
        self._first: tuple[Line, Entry] | None = None
        self._kept_from = 1

    def take(self, line: Line) -> None:
        """Check a line against the one before it."""
        if not line.raw:
            whole = line._replace(number=0)
            self._blame(Damage.TRUNCATED, whole, "is empty, which no file is for long")
            return
        body = line.raw.removesuffix(b"\n")
        if body == line.raw:
            self._blame(Damage.TRUNCATED, line, "the line has no end")
        try:
            entry = entries.decode(body)
        except ValueError as error:
            self._blame(Damage.EDITED, line, f"is no entry: {error}")
            seq = self._due
        else:
            seq = self._check(line, entry, body)
            self._note(entry, seq)
        self._at, self._hash, self._due = line, entries.digest(body), seq + 1
        self.found.num_entries += 1
        if self._hash == self._anchor:
            self.found.anchor_seq = seq

    def end(self, from_start: bool) -> Findings:
        """What only the whole log shows."""
        found = self.found
        found.head, found.head_seq = self._hash, self._due - 1
        if from_start:
            self._check_start()
        if self._anchor is not None and found.anchor_seq is None and self._at is not None:
            detail = "no line has the anchor's hash: lines were cut off, or the log was rewritten"
            self._blame(Damage.TRUNCATED, self._at._replace(number=0), detail)
        return found

    def _check(self, line: Line, entry: Entry, body: bytes) -> int:
        """The number that the line counts as."""
        if self._key is not None and not entries.has_true_mac(body, self._key):
            self._blame(Damage.BAD_MAC, line, "was not written with this key")
        if self._at is None:
            self._first = (line, entry)
            self.found.first_seq = entry.seq
        elif entry.previous != self._hash:
            self._unlinked(self._at, line, entry)
        elif entry.seq != self._due:
            self._blame(Damage.EDITED, line, f"has number {entry.seq}, {self._due} is due")
            return self._due
        elif entries.behind_us(entry.time, self._time) != entry.behind_us:
            self._blame(Damage.EDITED, line, f"its time {entry.time} does not fit the one before")
        return entry.seq

    def _unlinked(self, before: Line, line: Line, entry: Entry) -> None:
        if entry.seq == self._due:
            detail = f"its SHA-256 is {self._hash}, the next line says {entry.previous}"
            self._blame(Damage.EDITED, before, detail)
        elif entry.seq < self._due:
            detail = f"number {entry.seq} comes after {self._due - 1}: moved here, or put in"
            self._blame(Damage.REORDERED, line, detail)
        elif line.path == before.path or files.first_seq(line.path) == self._due:
            self._blame(Damage.REMOVED, line, f"{self._gap(entry)} missing before it")
        else:
            self._gap_between(before, line, entry)

    def _gap_between(self, before: Line, line: Line, entry: Entry) -> None:
        event = entry.event
        if isinstance(event, LogRotated) and event.file == before.path.name:
            detail = f"{self._gap(entry)} cut off at its end"
            self._blame(Damage.TRUNCATED, before, detail)
        elif isinstance(event, LogRotated):
            detail = f"{event.file}, which comes before it, is missing: {self._gap(entry)}"
            self._blame(Damage.MISSING_FILE, line._replace(number=0), f"{detail} not here")
        else:
            detail = f"{self._gap(entry)} missing: a file before it, or its first lines"
            self._blame(Damage.MISSING_FILE, line._replace(number=0), detail)

    def _gap(self, entry: Entry) -> str:
        last = entry.seq - 1
        return f"{self._due} is" if last == self._due else f"{self._due} to {last} are"

    def _check_start(self) -> None:
        if self._first is None:
            return
        line, entry = self._first
        if entry.seq > self._kept_from:
            detail = f"begins with entry {entry.seq}, and nothing says that older ones were deleted"
            self._blame(Damage.REMOVED, line, detail)
        elif entry.seq == 1 and entry.previous != GENESIS:
            self._blame(Damage.EDITED, line, "is the first entry, and yet says it follows another")

    def _note(self, entry: Entry, seq: int) -> None:
        self._time = entry.time
        self.found.has_macs |= entry.mac is not None
        if isinstance(entry.event, LogRotated) and entry.event.kept_from is not None:
            self._kept_from = max(self._kept_from, min(entry.event.kept_from, seq))

    def _blame(self, damage: Damage, line: Line, detail: str) -> None:
        self.found.problems.append(Problem(damage, line.path, line.number, detail))
