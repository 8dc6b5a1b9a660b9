"""Every metric Steerscope has: name, unit, help, labels and buckets, and nowhere else."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from steerscope.catalog.store import Catalog
from steerscope.telemetry.totals import Bounds


class Kind(enum.StrEnum):
    """What an instrument is."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Instrument:
    """One metric. ``unit`` is UCUM, as OpenTelemetry has it; the name is Prometheus's."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()


ENGINE = ("model_name", "engine")
"""Labels of whatever comes from an engine; vLLM's own names for them."""

SIGNAL_SCORE = Instrument(
    "steerscope_signal_score_ratio",
    Kind.HISTOGRAM,
    "1",
    "Score of each signal, once for each finished sequence that has one.",
    (*ENGINE, "signal"),
)
SIGNAL_REQUESTS = Instrument(
    "steerscope_signal_requests_total",
    Kind.COUNTER,
    "{request}",
    "Finished sequences by the label of each signal; without a score 'unobserved', or "
    "'not_applicable' when the signal looks for an entity and the prompt has none.",
    (*ENGINE, "signal", "label"),
)
FEATURE_ACTIVATION = Instrument(
    "steerscope_feature_activation",
    Kind.HISTOGRAM,
    "1",
    "Activation of each feature at each observed token; the sum adds positive parts only.",
    (*ENGINE, "feature", "phase"),
)
"""The more features a catalog has, the fewer bounds: ``ACTIVATION_TIERS``."""
FEATURE_ACTIVE_TOKENS = Instrument(
    "steerscope_feature_active_tokens_total",
    Kind.COUNTER,
    "{token}",
    "Observed tokens at which the feature was above zero.",
    (*ENGINE, "feature", "phase"),
)
OBSERVED_TOKENS = Instrument(
    "steerscope_observed_tokens_total",
    Kind.COUNTER,
    "{token}",
    "Tokens observed at every site, each position of a sequence once.",
    (*ENGINE, "phase"),
)
CACHED_TOKENS = Instrument(
    "steerscope_cached_tokens_total",
    Kind.COUNTER,
    "{token}",
    "Of the observed tokens, those whose KV came from the prefix cache: their activations were "
    "kept when an earlier request computed them.",
    ENGINE,
)
UNOBSERVED_TOKENS = Instrument(
    "steerscope_unobserved_tokens_total",
    Kind.COUNTER,
    "{token}",
    "Tokens that could not be observed or attributed.",
    (*ENGINE, "reason"),
)
STEERING_REQUESTS = Instrument(
    "steerscope_steering_requests_total",
    Kind.COUNTER,
    "{request}",
    "Requests that asked for steering: admitted or rejected by a front end, applied by an "
    "engine (each sequence once).",
    (*ENGINE, "policy", "outcome"),
)
STEERED_TOKENS = Instrument(
    "steerscope_steered_tokens_total",
    Kind.COUNTER,
    "{token}",
    "Tokens at which steering changed the feature.",
    (*ENGINE, "feature", "op"),
)
"""There at zero for what policies do; for any other edit from the first token that it changed."""
STEERING_DOSE = Instrument(
    "steerscope_steering_dose_ratio",
    Kind.HISTOGRAM,
    "1",
    "Norm of the change over the norm of the residual, for each changed token and site.",
    ENGINE,
)
FRAMES = Instrument(
    "steerscope_frames_total",
    Kind.COUNTER,
    "{frame}",
    "Frames received from workers.",
    ENGINE,
)
FRAMES_DROPPED = Instrument(
    "steerscope_frames_dropped_total",
    Kind.COUNTER,
    "{frame}",
    "Frames whose contents never counted: not sent by the worker, lost with a hub that was "
    "killed, shed by a hub that could not keep up, or refused by it.",
    (*ENGINE, "reason"),
)
READOUT_LAG = Instrument(
    "steerscope_readout_lag_seconds",
    Kind.HISTOGRAM,
    "s",
    "Time from the readout of a step to its arrival at the hub.",
    ENGINE,
)
STEP_OVERHEAD = Instrument(
    "steerscope_step_overhead_seconds",
    Kind.HISTOGRAM,
    "s",
    "Host time that Steerscope spent in a step.",
    ENGINE,
)
ENGINE_LAST_SEEN = Instrument(
    "steerscope_engine_last_seen_seconds",
    Kind.GAUGE,
    "s",
    "Time since the engine's newest frame that counted; it grows while the engine is idle.",
    ENGINE,
)
STEERING_OVERRIDE = Instrument(
    "steerscope_steering_override",
    Kind.GAUGE,
    "1",
    "1 for the mode of the operator's override that is in force: none, off or force.",
    ("mode",),
)
HUB_CPU = Instrument(
    "steerscope_hub_cpu_seconds_total",
    Kind.COUNTER,
    "s",
    "Processor time of the hub's process; near one second a second, its one loop is saturated.",
)
HUB_RESTARTS = Instrument(
    "steerscope_hub_restarts_total",
    Kind.COUNTER,
    "{restart}",
    "How many times the launcher started the hub again after it ended, in vain or not.",
)
OTEL_DROPPED = Instrument(
    "steerscope_otel_dropped_total",
    Kind.COUNTER,
    "{item}",
    "What no OTLP collector took: events ('logs'), and collections of metrics, which the next one "
    "makes up for. There where a collector is configured.",
    ("signal",),
)
PROPAGATION_TIMEOUTS = Instrument(
    "steerscope_policy_propagation_timeouts_total",
    Kind.COUNTER,
    "{timeout}",
    "Policy changes that a live front end did not confirm in time.",
)
FEATURE_DRIFT_PSI = Instrument(
    "steerscope_feature_drift_psi",
    Kind.GAUGE,
    "1",
    "Population stability index of each feature's activations over the newest window (15 minutes "
    "by default) against the catalog's baseline, tokens of steered and of canary requests left "
    "out; absent while the window has fewer than 1000 tokens. By custom 0.25 is a large shift.",
    (*ENGINE, "feature", "phase"),
)
FEATURE_DRIFT_KS = Instrument(
    "steerscope_feature_drift_ks",
    Kind.GAUGE,
    "1",
    "Kolmogorov-Smirnov distance at the edges of the baseline's bins, of the same tokens.",
    (*ENGINE, "feature", "phase"),
)
FEATURE_DRIFT_TOKENS = Instrument(
    "steerscope_feature_drift_tokens",
    Kind.GAUGE,
    "{token}",
    "Tokens in the window that drift is measured over.",
    (*ENGINE, "feature", "phase"),
)
CANARY_RUNS = Instrument(
    "steerscope_canary_runs_total",
    Kind.COUNTER,
    "{run}",
    "Synthetic requests of each check of the canary, by what came of them.",
    ("canary", "outcome"),
)
CANARY_LAST_SUCCESS = Instrument(
    "steerscope_canary_last_success_timestamp_seconds",
    Kind.GAUGE,
    "s",
    "When the check passed last, in seconds since 1970; 0 for never since the hub started.",
    ("canary",),
)
CANARY_SCORE = Instrument(
    "steerscope_canary_score_ratio",
    Kind.GAUGE,
    "1",
    "Score of each signal in the check's newest run that has one.",
    ("canary", "signal"),
)
BUILD_INFO = Instrument(
    "steerscope_build_info",
    Kind.GAUGE,
    "1",
    "Always 1; the labels say which version serves which catalog, and whether the model is the "
    "one that the catalog was made for.",
    ("version", "catalog", "catalog_version", "catalog_digest", "model_match"),
)

