"""The alerts: when each fires, how long it waits, and what it tells whom it wakes.

Thresholds come from ``settings.yaml``, which says why. ``critical`` is for now, ``warning`` for
the next working day, ``none`` for a machine that waits for it. Every alert about traffic has a
floor beneath which it says nothing.
"""

from __future__ import annotations

from typing import Final

from steerscope.export import instruments as names
from steerscope.export.prometheus import NO_OVERRIDE
from steerscope.telemetry.reductions import Missing
from steerscope.telemetry.totals import Outcome

from steerscope_dashboards import promql, recording
from steerscope_dashboards.alerting import Alert, Condition
from steerscope_dashboards.pages import Board
from steerscope_dashboards.promql import ExpressionError, Vector, equals, none_of, number
from steerscope_dashboards.settings import Settings

ENGINE: Final = ("model_name", "engine")
VLLM_RUNNING: Final = "vllm:num_requests_running"
"""vLLM's own gauge, with ``model_name`` and ``engine``; scraped from vLLM's port, not ours."""


def alerts(settings: Settings) -> tuple[Alert, ...]:
    """All alerts under these settings."""
    return (
        _risk_high(settings),
        *(_risk_rising(settings, burn) for burn in recording.BURNS),
        _signal_unscored(settings),
        _steering_unexpected(settings),
        _steering_rejected(settings),
        _coverage_low(settings),
        _telemetry_absent(),
        _engine_silent(settings),
        _frames_dropped(settings),
        _readout_lag_high(settings),
        _hub_saturated(settings),
        _hub_restarted(),
        _policy_propagation_slow(),
        _override_in_force(),
        _feature_drift(settings),
        _canary_failing(settings),
        _heartbeat(settings),
    )


def _risk_high(settings: Settings) -> Alert:
    signal = equals("signal", settings.objective.signal)
    window, label = settings.high_window, equals("label", settings.high_label)
    scored = promql.increase(names.SIGNAL_REQUESTS, window, signal, recording.SCORED)
    high = promql.increase(names.SIGNAL_REQUESTS, window, signal, label)
    return Alert(
        name="SteerscopeHallucinationRiskHigh",
        severity="warning",
        board=Board.OVERVIEW,
        hold=settings.high_hold,
        conditions=(
            Condition(
                high.sum("model_name").over(scored.sum("model_name")), ">", settings.high_share
            ),
            Condition(scored.sum("model_name"), ">=", settings.floors.sequences),
        ),
        summary="{{ $labels.model_name }}: many answers look made up.",
        description=f"{{{{ $value | humanizePercentage }}}} of the sequences scored in the last "
        f"{window} have {settings.objective.signal} '{settings.high_label}'.",
    )


def _risk_rising(settings: Settings, burn: recording.Burn) -> Alert:
    objective = settings.objective
    bound = round(burn.factor * objective.budget, 10)
    if bound >= 1.0:
        raise ExpressionError(
            f"objective.share: {objective.share} leaves so much room that burning it "
            f"{number(burn.factor)} times too fast cannot happen; declare at least "
            f"{1 - 1 / burn.factor:.3f}"
        )
    signal = equals("signal", objective.signal)
    scored = promql.increase(names.SIGNAL_REQUESTS, burn.long, signal, recording.SCORED)
    return Alert(
        name="SteerscopeHallucinationRiskRising",
        severity="critical" if burn.severity == "critical" else "warning",
        board=Board.OVERVIEW,
        hold="2m",
        window=burn.long,
        conditions=(
            Condition(recording.excess(settings, burn.long).now(), ">", bound),
            Condition(recording.excess(settings, burn.short).now(), ">", bound),
            Condition(scored.sum("model_name"), ">=", settings.floors.sequences),
        ),
        summary="{{ $labels.model_name }}: the quality objective is being missed.",
        description=f"{{{{ $value | humanizePercentage }}}} of the sequences scored in the last "
        f"{burn.long} have {objective.signal} above {number(objective.score)}; the objective "
        f"allows {number(100 * objective.budget)}%, and its budget of 30 days burns at more than "
        f"{number(burn.factor)} times the rate that makes it last.",
    )


def _signal_unscored(settings: Settings) -> Alert:
    by = ("model_name", "signal")
    applies = none_of("label", Missing.NOT_APPLICABLE)
    finished = promql.increase(names.SIGNAL_REQUESTS, "15m", applies).sum(*by)
    unobserved = equals("label", Missing.UNOBSERVED)
    unscored = promql.increase(names.SIGNAL_REQUESTS, "15m", unobserved).sum(*by)
    return Alert(
        name="SteerscopeSignalUnscored",
        severity="warning",
        board=Board.OVERVIEW,
        hold="10m",
        conditions=(
            Condition(unscored.over(finished), ">", settings.unscored_share),
            Condition(finished, ">=", settings.floors.sequences),
        ),
        summary="{{ $labels.model_name }}: {{ $labels.signal }} is missing for many requests.",
        description="{{ $value | humanizePercentage }} of the sequences finished in the last 15 "
        "minutes have no score: tokens that the signal needs were not observed.",
    )


