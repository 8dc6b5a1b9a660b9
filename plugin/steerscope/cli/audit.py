"""``steerscope audit``: whether a log is as it was written, and what it says."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.hub.audit.entries import Entry
    from steerscope.hub.audit.verification import Findings

BROKEN = 1
"""``verify`` ends with this if the log is not as it was written, with 2 if it cannot be read."""

MAX_SHOWN = 50

Row = tuple[bytes, "Entry"]


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``audit`` and its parts to the main command."""
    parser = commands.add_parser("audit", help=__doc__.split(": ", 1)[1].rstrip("."))
    parts = parser.add_subparsers(required=True, metavar="PART")
    _add_verify(parts.add_parser("verify", help="0 intact, 1 broken and where, 2 not readable"))
    _add_show(parts.add_parser("show", help="the entries, all or some"))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="the log's file")
    parser.add_argument(
        "--anchor", type=_sha256, metavar="HASH", help="a line's hash, noted elsewhere before"
    )
    parser.add_argument(
        "--print-anchor", action="store_true", help="if intact, print the newest line's hash only"
    )
    parser.add_argument("--key-file", type=Path, help="also check every line's HMAC")
    parser.set_defaults(run=lambda arguments, _: _verify(arguments))


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="the log's file")
    parser.add_argument("--identity", help="entries in the name of")
    parser.add_argument("--policy", help="entries about a policy")
    parser.add_argument("--request", help="entries about a request, by the client's id")
    parser.add_argument("--since", type=_time, metavar="TIME", help="RFC 3339; UTC if not said")
    parser.add_argument("--until", type=_time, metavar="TIME", help="up to this, itself left out")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.set_defaults(run=lambda arguments, _: _show(arguments))


def _verify(arguments: argparse.Namespace) -> int:
    from steerscope.hub.audit import entries, verification

    key = entries.read_key(arguments.key_file) if arguments.key_file else None
    found = verification.verify(arguments.paths, key=key, anchor=arguments.anchor)
    if found.problems:
        _print_problems(found)
        return BROKEN
    if arguments.print_anchor:
        print(found.head)
        return 0
    print(f"intact: entries {found.first_seq} to {found.head_seq}; the newest one's hash is")
    print(found.head)
    for note in _notes(found, arguments.anchor, key is not None):
        print(note)
    return 0


def _print_problems(found: Findings) -> None:
    for problem in found.problems[:MAX_SHOWN]:
        place = f"{problem.path}:{problem.line}" if problem.line else f"{problem.path}"
        print(f"{place}: {problem.damage}: {problem.detail}")
    if (more := len(found.problems) - MAX_SHOWN) > 0:
        print(f"and {more} more")
    print(f"broken: {found.num_entries} lines, {len(found.problems)} problems")


def _notes(found: Findings, anchor: str | None, has_key: bool) -> Iterator[str]:
    if anchor is None:
        yield "without --anchor, entries cut off at the end are not noticed"
    elif found.anchor_seq is not None:
        yield f"the anchor is entry {found.anchor_seq}, {found.head_seq - found.anchor_seq} follow"
    if found.first_seq > 1:
        yield f"entries before {found.first_seq} are not here"
    if found.has_macs and not has_key:
        yield "the lines' HMACs were not checked: no --key-file"


def _show(arguments: argparse.Namespace) -> int:
    from steerscope.hub.audit import reading

    unreadable = [0]
    with reading.lines([arguments.path]) as lines:
        rows = (row for row in _rows(lines, unreadable) if _is_wanted(row[1], arguments))
        if arguments.output == "json":
            for raw, _ in rows:
                sys.stdout.write(raw.decode(errors="replace") + "\n")
        else:
            _print_table([_cells(entry) for _, entry in rows])
    if unreadable[0]:
        print(f"{unreadable[0]} lines are no entries: see steerscope audit verify", file=sys.stderr)
    return BROKEN if unreadable[0] else 0


def _rows(lines: Iterator[Any], unreadable: list[int]) -> Iterator[Row]:
    from steerscope.hub.audit import entries

    for line in lines:
        raw = line.raw.removesuffix(b"\n")
        try:
            yield raw, entries.decode(raw)
        except ValueError:
            unreadable[0] += 1


def _is_wanted(entry: Entry, asked: argparse.Namespace) -> bool:
    from steerscope.hub.audit.fields import clean_id

    wanted = (
        (asked.identity, entry.identity),
        (asked.policy, getattr(entry.event, "policy", None)),
        (asked.request, getattr(entry.event, "external_id", None)),
    )
    if any(told is not None and clean_id(told) != found for told, found in wanted):
        return False
    time = datetime.fromisoformat(entry.time)
    return not (asked.since and time < asked.since) and not (asked.until and time >= asked.until)


def _cells(entry: Entry) -> tuple[str, ...]:
    import msgspec

    event: dict[str, Any] = msgspec.to_builtins(entry.event)
    kind = event.pop("type")
    details = " ".join(f"{name}={_short(value)}" for name, value in event.items())
    return str(entry.seq), entry.time, entry.identity or "-", kind, details


def _short(value: object) -> str:
    """A value in few characters: digests by their beginning, edits one by one."""
    if isinstance(value, (list, tuple)):
        return ",".join(_edit(each) if isinstance(each, dict) else str(each) for each in value)
    text = str(value)
    is_digest = len(text) == 64 and not text.strip("0123456789abcdef")
    return text[:12] if is_digest else text or "-"


def _edit(edit: dict[str, Any]) -> str:
    rest = {name: value for name, value in edit.items() if name not in ("feature", "op", "value")}
    told = f"{edit['feature']}:{edit['op']}:{edit.get('value', 0.0):g}"
    return told + "".join(f":{name}={value}" for name, value in rest.items())


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    table = [("SEQ", "TIME", "IDENTITY", "EVENT", "DETAILS"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _time(text: str) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no RFC 3339 time") from None
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _sha256(text: str) -> str:
    if len(text) != 64 or text.strip("0123456789abcdef"):
        raise argparse.ArgumentTypeError("expected 64 hexadecimal digits in lower case")
    return text
