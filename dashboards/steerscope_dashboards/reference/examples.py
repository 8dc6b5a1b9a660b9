"""One expression for each metric, of the kind that it is good for, and what it answers.

They are made by ``promql``, so that none can name a label or a bucket bound that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from steerscope.export import instruments as names
from steerscope.export.instruments import Instrument
from steerscope.export.prometheus import NO_OVERRIDE
from steerscope.telemetry.totals import CanaryOutcome, Outcome

from steerscope_dashboards import promql
from steerscope_dashboards.promql import TARGET, Matcher, Vector, equals, none_of

MODEL: Final = ("model_name",)
ENGINE: Final = names.ENGINE
SERIES: Final = ("feature", "phase")


class Example(NamedTuple):
    """An expression, and the question that it answers."""

    answers: str
    vector: Vector


def _share(counter: Instrument, part: Matcher, *among: Matcher, by: str) -> Vector:
    wanted = promql.increase(counter, "1h", part).sum(by)
    return wanted.over(promql.increase(counter, "1h", *among).sum(by))


def _active_share() -> Vector:
    active = promql.rate(names.FEATURE_ACTIVE_TOKENS, "1h").sum(*SERIES)
    return active.over(promql.observations(names.FEATURE_ACTIVATION, "1h").sum(*SERIES))


def _mean_where_active() -> Vector:
    strength = promql.total(names.FEATURE_ACTIVATION, "1h").sum(*SERIES)
    return strength.over(promql.rate(names.FEATURE_ACTIVE_TOKENS, "1h").sum(*SERIES))


def _coverage() -> Vector:
    observed = promql.rate(names.OBSERVED_TOKENS, "5m").sum(*ENGINE)
    unobserved = promql.rate(names.UNOBSERVED_TOKENS, "5m").sum(*ENGINE)
    return observed.over(observed.plus(unobserved))


def _cached_share() -> Vector:
    cached = promql.rate(names.CACHED_TOKENS, "5m").sum(*ENGINE)
    return cached.over(promql.rate(names.OBSERVED_TOKENS, "5m").sum(*ENGINE))


def _mean_overhead() -> Vector:
    spent = promql.total(names.STEP_OVERHEAD, "5m").sum(*ENGINE)
    return spent.over(promql.observations(names.STEP_OVERHEAD, "5m").sum(*ENGINE))


def _p99(histogram: Instrument, *by: str) -> Vector:
    return promql.quantile(0.99, promql.buckets(histogram, "5m"), *by)


def _grown(counter: Instrument, window: str, *by: str) -> Vector:
    return promql.increase(counter, window).sum(*by)


EXAMPLES: Final[Mapping[Instrument, Example]] = MappingProxyType(
    {
        names.SIGNAL_SCORE: Example(
            "the share of sequences whose risk is above 0.9: exact, since 0.9 is a bucket's bound",
            promql.above(
                names.SIGNAL_SCORE, 0.9, "1h", equals("signal", "hallucination_risk"), by=MODEL
            ),
        ),
        names.SIGNAL_REQUESTS: Example(
            "sequences of the last hour, by signal and label",
            _grown(names.SIGNAL_REQUESTS, "1h", "signal", "label"),
        ),
        names.FEATURE_ACTIVATION: Example(
            "how strong each feature is where it is active, mean", _mean_where_active()
        ),
        names.FEATURE_ACTIVE_TOKENS: Example(
            "each feature's base rate: the share of tokens at which it is active", _active_share()
        ),
        names.OBSERVED_TOKENS: Example("coverage", _coverage()),
        names.CACHED_TOKENS: Example(
            "the share of observed tokens that the prefix cache spared the engine", _cached_share()
        ),
        names.UNOBSERVED_TOKENS: Example(
            "what goes unseen, and why",
            promql.rate(names.UNOBSERVED_TOKENS, "5m").sum(*ENGINE, "reason"),
        ),
        names.STEERING_REQUESTS: Example(
            "the share of requests for each policy that front ends refused",
            _share(
                names.STEERING_REQUESTS,
                equals("outcome", Outcome.REJECTED),
                Matcher("outcome", "=~", f"{Outcome.ADMITTED}|{Outcome.REJECTED}"),
                by="policy",
            ),
        ),
        names.STEERED_TOKENS: Example(
            "tokens a second at which each feature is changed",
            promql.rate(names.STEERED_TOKENS, "5m").sum("feature", "op"),
        ),
        names.STEERING_DOSE: Example(
            "the dose that 99% of changes stay below, interpolated",
            _p99(names.STEERING_DOSE, *ENGINE),
        ),
        names.FRAMES: Example("frames a second", promql.rate(names.FRAMES, "5m").sum(*ENGINE)),
        names.FRAMES_DROPPED: Example(
            "frames of the last hour that never counted, by hub and reason",
            _grown(names.FRAMES_DROPPED, "1h", *TARGET, "reason"),
        ),
        names.READOUT_LAG: Example(
            "how late 99% of frames are at most, interpolated", _p99(names.READOUT_LAG, *ENGINE)
        ),
        names.STEP_OVERHEAD: Example("host time in a step, mean", _mean_overhead()),
        names.ENGINE_LAST_SEEN: Example(
            "how long each engine has been silent",
            promql.current(names.ENGINE_LAST_SEEN).min(*ENGINE),
        ),
        names.HUB_CPU: Example(
            "how busy each hub's loop is; 1 is all it can be",
            promql.rate(names.HUB_CPU, "5m").sum(*TARGET),
        ),
        names.STEERING_OVERRIDE: Example(
            "1 while the kill switch is on, or a policy is forced",
            promql.current(names.STEERING_OVERRIDE, none_of("mode", NO_OVERRIDE)).max("mode"),
        ),
        names.HUB_RESTARTS: Example("restarts of a day", _grown(names.HUB_RESTARTS, "1d", *TARGET)),
        names.OTEL_DROPPED: Example(
            "what no collector took in the last hour",
            _grown(names.OTEL_DROPPED, "1h", *TARGET, "signal"),
        ),
        names.PROPAGATION_TIMEOUTS: Example(
            "changes that a front end did not confirm in time, in the last hour",
            _grown(names.PROPAGATION_TIMEOUTS, "1h", *TARGET),
        ),
        names.FEATURE_DRIFT_PSI: Example(
            "how far each feature is from its baseline, on the engine where it is farthest",
            promql.current(names.FEATURE_DRIFT_PSI).max(*MODEL, *SERIES),
        ),
        names.FEATURE_DRIFT_KS: Example(
            "the largest gap between shares then and now, on the engine where it is largest",
            promql.current(names.FEATURE_DRIFT_KS).max(*MODEL, *SERIES),
        ),
        names.FEATURE_DRIFT_TOKENS: Example(
            "on how many tokens an engine's drift rests at least",
            promql.current(names.FEATURE_DRIFT_TOKENS).min(*ENGINE, "phase"),
        ),
        names.CANARY_RUNS: Example(
            "the share of runs that passed",
            _share(names.CANARY_RUNS, equals("outcome", CanaryOutcome.PASSED), by="canary"),
        ),
        names.CANARY_LAST_SUCCESS: Example(
            "seconds since each check passed; some fifty years if it never did",
            promql.age(names.CANARY_LAST_SUCCESS).max(*TARGET, "canary"),
        ),
        names.CANARY_SCORE: Example(
            "the newest scores of each check",
            promql.current(names.CANARY_SCORE).max("canary", "signal"),
        ),
        names.BUILD_INFO: Example(
            "how many hubs serve which version and catalog",
            promql.current(names.BUILD_INFO).sum("version", "catalog", "catalog_version"),
        ),
    }
)