def _steering_unexpected(settings: Settings) -> Alert:
    matchers = [equals("outcome", Outcome.APPLIED)]
    if settings.expected_policies:
        matchers.append(none_of("policy", *settings.expected_policies))
    applied = promql.increase(names.STEERING_REQUESTS, "5m", *matchers)
    return Alert(
        name="SteerscopeSteeringUnexpected",
        severity="warning",
        board=Board.STEERING,
        hold="0m",
        conditions=(Condition(applied.sum("model_name", "policy"), ">", 0.0),),
        summary="{{ $labels.model_name }}: policy {{ $labels.policy }} steers traffic.",
        description="About {{ $value | humanize }} sequences of the last 5 minutes were steered by "
        "a policy that is not among those declared as expected.",
    )


def _steering_rejected(settings: Settings) -> Alert:
    def asked(*outcomes: Outcome) -> Vector:
        chosen = promql.Matcher("outcome", "=~", "|".join(outcomes))
        return promql.increase(names.STEERING_REQUESTS, "15m", chosen).sum("policy")

    whole = asked(Outcome.ADMITTED, Outcome.REJECTED)
    return Alert(
        name="SteerscopeSteeringRejected",
        severity="warning",
        board=Board.STEERING,
        hold="5m",
        conditions=(
            Condition(asked(Outcome.REJECTED).over(whole), ">", settings.rejected_share),
            Condition(whole, ">=", settings.floors.steered_requests),
        ),
        summary="Steering by {{ $labels.policy }} is being refused.",
        description="{{ $value | humanizePercentage }} of the requests that asked for it in the "
        "last 15 minutes got an error instead of an answer.",
    )


def _coverage_low(settings: Settings) -> Alert:
    tokens = [
        promql.increase(counter, "5m").sum(*ENGINE)
        for counter in (names.OBSERVED_TOKENS, names.UNOBSERVED_TOKENS)
    ]
    return Alert(
        name="SteerscopeCoverageLow",
        severity="warning",
        board=Board.PIPELINE,
        hold="10m",
        conditions=(
            Condition(recording.coverage().now(), "<", settings.coverage),
            Condition(tokens[0].plus(tokens[1]), ">=", settings.floors.tokens),
        ),
        summary="{{ $labels.model_name }}, engine {{ $labels.engine }}: tokens go unobserved.",
        description="Only {{ $value | humanizePercentage }} of the tokens were observed; signals "
        "are about the rest of the traffic only.",
    )


def _telemetry_absent() -> Alert:
    return Alert(
        name="SteerscopeTelemetryAbsent",
        severity="critical",
        board=Board.PIPELINE,
        hold="5m",
        absence=promql.is_absent(names.BUILD_INFO),
        summary="No Steerscope hub is being scraped.",
        description="All signals are missing, and no other Steerscope alert can fire. Serving "
        "itself does not need the hub.",
    )


def _engine_silent(settings: Settings) -> Alert:
    by = ENGINE + ((settings.replica_label,) if settings.replica_label else ())
    seen = promql.current(names.ENGINE_LAST_SEEN)
    newest = Vector(seen.text, seen.labels | set(by)).min(*by)
    running = promql.foreign(VLLM_RUNNING, by).sum(*by)
    return Alert(
        name="SteerscopeEngineSilent",
        severity="critical",
        board=Board.PIPELINE,
        hold="2m",
        conditions=(
            Condition(newest, ">", settings.silent_seconds),
            Condition(running, ">", 0.0),
        ),
        summary="{{ $labels.model_name }}, engine {{ $labels.engine }}: works unobserved.",
        description="vLLM says that requests are running, but no frame of this engine has come "
        "for {{ $value | humanizeDuration }}.",
    )


def _frames_dropped(settings: Settings) -> Alert:
    by = promql.TARGET
    dropped = promql.increase(names.FRAMES_DROPPED, "10m").sum(*by)
    received = promql.increase(names.FRAMES, "10m").sum(*by)
    return Alert(
        name="SteerscopeFramesDropped",
        severity="warning",
        board=Board.PIPELINE,
        hold="5m",
        conditions=(
            Condition(dropped.over(dropped.plus(received)), ">", settings.dropped_share),
            Condition(dropped.plus(received), ">=", settings.floors.frames),
        ),
        summary="{{ $labels.instance }}: frames are being lost.",
        description="{{ $value | humanizePercentage }} of the frames of the last 10 minutes never "
        "counted; their tokens are unobserved.",
    )


