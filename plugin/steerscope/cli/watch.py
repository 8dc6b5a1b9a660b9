"""``steerscope watch``: requests, scores or activations as they happen, until Ctrl-C."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from steerscope.cli.connection import connected
from steerscope.cli.output import Format, clean, tree_of, yaml_text
from steerscope.cli.report import spark
from steerscope.cli.steering import plain_request
from steerscope.errors import ConfigError

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.client import Client
    from steerscope.client.watch import Watch

WHAT = ("requests", "signals", "activations")
ROWS_SHOWN = 20
VALUES_SHOWN = 512
"""Tokens of each feature that a live view remembers."""
REFRESHES_PER_SECOND = 8

Row = tuple[str, ...]


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    options: argparse.ArgumentParser,
) -> None:
    """Add ``watch`` to the main command."""
    parser = commands.add_parser(
        "watch",
        help="what happens, live",
        description="On a terminal a view that is kept current; else, or with -o json, one JSON "
        "object a line. It goes on by itself when the hub was away for a moment.",
        parents=[options],
    )
    parser.add_argument("what", nargs="?", choices=WHAT, default="requests", help="(requests)")
    parser.add_argument("--request", metavar="ID", help="activations: all of this request's")
    parser.add_argument(
        "--feature", action="append", default=[], metavar="NAME", help="activations: of these"
    )
    parser.add_argument(
        "--signal", action="append", default=[], metavar="NAME", help="signals: these"
    )
    parser.add_argument(
        "--label", action="append", default=[], metavar="BAND", help="signals: in these bands"
    )
    parser.add_argument("--ttl", type=float, metavar="S", help="to wait for --request (60)")
    parser.add_argument("--cursor", default="", help="go on after the event that had it")
    parser.add_argument("--max-events", type=int, metavar="N", help="end after so many")
    parser.set_defaults(run=lambda arguments, _: _watch(arguments))


def _watch(arguments: argparse.Namespace) -> int:
    _check(arguments)
    with connected(arguments) as client, _opened(client, arguments) as events:
        some = itertools.islice(events, arguments.max_events)
        if arguments.output is Format.TABLE and sys.stdout.isatty():
            _show_live(some, events, arguments.what)
        else:
            _write(some, events, arguments.output)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ``ConfigError`` for an option that what is watched does not have."""
    for option, what in (
        ("request", "activations"),
        ("feature", "activations"),
        ("ttl", "activations"),
        ("signal", "signals"),
        ("label", "signals"),
    ):
        if getattr(arguments, option) and arguments.what != what:
            raise ConfigError(f"--{option}: is for watch {what}")
    if arguments.max_events is not None and arguments.max_events < 1:
        raise ConfigError("--max-events: must be above zero")


def _opened(client: Client, arguments: argparse.Namespace) -> Watch[Any]:
    if arguments.what == "requests":
        return client.watch_requests(cursor=arguments.cursor)
    if arguments.what == "signals":
        return client.watch_signals(arguments.signal, arguments.label, cursor=arguments.cursor)
    name = plain_request(arguments.request) if arguments.request else "-"
    return client.watch_activations(
        name, arguments.feature, ttl=arguments.ttl, cursor=arguments.cursor
    )


def _write(events: Iterable[Any], watch: Watch[Any], how: Format) -> None:
    """One event a line, or a document of YAML; what was missed for good is told on stderr."""
    gaps = 0
    for event in events:
        if watch.gaps > gaps:
            gaps = watch.gaps
            print("steerscope: the hub was away; events were missed", file=sys.stderr)
        tree = tree_of(event)
        text = f"---\n{yaml_text(tree)}" if how is Format.YAML else f"{json.dumps(tree)}\n"
        sys.stdout.write(text)
        sys.stdout.flush()


def _show_live(events: Iterable[Any], watch: Watch[Any], what: str) -> None:
    """A table that is kept current; plain lines where rich is not installed."""
    view: Any = _Values() if what == "activations" else _Newest(_ROWS[what])
    lock = threading.Lock()
    with _screen(what, view, watch, lock) as refresh:
        for event in events:
            with lock:
                view.take(event)
            refresh()


class _Newest:
    """The newest rows, one for each of what an event holds."""

    def __init__(self, rows: Callable[[Any], Iterator[Row]]) -> None:
        self._rows = rows
        self._kept: deque[Row] = deque(maxlen=ROWS_SHOWN)
        self.fresh: list[Row] = []

    def take(self, event: Any) -> None:
        self.fresh = list(self._rows(event))
        self._kept.extend(self.fresh)

    def table(self) -> list[Row]:
        return list(self._kept)


class _Values:
    """The newest values of each feature of each completion."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], deque[tuple[int, float]]] = {}
        self.fresh: list[Row] = []

    def take(self, event: Any) -> None:
        for track in filter(lambda track: track.activations, event.features):
            key = (clean(event.request_id), clean(track.feature))
            values = self._values.pop(key, None) or deque(maxlen=VALUES_SHOWN)
            values.extend(enumerate(track.activations, track.first_position))
            self._values[key] = values
        while len(self._values) > ROWS_SHOWN:
            del self._values[next(iter(self._values))]
        self.fresh = list(_activation_rows(event))

    def table(self) -> list[Row]:
        rows: list[Row] = []
        for (request, feature), values in self._values.items():
            first, (last, value) = values[0][0], values[-1]
            line = spark([(position - first, number) for position, number in values])
            rows.append((request, feature, f"{last}", f"{value:.3g}", line))
        return rows


@contextmanager
def _screen(
    what: str, view: Any, watch: Watch[Any], lock: threading.Lock
) -> Iterator[Callable[[], None]]:
    """What to call after each event. A thread of rich's draws, under the lock."""
    try:
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        yield lambda: print("\n".join("  ".join(row) for row in view.fresh), flush=True)
        return

    def drawn() -> Table:
        caption = f"missed {watch.missed}, gaps {watch.gaps}; Ctrl-C ends"
        table = Table(*_HEADERS[what], caption=caption, expand=True)
        with lock:
            rows = view.table()
        for row in rows:
            table.add_row(*map(Text, row))
        return table

    with Live(get_renderable=drawn, refresh_per_second=REFRESHES_PER_SECOND):
        yield lambda: None


def _request_rows(event: Any) -> Iterator[Row]:
    kind = event.WhichOneof("event") or "?"
    report = getattr(event, kind)
    for completion in report.completions:
        scores = ", ".join(f"{score.signal} {score.label}" for score in completion.signals)
        name = report.name.removeprefix("requests/")
        yield (*map(clean, (kind, name, completion.policy or "-", scores or "-")),)


def _signal_rows(event: Any) -> Iterator[Row]:
    name = event.request.removeprefix("requests/")
    for score in event.signals:
        value = f"{score.score:.3f}" if score.HasField("score") else "-"
        yield (*map(clean, (name, event.policy or "-", score.signal, value, score.label)),)


def _activation_rows(event: Any) -> Iterator[Row]:
    for track in event.features:
        last = track.first_position + len(track.activations) - 1
        value = track.activations[-1] if track.activations else 0.0
        yield clean(event.request_id), clean(track.feature), f"{last}", f"{value:.3g}"


_ROWS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "requests": _request_rows,
    "signals": _signal_rows,
    "activations": _activation_rows,
}
_HEADERS = {
    "requests": ("event", "request", "policy", "signals"),
    "signals": ("request", "policy", "signal", "score", "band"),
    "activations": ("completion", "feature", "token", "value", "so far"),
}