INSTRUMENTS = (
    SIGNAL_SCORE,
    SIGNAL_REQUESTS,
    FEATURE_ACTIVATION,
    FEATURE_ACTIVE_TOKENS,
    OBSERVED_TOKENS,
    CACHED_TOKENS,
    UNOBSERVED_TOKENS,
    STEERING_REQUESTS,
    STEERED_TOKENS,
    STEERING_DOSE,
    FRAMES,
    FRAMES_DROPPED,
    READOUT_LAG,
    STEP_OVERHEAD,
    ENGINE_LAST_SEEN,
    HUB_CPU,
    STEERING_OVERRIDE,
    HUB_RESTARTS,
    OTEL_DROPPED,
    PROPAGATION_TIMEOUTS,
    FEATURE_DRIFT_PSI,
    FEATURE_DRIFT_KS,
    FEATURE_DRIFT_TOKENS,
    CANARY_RUNS,
    CANARY_LAST_SUCCESS,
    CANARY_SCORE,
    BUILD_INFO,
)

ACTIVATION_BOUNDS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)
ACTIVATION_TIERS = (
    ACTIVATION_BOUNDS,  # up to 70 features
    (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0),  # up to 109
    (0.0, 2.0, 8.0),  # up to 200
    (),  # how many are above 0 is a counter of its own
)
"""Each within the one before, so that what is asked of few bounds holds of more."""
ACTIVATION_SERIES = 2400
"""Of one engine, at most, in all tiers but the last: with it four engines' page is under 2 MB."""
SCORE_BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
DOSE_BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0)
LAG_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
OVERHEAD_BOUNDS = (2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 0.1)


def bounds_for(catalog: Catalog) -> Bounds:
    """All bucket bounds; scores get those of every label too, so that alerts can sit on them."""
    below = {label.below for signal in catalog.signals for label in signal.labels}
    labels = {bound for bound in below if bound is not None and 0.0 < bound < 1.0}
    return Bounds(
        activation=activation_bounds(len(catalog.document.features)),
        score=tuple(sorted({*SCORE_BOUNDS, *labels})),
        dose=DOSE_BOUNDS,
        lag=LAG_BOUNDS,
        overhead=OVERHEAD_BOUNDS,
    )


def activation_bounds(num_features: int) -> tuple[float, ...]:
    """The first tier that so many features can afford, in two phases each."""
    fitting = (
        bounds
        for bounds in ACTIVATION_TIERS
        if 2 * num_features * num_samples(bounds) <= ACTIVATION_SERIES
    )
    return next(fitting, ACTIVATION_TIERS[-1])


def num_samples(bounds: Sequence[float]) -> int:
    """Of one series of a histogram: its buckets, the infinite one too, its count and its sum."""
    return len(bounds) + 3
