"""Steering and policy: who asks for what, what was applied, and how hard."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard
from steerscope.export import instruments as names
from steerscope.telemetry.totals import Outcome

from steerscope_dashboards import promql
from steerscope_dashboards.pages import Board
from steerscope_dashboards.panels import (
    ENGINE,
    MODEL,
    RATE,
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
from steerscope_dashboards.promql import Matcher, Vector, equals, none_of
from steerscope_dashboards.settings import Settings

STRONG_DOSE = 1.0
"""A change as large as what it is added to. The embedded model bears more; others may not."""
ASKED = Matcher("outcome", "=~", f"{Outcome.ADMITTED}|{Outcome.REJECTED}")
FRONT_END = none_of("outcome", Outcome.APPLIED)


def steering(settings: Settings) -> Dashboard:
    """What was asked for, what was done."""
    return board(
        Board.STEERING,
        "Steerscope / Steering and policy",
        "Requests that asked for steering, policies that steered traffic, and how large the "
        "changes were. Who asked is in the audit log, never in a metric.",
        (
            variable("model", "model_name", names.OBSERVED_TOKENS),
            variable("engine", "engine", names.OBSERVED_TOKENS, MODEL),
        ),
        (
            Section("At a glance", _glance(settings)),
            Section("Asked and applied", _asked()),
            Section("What was changed", _changed()),
            Section("Dose", _dose()),
        ),
    )


def _glance(settings: Settings) -> tuple[PanelBuilder, ...]:
    window = "$__range"
    rejected = promql.increase(
        names.STEERING_REQUESTS, window, equals("outcome", Outcome.REJECTED)
    ).sum()
    asked = promql.increase(names.STEERING_REQUESTS, window, ASKED).sum()
    applied = equals("outcome", Outcome.APPLIED)
    unexpected = [applied]
    if settings.expected_policies:
        unexpected.append(none_of("policy", *settings.expected_policies))
    return (
        figure(
            "Requests that asked",
            About(
                "Requests in the time range that asked for steering, at every front end.",
                "none where you expect some: clients lost the flag, or talk to another server.",
            ),
            "short",
            asked,
        ),
        figure(
            "Refused",
            About(
                "Share of them that got an error naming the field.",
                "above the threshold, see below for which policy; the front end's log has the "
                "field, the audit log the request.",
            ),
            "percentunit",
            rejected.over(asked),
            Level(settings.rejected_share, "orange"),
            start="green",
        ),
        figure(
            "Steered by undeclared policies",
            About(
                "Sequences in the time range steered by a policy that settings.yaml does not "
                "expect.",
                "find the policy below; delete it, or declare it.",
            ),
            "short",
            promql.increase(names.STEERING_REQUESTS, window, *ENGINE, *unexpected).sum(),
            Level(1.0, "orange"),
            start="green",
        ),
        figure(
            "Unconfirmed policy changes",
            About(
                "Changes in the time range that a connected front end did not confirm in time.",
                "any is worth a look: that front end may resolve names as they were before.",
            ),
            "short",
            promql.increase(names.PROPAGATION_TIMEOUTS, window).sum(),
            Level(1.0, "orange"),
            start="green",
        ),
    )


def _asked() -> tuple[PanelBuilder, ...]:
    asked = promql.rate(names.STEERING_REQUESTS, RATE, FRONT_END).sum("policy", "outcome")
    applied = promql.rate(
        names.STEERING_REQUESTS, RATE, *ENGINE, equals("outcome", Outcome.APPLIED)
    )
    return (
        graph(
            "Asked for at front ends",
            About(
                "Requests a second by policy and outcome. 'unknown' is any name that is no policy "
                "in force; 'inline' are edits that the request brought itself; 'overruled' are "
                "those that a rule gave something else.",
                "refusals of 'unknown' after a deletion mean that a client still names the policy.",
            ),
            "reqps",
            Query(asked, "{{policy}} {{outcome}}"),
            stacked=True,
        ),
        graph(
            "Applied by engines",
            About(
                "Sequences a second that began with steering, by policy; a request for n "
                "completions counts n times.",
                "an applied policy that no front end admitted was ordered by an operator.",
            ),
            "reqps",
            Query(applied.sum("policy"), "{{policy}}"),
            stacked=True,
        ),
        graph(
            "Override in force",
            About(
                "The operator's override: 'none', 'off' (nothing is steered) or 'force' (one "
                "policy for everything). 1 is the mode in force at some hub.",
                "an override is an emergency brake: see who set it and why, and release it.",
            ),
            "none",
            Query(promql.current(names.STEERING_OVERRIDE).max("mode"), "{{mode}}"),
            span=24,
        ),
    )


def _changed() -> tuple[PanelBuilder, ...]:
    steered = promql.rate(names.STEERED_TOKENS, RATE, *ENGINE)
    return (
        graph(
            "Changed tokens by feature",
            About(
                "Tokens a second at which steering changed the feature.",
                "applied policies without changed tokens are gated by a condition that is not met.",
            ),
            "short",
            Query(steered.sum("feature"), "{{feature}}"),
            stacked=True,
        ),
        graph(
            "Changed tokens by operation",
            About(
                "The same, by what was done: clamp, ablate, at_least, at_most, scale, add.",
                "an operation that none of your policies has comes from inline edits.",
            ),
            "short",
            Query(steered.sum("op"), "{{op}}"),
            stacked=True,
        ),
    )


def _dose() -> tuple[PanelBuilder, ...]:
    buckets = promql.buckets(names.STEERING_DOSE, RATE, *ENGINE)
    strong: Vector = promql.above(
        names.STEERING_DOSE, STRONG_DOSE, RATE, *ENGINE, by=("model_name",)
    )
    return (
        heat(
            "Dose",
            About(
                "Size of the change relative to what it was added to, per changed token and site.",
                "a cloud that moves up without a change of policies is new traffic; cap a policy "
                "with max_dose where it strays beyond what you measured to be harmless.",
            ),
            "percentunit",
            buckets,
        ),
        graph(
            f"Dose: median, 99th percentile, and share above {STRONG_DOSE:g}",
            About(
                "Quantiles are interpolated; the share is exact, since it sits on a bucket bound.",
                "how much a model bears is its own: measure it in the lab, and look for broken "
                "text where the share above rises.",
            ),
            "percentunit",
            Query(promql.quantile(0.5, buckets, "model_name"), "{{model_name}} p50"),
            Query(promql.quantile(0.99, buckets, "model_name"), "{{model_name}} p99"),
            Query(strong, "{{model_name}} share above"),
        ),
    )