def _readout_lag_high(settings: Settings) -> Alert:
    late = promql.above(names.READOUT_LAG, settings.lag_seconds, "10m", by=ENGINE)
    return Alert(
        name="SteerscopeReadoutLagHigh",
        severity="warning",
        board=Board.PIPELINE,
        hold="5m",
        conditions=(
            Condition(late, ">", settings.lag_share),
            Condition(
                promql.increase(names.FRAMES, "10m").sum(*ENGINE), ">=", settings.floors.frames
            ),
        ),
        summary="{{ $labels.model_name }}, engine {{ $labels.engine }}: telemetry is late.",
        description="{{ $value | humanizePercentage }} of the frames took more than "
        f"{number(settings.lag_seconds)} s to reach the hub.",
    )


def _hub_saturated(settings: Settings) -> Alert:
    busy = promql.rate(names.HUB_CPU, "5m").sum(*promql.TARGET)
    return Alert(
        name="SteerscopeHubSaturated",
        severity="warning",
        board=Board.PIPELINE,
        hold="10m",
        conditions=(Condition(busy, ">", settings.hub_cpu),),
        summary="{{ $labels.instance }}: the hub has no time left.",
        description="It uses {{ $value | humanizePercentage }} of the one processor that its loop "
        "can use; frames will be late, then lost.",
    )


def _policy_propagation_slow() -> Alert:
    timeouts = promql.increase(names.PROPAGATION_TIMEOUTS, "15m").sum(*promql.TARGET)
    return Alert(
        name="SteerscopePolicyPropagationSlow",
        severity="warning",
        board=Board.STEERING,
        hold="0m",
        conditions=(Condition(timeouts, ">", 0.0),),
        summary="{{ $labels.instance }}: a policy change was not confirmed in time.",
        description="A front end that is connected did not confirm a change of policies within "
        "the last 15 minutes; it may still resolve names as they were before.",
    )


def _hub_restarted() -> Alert:
    restarts = promql.increase(names.HUB_RESTARTS, "1h").sum(*promql.TARGET)
    return Alert(
        name="SteerscopeHubRestarted",
        severity="warning",
        board=Board.PIPELINE,
        hold="0m",
        conditions=(Condition(restarts, ">", 0.0),),
        summary="{{ $labels.instance }}: the hub ended and was started again.",
        description="About {{ $value | humanize }} times within the last hour; what was in flight "
        "then is unobserved.",
    )


def _override_in_force() -> Alert:
    modes = promql.current(names.STEERING_OVERRIDE, none_of("mode", NO_OVERRIDE))
    return Alert(
        name="SteerscopeOverrideInForce",
        severity="warning",
        board=Board.STEERING,
        hold="0m",
        conditions=(Condition(modes.max("mode"), ">", 0.0),),
        summary="The operator's override is in force: {{ $labels.mode }}.",
        description="It beats every policy, rule and request, for everything that is served.",
    )


def _feature_drift(settings: Settings) -> Alert:
    by = ("model_name", "feature", "phase")
    return Alert(
        name="SteerscopeFeatureDrift",
        severity="warning",
        board=Board.FEATURE,
        hold="15m",
        conditions=(Condition(recording.drift(settings).max(*by), ">", settings.drift_psi),),
        summary="{{ $labels.model_name }}: {{ $labels.feature }} is not what it was calibrated on.",
        description="On an engine, its activations in {{ $labels.phase }} are "
        '{{ $value | printf "%.2f" }} (population stability index) from the catalog\'s baseline.',
    )


def _canary_failing(settings: Settings) -> Alert:
    ago = promql.age(names.CANARY_LAST_SUCCESS).min(*promql.TARGET, "canary")
    return Alert(
        name="SteerscopeCanaryFailing",
        severity="warning",
        board=Board.PIPELINE,
        hold=settings.canary_hold,
        conditions=(Condition(ago, ">", settings.canary_seconds),),
        summary="{{ $labels.instance }}: the canary's check {{ $labels.canary }} does not pass.",
        # Zero seconds since 1970 stand for never.
        description="{{ if gt $value 1e9 }}It never passed since the hub started{{ else }}It last "
        "passed {{ $value | humanizeDuration }} ago{{ end }}. Until it does, do not believe the "
        "signals, nor the silence of alerts about them.",
    )


def _heartbeat(settings: Settings) -> Alert:
    return Alert(
        name="SteerscopeHeartbeat",
        severity="none",
        board=Board.PIPELINE,
        hold="0m",
        conditions=(
            Condition(promql.age(names.CANARY_LAST_SUCCESS).max(), "<", settings.canary_seconds),
        ),
        summary="Every check of the canary passed lately.",
        description="All is well as long as this fires: from a feature in the model to whoever is "
        "told. Somebody has to be told when it does not.",
    )
