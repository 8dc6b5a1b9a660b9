"""The overview: is the model making things up, and can the answer be trusted."""

from __future__ import annotations

from typing import Final

from grafana_foundation_sdk.models.dashboard import Dashboard
from steerscope.export import instruments as names
from steerscope.steering.interventions import Phase
from steerscope.telemetry.totals import Outcome

from steerscope_dashboards import canary, promql, recording
from steerscope_dashboards.pages import Board
from steerscope_dashboards.panels import (
    ENGINE,
    MODEL,
    RATE,
    SIGNAL,
    About,
    Level,
    PanelBuilder,
    Query,
    Section,
    board,
    figure,
    graph,
    heat,
    variable,
)
from steerscope_dashboards.promql import equals, none_of, number
from steerscope_dashboards.settings import Settings

RANGE: Final = "$__range"


def overview(settings: Settings) -> Dashboard:
    """Signals, the objective, coverage and steering at a glance."""
    return board(
        Board.OVERVIEW,
        "Steerscope / Overview",
        "What the model believes while it serves: signals made of its features, whether the "
        "quality objective holds, and how much of the traffic that is known for.",
        (
            variable("model", "model_name", names.OBSERVED_TOKENS),
            variable("engine", "engine", names.OBSERVED_TOKENS, MODEL),
            variable("signal", "signal", names.SIGNAL_REQUESTS, MODEL),
        ),
        (
            Section("At a glance", _glance(settings)),
            Section("Signals", _signals()),
            Section("The quality objective", _objective(settings)),
            Section("Drift and canary", _drift_and_canary(settings)),
            Section("Requests", _requests()),
        ),
    )


def _glance(settings: Settings) -> tuple[PanelBuilder, ...]:
    target = equals("signal", settings.objective.signal)
    high = promql.increase(
        names.SIGNAL_REQUESTS, RANGE, *ENGINE, target, equals("label", settings.high_label)
    )
    scored = promql.increase(names.SIGNAL_REQUESTS, RANGE, *ENGINE, target, recording.SCORED)
    seen = promql.increase(names.OBSERVED_TOKENS, RANGE, *ENGINE).sum()
    missing = promql.increase(names.UNOBSERVED_TOKENS, RANGE, *ENGINE).sum()
    applied = equals("outcome", Outcome.APPLIED)
    steered = promql.increase(names.STEERING_REQUESTS, RANGE, *ENGINE, applied)
    # Every finished sequence has one label of each signal.
    finished = promql.increase(names.SIGNAL_REQUESTS, RANGE, *ENGINE, target)
    return (
        figure(
            f"{settings.objective.signal}: {settings.high_label}",
            About(
                "Share of the scored sequences in the time range whose label is the worst one.",
                "above the threshold, look at the labels below for when it began, and at the "
                "feature drill-down for which feature moved.",
            ),
            "percentunit",
            high.sum().over(scored.sum()),
            Level(settings.high_share, "red"),
            start="green",
        ),
        figure(
            "Coverage",
            About(
                "Share of all tokens in the time range that were observed.",
                "below the threshold, trust the signals less and open Pipeline health.",
            ),
            "percentunit",
            seen.over(seen.plus(missing)),
            Level(settings.coverage, "green"),
            start="orange",
        ),
        figure(
            "Steered sequences",
            About(
                "Share of the sequences in the time range that an engine began with steering.",
                "if you expect none, open Steering and policy to see which policy it is.",
            ),
            "percentunit",
            steered.sum().over(finished.sum()),
        ),
        figure(
            "Finished sequences",
            About(
                "How many sequences finished in the time range.",
                "with fewer than a few dozen, every share on this page is mostly chance.",
            ),
            "short",
            finished.sum(),
        ),
    )


def _signals() -> tuple[PanelBuilder, ...]:
    buckets = promql.buckets(names.SIGNAL_SCORE, RATE, *SIGNAL)
    return (
        graph(
            "Scored sequences by label",
            About(
                "Finished sequences a second, by signal and by the catalog's label; those without "
                "a score are under Requests.",
                "a band that grows while the total does not is a change of the traffic or of the "
                "model; compare with deployments.",
            ),
            "reqps",
            Query(
                promql.rate(names.SIGNAL_REQUESTS, RATE, *SIGNAL, recording.SCORED).sum(
                    "signal", "label"
                ),
                "{{signal}} {{label}}",
            ),
            stacked=True,
        ),
        graph(
            "Scores: median and 90th percentile",
            About(
                "Quantiles of each signal's score, interpolated within a bucket.",
                "watch for a step at a deployment; a slow drift belongs to the objective below.",
            ),
            "percentunit",
            Query(promql.quantile(0.5, buckets, "signal"), "{{signal}} p50"),
            Query(promql.quantile(0.9, buckets, "signal"), "{{signal}} p90"),
        ),
        heat(
            "Scores of the chosen signals",
            About(
                "How many sequences a second fell into each bucket of the score.",
                "two clouds mean two kinds of traffic; choose one signal above to tell whose.",
            ),
            "percentunit",
            buckets,
            span=24,
        ),
    )


