"""Pipeline health: what the telemetry lost, how late it is, and what it costs."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard
from steerscope.export import instruments as names

from steerscope_dashboards import canary, promql, recording
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
    listing,
    variable,
)
from steerscope_dashboards.settings import Settings


def pipeline(settings: Settings) -> Dashboard:
    """Whether what the other dashboards show can be believed."""
    return board(
        Board.PIPELINE,
        "Steerscope / Pipeline health",
        "What went unobserved and why, how late frames are, what Steerscope costs, and who is "
        "connected. Look here before believing a change on the other dashboards.",
        (
            variable("model", "model_name", names.OBSERVED_TOKENS),
            variable("engine", "engine", names.OBSERVED_TOKENS, MODEL),
        ),
        (
            Section("At a glance", _glance(settings)),
            Section("The canary", (canary.outcomes(), canary.waits(settings), canary.scores())),
            Section("What was not observed", _unobserved(settings)),
            Section("Frames", _frames(settings)),
            Section("What it costs", _costs(settings)),
            Section("Who is there", _who()),
        ),
    )


def _glance(settings: Settings) -> tuple[PanelBuilder, ...]:
    window = "$__range"
    lost = promql.increase(names.FRAMES_DROPPED, window).sum()
    cached = promql.increase(names.CACHED_TOKENS, window, *ENGINE).sum()
    observed = promql.increase(names.OBSERVED_TOKENS, window, *ENGINE).sum()
    return (
        figure(
            "Worst coverage of an engine",
            About(
                "The lowest share of observed tokens of any chosen engine, over five minutes.",
                "below the threshold, see the reasons in the next row.",
            ),
            "percentunit",
            recording.coverage().now(*ENGINE).min(),
            Level(settings.coverage, "green"),
            start="orange",
        ),
        figure(
            "Frames lost",
            About(
                "Frames in the time range whose contents never counted, at every hub.",
                "see below for why; 'catalog_mismatch' means that hub and worker were started "
                "with different catalogs.",
            ),
            "short",
            lost,
            Level(1.0, "orange"),
            start="green",
        ),
        figure(
            "Longest silence of an engine",
            About(
                "Time since the newest frame of the engine that was heard of least recently.",
                "idle engines are silent by nature; compare with vLLM's running requests.",
            ),
            "s",
            promql.current(names.ENGINE_LAST_SEEN, *ENGINE).max(),
        ),
        figure(
            "From the prefix cache",
            About(
                "Share of the observed tokens whose KV was reused, and whose activations were "
                "kept from an earlier request.",
                "nothing: it tells how much of what you see was computed before.",
            ),
            "percentunit",
            cached.over(observed),
        ),
    )


def _unobserved(settings: Settings) -> tuple[PanelBuilder, ...]:
    missing = promql.rate(names.UNOBSERVED_TOKENS, RATE, *ENGINE)
    return (
        graph(
            "Unobserved tokens by reason",
            About(
                "Tokens a second that could not be observed or attributed.",
                "prefix_cache: raise telemetry.max_cache_bytes. external_kv: they came from "
                "another engine. dropped_frame: see Frames. unknown_request: a hub restarted. "
                "catalog_mismatch: restart with one catalog. not_finite: the model is broken.",
            ),
            "short",
            Query(missing.sum("reason"), "{{reason}}"),
            stacked=True,
        ),
        graph(
            "Coverage by engine",
            About(
                "Share of tokens observed, over five minutes.",
                "one engine below the others has a fault of its own; all of them at once is the "
                "traffic or the hub.",
            ),
            "percentunit",
            Query(recording.coverage().now(*ENGINE), "{{model_name}} {{engine}}"),
        ),
    )


def _frames(settings: Settings) -> tuple[PanelBuilder, ...]:
    lag = promql.buckets(names.READOUT_LAG, RATE, *ENGINE)
    by = ("model_name", "engine")
    return (
        graph(
            "Frames received",
            About(
                "Frames a second by engine: one for each step of each worker.",
                "if it stops while vLLM works, the engine's worker or the socket is the fault.",
            ),
            "short",
            Query(promql.rate(names.FRAMES, RATE, *ENGINE).sum(*by), "{{model_name}} {{engine}}"),
        ),
        graph(
            "Frames lost by reason",
            About(
                "Frames a second whose contents never counted.",
                "shed: the hub could not keep up. not_sent: nor could it shed, or it is gone. "
                "lost: they died with an earlier hub. "
                "malformed: versions of worker and hub differ. catalog_mismatch, "
                "too_many_engines: see the logs of the hub.",
            ),
            "short",
            Query(promql.rate(names.FRAMES_DROPPED, RATE).sum("reason"), "{{reason}}"),
            stacked=True,
        ),
        graph(
            "Readout lag: median and 99th percentile",
            About(
                "Time from the readout of a step to its arrival at the hub.",
                "if it grows with traffic, look at the hub's processor below.",
            ),
            "s",
            Query(promql.quantile(0.5, lag, *by), "{{model_name}} {{engine}} p50"),
            Query(promql.quantile(0.99, lag, *by), "{{model_name}} {{engine}} p99"),
        ),
        graph(
            f"Frames later than {settings.lag_seconds:g} s",
            About(
                "Exact share, since it sits on a bucket bound; the line is the alert's.",
                "live views and steering of running requests are late by as much.",
            ),
            "percentunit",
            Query(
                promql.above(names.READOUT_LAG, settings.lag_seconds, RATE, *ENGINE, by=by),
                "{{model_name}} {{engine}}",
            ),
            limit=settings.lag_share,
        ),
    )


def _costs(settings: Settings) -> tuple[PanelBuilder, ...]:
    overhead = promql.buckets(names.STEP_OVERHEAD, RATE, *ENGINE)
    spent = promql.total(names.STEP_OVERHEAD, RATE, *ENGINE)
    by = ("model_name", "engine")
    return (
        graph(
            "Host time per step: median and 99th percentile",
            About(
                "What Steerscope itself spends on the host in a step; the graph's own cost is not "
                "in it.",
                "if it is not small beside vLLM's time per output token, tap fewer sites.",
            ),
            "s",
            Query(promql.quantile(0.5, overhead, *by), "{{model_name}} {{engine}} p50"),
            Query(promql.quantile(0.99, overhead, *by), "{{model_name}} {{engine}} p99"),
        ),
        graph(
            "Share of time spent",
            About(
                "Seconds of that per second, added up over an engine's workers.",
                "compare with a benchmark of your own before and after a change of catalog.",
            ),
            "percentunit",
            Query(spent.sum(*by), "{{model_name}} {{engine}}"),
        ),
        graph(
            "Processor time of the hub",
            About(
                "Seconds a second; its one loop can use one. The line is the alert's.",
                "near the line, run fewer engines per hub or tap fewer features.",
            ),
            "percentunit",
            Query(promql.rate(names.HUB_CPU, RATE).sum("instance"), "{{instance}}"),
            limit=settings.hub_cpu,
        ),
        graph(
            "Restarts of the hub",
            About(
                "How many times the launcher started the hub again, within an hour.",
                "any is a crash: the launcher's log has it. Telemetry of that moment is lost and "
                "counted; steering went on.",
            ),
            "short",
            Query(promql.increase(names.HUB_RESTARTS, "1h").sum("instance"), "{{instance}}"),
        ),
    )


def _who() -> tuple[PanelBuilder, ...]:
    return (
        graph(
            "Silence of each engine",
            About(
                "Time since the newest frame that counted.",
                "a saw's teeth are traffic; a line that only climbs is an idle or lost engine.",
            ),
            "s",
            Query(promql.current(names.ENGINE_LAST_SEEN, *ENGINE), "{{model_name}} {{engine}}"),
        ),
        listing(
            "Hubs",
            About(
                "Each hub's version, catalog and how the served model compares with the one that "
                "the catalog was made for.",
                "one version and one digest in a fleet; 'fine_tune' and 'unverified' mean that "
                "the calibration may not hold.",
            ),
            promql.current(names.BUILD_INFO),
            "Value",
        ),
    )
