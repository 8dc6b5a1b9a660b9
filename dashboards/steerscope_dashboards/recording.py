"""Recording rules: what dashboards and alerts ask again and again, and over long windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from steerscope.export import instruments as names
from steerscope.telemetry.reductions import Missing

from steerscope_dashboards import promql
from steerscope_dashboards.promql import Matcher, Vector, equals, none_of
from steerscope_dashboards.settings import Settings


class Burn(NamedTuple):
    """One pair of windows over which the objective's budget may burn too fast.

    ``factor`` is in budgets of 30 days; the windows and factors are those of the SRE workbook
    (chapter 5): 2% of the budget in an hour, 5% in six, 10% in a day and in three.
    """

    short: str
    long: str
    factor: float
    severity: str


BURNS: Final = (
    Burn("5m", "1h", 14.4, "critical"),
    Burn("30m", "6h", 6.0, "critical"),
    Burn("2h", "1d", 3.0, "warning"),
    Burn("6h", "3d", 1.0, "warning"),
)
WINDOWS: Final = ("5m", "30m", "1h", "2h", "6h", "1d", "3d")

SCORED: Final = none_of("label", *Missing)
"""Finished sequences that have a score."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A series that Prometheus computes; named ``level:metric:operation``."""

    name: str
    vector: Vector

    def now(self, *matchers: Matcher) -> Vector:
        """The recorded series."""
        selector = ", ".join(map(str, matchers))
        return Vector(self.name + (f"{{{selector}}}" if selector else ""), self.vector.labels)


def excess(settings: Settings, window: str) -> Recording:
    """Of the sequences scored in the window, the share above the objective's score."""
    objective = settings.objective
    vector = promql.above(
        names.SIGNAL_SCORE,
        objective.score,
        window,
        equals("signal", objective.signal),
        by=("model_name",),
    )
    return Recording(f"model_name:steerscope_risk_excess:ratio_rate{window}", vector)


def requests_by_label() -> Recording:
    """Finished sequences a second, by signal and label."""
    vector = promql.rate(names.SIGNAL_REQUESTS, "5m").sum("model_name", "signal", "label")
    return Recording("model_name_signal_label:steerscope_signal_requests:rate5m", vector)


def coverage() -> Recording:
    """Of all tokens of the last five minutes, the share that was observed."""
    by = ("model_name", "engine")
    seen = promql.rate(names.OBSERVED_TOKENS, "5m").sum(*by)
    missing = promql.rate(names.UNOBSERVED_TOKENS, "5m").sum(*by)
    return Recording(
        "model_name_engine:steerscope_coverage:ratio_rate5m", seen.over(seen.plus(missing))
    )


def drift(settings: Settings, *matchers: Matcher) -> Vector:
    """Each feature's population stability index, where there are tokens enough to judge it."""
    tokens = promql.current(names.FEATURE_DRIFT_TOKENS, *matchers)
    index = promql.current(names.FEATURE_DRIFT_PSI, *matchers)
    return index.given(tokens, settings.floors.drift_tokens)


def recordings(settings: Settings) -> tuple[Recording, ...]:
    """All of them."""
    return (
        requests_by_label(),
        coverage(),
        *(excess(settings, window) for window in WINDOWS),
    )