def _objective(settings: Settings) -> tuple[PanelBuilder, ...]:
    objective = settings.objective
    burning = [
        Query(
            recording.excess(settings, window).now(MODEL).divided(objective.budget),
            f"{{{{model_name}}}} {window}",
        )
        for window in ("5m", "1h", "6h", "3d")
    ]
    return (
        graph(
            f"Sequences with {objective.signal} above {number(objective.score)}",
            About(
                "Share of scored sequences above the declared score, over five minutes and an "
                "hour. The line is what the objective allows.",
                "if it stays above the line, the runbook of SteerscopeHallucinationRiskRising says "
                "how to tell a bad model from unusual questions.",
            ),
            "percentunit",
            *(
                Query(recording.excess(settings, w).now(MODEL), f"{{{{model_name}}}} {w}")
                for w in ("5m", "1h")
            ),
            limit=objective.budget,
        ),
        graph(
            "Burn rate of the objective's budget",
            About(
                "How many times faster than sustainable the budget of 30 days is being used, over "
                "several windows: 1 uses it up exactly.",
                "above 14.4 over an hour or 6 over six hours somebody is paged; a long spell just "
                "above 1 means that the objective or the model is wrong.",
            ),
            "none",
            *burning,
            limit=1.0,
        ),
    )


def _drift_and_canary(settings: Settings) -> tuple[PanelBuilder, ...]:
    by = ("model_name", "feature", "phase")
    index = recording.drift(settings, *ENGINE).max(*by)
    return (
        figure(
            "Features that drifted",
            About(
                "How many features' activations, in prompts or in generation, are further from "
                "the catalog's baseline than the threshold, in the newest window.",
                "beside this are the worst of them; the drill-down of one shows since when.",
            ),
            "short",
            index.above(settings.drift_psi).sum(),
            Level(1.0, "orange"),
            start="green",
        ),
        figure(
            "Largest drift",
            About(
                "The largest population stability index of a feature that has tokens enough.",
                "0.1 is worth a look at the drill-down, 0.25 is a large shift.",
            ),
            "none",
            index.max(),
            Level(settings.drift_psi, "orange"),
            start="green",
        ),
        canary.passed_share(),
        canary.longest_wait(settings),
        graph(
            "The five features furthest from their baselines",
            About(
                "Population stability index by feature and phase, of the chosen engine that is "
                "furthest off. The line is the alert's.",
                "all of them at once are another model or language, one is a new kind of question.",
            ),
            "none",
            Query(index.largest(5), "{{feature}} {{phase}}"),
            limit=settings.drift_psi,
        ),
        canary.outcomes(),
    )


def _requests() -> tuple[PanelBuilder, ...]:
    unscored = promql.rate(
        names.SIGNAL_REQUESTS,
        RATE,
        *SIGNAL,
        promql.Matcher("label", "=~", recording.SCORED.value),
    )
    generated = none_of("phase", Phase.PROMPT)
    return (
        graph(
            "Sequences without a score",
            About(
                "'unobserved': tokens that the signal needs are missing. 'not_applicable': the "
                "prompt has nothing that the signal is about.",
                "unobserved ones are a fault of the pipeline; not_applicable ones are not, but a "
                "signal that hardly ever applies says little.",
            ),
            "reqps",
            Query(unscored.sum("signal", "label"), "{{signal}} {{label}}"),
            stacked=True,
        ),
        graph(
            "Observed tokens",
            About(
                "Tokens a second that were observed, and of them those generated.",
                "if it falls while vLLM's own throughput does not, open Pipeline health.",
            ),
            "short",
            Query(promql.rate(names.OBSERVED_TOKENS, RATE, *ENGINE).sum("model_name"), "all"),
            Query(
                promql.rate(names.OBSERVED_TOKENS, RATE, *ENGINE, generated).sum("model_name"),
                "generated",
            ),
        ),
    )
