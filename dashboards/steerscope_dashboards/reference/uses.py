"""Which dashboards, recording rules and alerts use a metric: read from what is generated."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml
from steerscope.export.instruments import INSTRUMENTS

from steerscope_dashboards import expressions

_NAME: Final = re.compile(r"[A-Za-z_:][A-Za-z0-9_:]*")
_METRICS: Final = {
    instrument.name + end: instrument.name
    for instrument in INSTRUMENTS
    for end in ("", "_bucket", "_count", "_sum")
}


class Uses(NamedTuple):
    """By name, each in the order of the files."""

    boards: tuple[str, ...]
    recordings: tuple[str, ...]
    alerts: tuple[str, ...]


def uses(generated: Path) -> Mapping[str, Uses]:
    """By metric; an expression that names a recording rule uses what that rule records."""
    recorded: dict[str, set[str]] = {}
    for rule in _rules(generated / "recording.rules.yaml"):
        recorded[rule["record"]] = _named(rule["expr"], recorded)
    alerts = [
        (rule["alert"], _named(rule["expr"], recorded))
        for rule in _rules(generated / "alerting.rules.yaml")
    ]
    boards = [
        (title, _named(text, recorded))
        for path in expressions.boards(generated)
        for title, text in _shown(path)
    ]
    found = [_by_metric(named) for named in (boards, recorded.items(), alerts)]
    return {i.name: Uses(*(tuple(by[i.name]) for by in found)) for i in INSTRUMENTS}


def _by_metric(named: Iterable[tuple[str, set[str]]]) -> Mapping[str, dict[str, None]]:
    """Who names each metric, once and in order."""
    users: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for user, metrics in named:
        for metric in metrics:
            users[metric][user] = None
    return users


def _named(text: str, recorded: Mapping[str, set[str]]) -> set[str]:
    words = set(_NAME.findall(text))
    metrics = {_METRICS[word] for word in words if word in _METRICS}
    return metrics.union(*(recorded[word] for word in words if word in recorded))


def _rules(path: Path) -> Iterator[dict[str, Any]]:
    for group in yaml.safe_load(path.read_bytes())["groups"]:
        yield from group["rules"]


def _shown(path: Path) -> Iterator[tuple[str, str]]:
    """A dashboard's title, with each of its expressions."""
    title = json.loads(path.read_text(encoding="utf-8"))["title"]
    for panel in expressions.panels(path):
        for text, _ in panel.targets:
            yield title, text
