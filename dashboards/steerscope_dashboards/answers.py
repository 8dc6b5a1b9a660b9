"""Does a Prometheus answer what is shipped? It must scrape a server that has had traffic."""

from __future__ import annotations

import json
import math
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from steerscope_dashboards import expressions, settings
from steerscope_dashboards.expressions import Expression, Role

HOME: Final = Path(__file__).resolve().parents[1]
TIME_RANGE: Final = "5m"
"""What ``$__range`` stands for."""
SCRAPES_PER_RATE: Final = 4
"""``$__rate_interval`` spans so many scrapes, as in Grafana."""
_LABEL_VALUES: Final = re.compile(r"^label_values\((.+), (\w+)\)$")
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class AnswerError(Exception):
    """Prometheus refused a query, or could not be reached."""


class Series(NamedTuple):
    """One series of an answer: (time, value) pairs."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]


class Prometheus:
    """The HTTP API of one Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def get(self, path: str, **parameters: str) -> Any:
        """An answer's ``data``; raise ``AnswerError`` with what Prometheus says."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as reply:
                return json.load(reply)["data"]
        except urllib.error.HTTPError as error:
            raise AnswerError(error.read().decode(errors="replace")) from None
        except OSError as error:
            raise AnswerError(f"{self.url}: {error}") from None

    def now(self, text: str) -> list[Series]:
        """An instant query; a heat map's or graph's newest values."""
        data = self.get("query", query=text)
        return [
            Series(series["metric"], [(float(series["value"][0]), float(series["value"][1]))])
            for series in data["result"]
        ]

    def over(self, text: str, start: float, end: float, step: float) -> list[Series]:
        """A range query."""
        data = self.get("query_range", query=text, start=str(start), end=str(end), step=f"{step:g}")
        return [
            Series(series["metric"], [(float(at), float(value)) for at, value in series["values"]])
            for series in data["result"]
        ]

    def label_values(self, selector: str, label: str) -> list[str]:
        """What a dashboard's variable offers."""
        values: list[str] = self.get(f"label/{label}/values", **{"match[]": selector})
        return values

    def rate_interval(self) -> str:
        """What ``$__rate_interval`` stands for, given how often targets are scraped."""
        targets = self.get("targets", state="active")["activeTargets"]
        longest = max((_seconds(target["scrapeInterval"]) for target in targets), default=15.0)
        return f"{math.ceil(SCRAPES_PER_RATE * longest)}s"

    def unhealthy_rules(self) -> list[str]:
        """Rules that could not be evaluated, with the reason."""
        return [
            f"{rule['name']}: {rule.get('lastError', '')}"
            for group in self.get("rules")["groups"]
            for rule in group["rules"]
            if rule["health"] != "ok"
        ]


def unanswered(prometheus_url: str) -> list[Expression]:
    """Every shipped expression that has no data there.

    A panel, a variable, a recording rule or an alert's condition must give a finite number. A
    whole alert must only be understood; it is empty when all is well.
    """
    prometheus = Prometheus(prometheus_url)
    window = prometheus.rate_interval()
    shipped = expressions.expressions(settings.load(HOME / "settings.yaml"), HOME / "generated")
    return [one for one in shipped if not _is_answered(prometheus, one, window)]


def _is_answered(prometheus: Prometheus, expression: Expression, window: str) -> bool:
    text = expression.filled(window, TIME_RANGE)
    if expression.role is Role.VARIABLE:
        asked = _LABEL_VALUES.match(text)
        return asked is not None and bool(prometheus.label_values(asked[1], asked[2]))
    series = prometheus.now(text)
    if expression.role is Role.ALERT:
        return True
    return any(math.isfinite(value) for one in series for _, value in one.points)


def _seconds(duration: str) -> float:
    found = re.findall(r"(\d+)(ms|s|m|h)", duration)
    return sum(float(count) * _UNITS[unit] for count, unit in found)
