"""The log as others read it, also while the hub writes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from steerscope.hub.audit import files
from steerscope.hub.audit.entries import AuditError

MAX_LINE_BYTES = 1024 * 1024
"""Far beyond any entry; a longer line is read in parts, none of which is an entry."""

_ATTEMPTS = 50
_WAITS = 10
_WRITING_SECONDS = 0.05
"""A file without a line, or a line without an end, may be just in the making."""


class Line(NamedTuple):
    """A line as it is in a file, numbered from 1; ``raw`` has its newline, if there is one."""

    path: Path
    number: int
    raw: bytes


def is_whole_log(paths: Sequence[Path]) -> bool:
    """Whether the files' beginning must be the log's: not so if only rotated ones are named."""
    return any(files.first_seq(path) is None for path in paths)


@contextlib.contextmanager
def lines(paths: Sequence[Path]) -> Iterator[Iterator[Line]]:
    """The lines of the files, oldest file first; a log's rotated files come with it."""
    with contextlib.ExitStack() as stack:
        opened = _snapshot(stack, paths)
        yield (
            Line(path, number, raw)
            for path, file in opened
            for number, raw in enumerate(_lines(file), 1)
        )


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """The file's lines; of an empty file one that is empty."""
    raw = _line(file)
    for _ in range(_WAITS):
        if not raw:
            time.sleep(_WRITING_SECONDS)
            raw = _line(file)
    yield raw
    while raw := _line(file):
        yield raw


def _line(file: BinaryIO) -> bytes:
    raw = file.readline(MAX_LINE_BYTES)
    if raw and not raw.endswith(b"\n"):
        time.sleep(_WRITING_SECONDS)
        raw += file.readline(MAX_LINE_BYTES)
    return raw


def _snapshot(stack: contextlib.ExitStack, paths: Sequence[Path]) -> list[tuple[Path, BinaryIO]]:
    """Open all files as they are at one time: again if the log was rotated meanwhile."""
    for _ in range(_ATTEMPTS):
        attempt = contextlib.ExitStack()
        try:
            found = _found(paths)
            opened: list[tuple[Path, BinaryIO]] = [
                (path, attempt.enter_context(path.open("rb"))) for path in found
            ]
        except FileNotFoundError:
            attempt.close()
            continue
        except OSError as error:
            attempt.close()
            raise AuditError(f"{error.filename}: {error.strerror}") from None
        if _found(paths) == found:
            stack.enter_context(attempt)
            return opened
        attempt.close()
    raise AuditError(f"{paths[0]}: its files keep changing")


def _found(paths: Sequence[Path]) -> list[Path]:
    """Every file once: rotated ones by their number, then those without one, as given."""
    found: dict[Path, None] = {}
    for path in paths:
        siblings = _siblings(path) if files.first_seq(path) is None else []
        if not siblings and not path.exists():
            raise AuditError(f"{path}: no such file")
        for each in (*siblings, *([path] if path.exists() else [])):
            found[each.absolute()] = None
    return sorted(found, key=lambda path: files.first_seq(path) or 10**12)


def _siblings(path: Path) -> list[Path]:
    try:
        return files.rotated(path.absolute())
    except OSError as error:
        raise AuditError(f"{path}: {error.strerror}") from None
