"""The drill-down: one feature, or a few, in prompt and generation."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard
from steerscope.export import instruments as names
from steerscope.steering.interventions import Phase

from steerscope_dashboards import promql
from steerscope_dashboards.pages import Board
from steerscope_dashboards.panels import (
    ENGINE,
    FEATURE,
    MODEL,
    RATE,
    About,
    PanelBuilder,
    Query,
    Section,
    board,
    figure,
    graph,
    heat,
    variable,
)
from steerscope_dashboards.promql import Vector, equals
from steerscope_dashboards.settings import Settings


def feature(settings: Settings) -> Dashboard:
    """How often, how strongly and where the chosen features are active."""
    return board(
        Board.FEATURE,
        "Steerscope / Feature drill-down",
        "How often and how strongly a feature is active. Choose few features: a quantile over "
        "several of them has no meaning.",
        (
            variable("model", "model_name", names.OBSERVED_TOKENS),
            variable("engine", "engine", names.OBSERVED_TOKENS, MODEL),
            variable("feature", "feature", names.FEATURE_ACTIVE_TOKENS, MODEL),
        ),
        (
            Section("How often", _how_often()),
            Section("How strongly", _how_strongly()),
            Section("How far from the catalog's baseline", _drift(settings)),
            Section("Steering of it", _steering()),
        ),
    )


def _active_share(window: str, *by: str) -> Vector:
    """Counts of a feature's own histogram tell how many tokens it was read at."""
    active = promql.rate(names.FEATURE_ACTIVE_TOKENS, window, *FEATURE)
    return active.sum(*by).over(
        promql.observations(names.FEATURE_ACTIVATION, window, *FEATURE).sum(*by)
    )


def _how_often() -> tuple[PanelBuilder, ...]:
    return (
        figure(
            "Active tokens",
            About(
                "Share of the observed tokens in the time range at which the feature was above 0.",
                "compare with the base rate on the feature's card; far from it, the traffic is not "
                "what the catalog was calibrated on.",
            ),
            "percentunit",
            _active_share("$__range"),
        ),
        graph(
            "Share of tokens at which it is active",
            About(
                "By feature and phase: prompt tokens, or tokens that the model generated.",
                "a step at a deployment is the model's; a step without one is the traffic's.",
            ),
            "percentunit",
            Query(_active_share(RATE, "feature", "phase"), "{{feature}} {{phase}}"),
            span=18,
        ),
    )


def _how_strongly() -> tuple[PanelBuilder, ...]:
    def buckets(phase: Phase) -> Vector:
        return promql.buckets(names.FEATURE_ACTIVATION, RATE, *FEATURE, equals("phase", phase))

    everything = promql.buckets(names.FEATURE_ACTIVATION, RATE, *FEATURE)
    strength = promql.total(names.FEATURE_ACTIVATION, RATE, *FEATURE).sum("feature")
    active = promql.rate(names.FEATURE_ACTIVE_TOKENS, RATE, *FEATURE).sum("feature")
    return (
        heat(
            "Activation in prompts",
            About(
                "Observed prompt tokens a second in each bucket of the activation; the more "
                "features a catalog has, the fewer buckets, and beyond 200 none.",
                "a cloud far above 0 that was not there before is a new kind of prompt: look for "
                "it in requests' reports.",
            ),
            "none",
            buckets(Phase.PROMPT),
        ),
        heat(
            "Activation in generation",
            About(
                "Observed generated tokens a second in each bucket of the activation.",
                "activation that appears only here is the model's own doing, not the prompt's.",
            ),
            "none",
            buckets(Phase.GENERATION),
        ),
        graph(
            "Mean where it is active",
            About(
                "Positive activation per active token, of each feature.",
                "use it to choose the strength of a clamp: one far above it is a large dose.",
            ),
            "none",
            Query(strength.over(active), "{{feature}}"),
        ),
        graph(
            "99th percentile of activation",
            About(
                "By feature, interpolated within a bucket; flat at a bucket's bound means that it "
                "is above the last one. A catalog of more than 200 features has no buckets.",
                "compare engines of one model: they should agree, or one of them serves something "
                "else.",
            ),
            "none",
            Query(promql.quantile(0.99, everything, "feature", "engine"), "{{feature}} {{engine}}"),
        ),
    )


def _drift(settings: Settings) -> tuple[PanelBuilder, ...]:
    by, legend = ("feature", "phase", "engine"), "{{feature}} {{phase}} {{engine}}"
    return (
        graph(
            "Population stability index",
            About(
                "How far the newest window's activations are from those that the catalog was "
                "calibrated on, steered requests and the canary's left out. The line is the "
                "alert's.",
                "the runbook of SteerscopeFeatureDrift says how to tell new traffic from another "
                "model. A feature without a baseline has no line, nor has one that was read at "
                "fewer than 1000 tokens.",
            ),
            "none",
            Query(promql.current(names.FEATURE_DRIFT_PSI, *FEATURE).max(*by), legend),
            limit=settings.drift_psi,
        ),
        graph(
            "Kolmogorov-Smirnov distance",
            About(
                "The largest gap between the shares of tokens below a value, then and now.",
                "where it is large and the index is not, many tokens moved by little; the other "
                "way round, a few went where there were none.",
            ),
            "percentunit",
            Query(promql.current(names.FEATURE_DRIFT_KS, *FEATURE).max(*by), legend),
        ),
        graph(
            "Tokens in the window",
            About(
                "How many tokens drift is measured over. The alert judges nothing below the line.",
                "with less, wait, or widen the server's telemetry.drift_window_seconds.",
            ),
            "short",
            Query(promql.current(names.FEATURE_DRIFT_TOKENS, *FEATURE).min(*by), legend),
            limit=float(settings.floors.drift_tokens),
            span=24,
        ),
    )


def _steering() -> tuple[PanelBuilder, ...]:
    steered = promql.rate(names.STEERED_TOKENS, RATE, *FEATURE)
    observed = promql.rate(names.OBSERVED_TOKENS, RATE, *ENGINE)
    return (
        graph(
            "Tokens at which it was changed",
            About(
                "By feature and operation. Activations above are those before any change, but "
                "later layers see what was changed.",
                "if a read-out in a later layer moved together with this, steering is the cause.",
            ),
            "short",
            Query(steered.sum("feature", "op"), "{{feature}} {{op}}"),
        ),
        graph(
            "Share of all tokens changed",
            About(
                "Changes of the chosen features per observed token of the chosen engines.",
                "where it is more than a few percent, read this feature's base rate with care.",
            ),
            "percentunit",
            Query(steered.sum("engine").over(observed.sum("engine")), "engine {{engine}}"),
        ),
    )
