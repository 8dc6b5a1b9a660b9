"""Panels about the canary: known questions that the hub asks by itself."""

from __future__ import annotations

from typing import Final

from steerscope.export import instruments as names
from steerscope.telemetry.totals import CanaryOutcome

from steerscope_dashboards import promql
from steerscope_dashboards.panels import RATE, About, Level, PanelBuilder, Query, figure, graph
from steerscope_dashboards.promql import equals
from steerscope_dashboards.settings import Settings

LONGEST_SHOWN: Final = 4
"""Times the alert's bound; a check that never passed has an age since 1970."""


def passed_share() -> PanelBuilder:
    """Of the runs in the time range, how many passed."""
    runs = promql.increase(names.CANARY_RUNS, "$__range")
    passed = promql.increase(names.CANARY_RUNS, "$__range", equals("outcome", CanaryOutcome.PASSED))
    return figure(
        "Canary passed",
        About(
            "Share of the canary's runs in the time range whose signals were what they should be, "
            "of every model. Without data no canary is configured.",
            "below all of them, open Pipeline health to see which check fails, and how.",
        ),
        "percentunit",
        passed.sum().over(runs.sum()),
        Level(1.0, "green"),
        start="orange",
    )


def longest_wait(settings: Settings) -> PanelBuilder:
    """The check that passed least recently."""
    return figure(
        "Longest since a check passed",
        About(
            "Time since the last success of the canary's check that passed least recently; four "
            "times the threshold stands for more, and for never.",
            "above the threshold the runbook of SteerscopeCanaryFailing says where to look; until "
            "then do not believe this page.",
        ),
        "s",
        promql.age(names.CANARY_LAST_SUCCESS).max().at_most(_longest(settings)),
        Level(settings.canary_seconds, "red"),
        start="green",
    )


def outcomes() -> PanelBuilder:
    """Runs by check and outcome."""
    return graph(
        "Canary runs by outcome",
        About(
            "Runs a second of each check.",
            "unexpected: a label is another one than it should be. unscored: tokens that the "
            "signal needs went unobserved. unreported: frames are late or lost. failed: the "
            "server refused or did not answer; the hub's log says what.",
        ),
        "reqps",
        Query(
            promql.rate(names.CANARY_RUNS, RATE).sum("canary", "outcome"), "{{canary}} {{outcome}}"
        ),
        stacked=True,
    )


def waits(settings: Settings) -> PanelBuilder:
    """How long each check has been without a success."""
    ago = promql.age(names.CANARY_LAST_SUCCESS).min("instance", "canary")
    return graph(
        "Since each check passed",
        About(
            "Time since its last success, by hub. The line is the alert's; four times that "
            "stands for more, and for never.",
            "a saw's teeth are the canary's interval; a line that climbs is a check that fails.",
        ),
        "s",
        Query(ago.at_most(_longest(settings)), "{{instance}} {{canary}}"),
        limit=settings.canary_seconds,
    )


def scores() -> PanelBuilder:
    """What the signals say of each check's questions."""
    newest = promql.current(names.CANARY_SCORE).max("instance", "canary", "signal")
    return graph(
        "Scores of the canary's questions",
        About(
            "Each signal's score in the check's newest run that has one, by hub.",
            "the same questions to the same model give the same scores: a step is another model, "
            "another build of it, or steering by a default or an override.",
        ),
        "percentunit",
        Query(newest, "{{instance}} {{canary}} {{signal}}"),
    )


def _longest(settings: Settings) -> float:
    return LONGEST_SHOWN * settings.canary_seconds
