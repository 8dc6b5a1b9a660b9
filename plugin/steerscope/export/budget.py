"""How many series a hub tells Prometheus, before it tells any.

They follow from the catalog and the settings alone. Two numbers of it are open while a hub runs:
how many policies are created, and which features requests edit in ways that no policy does.
``declared`` takes them for none, ``most`` for all that can be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from steerscope.catalog.store import Catalog
from steerscope.config import Settings
from steerscope.errors import ConfigError
from steerscope.export import instruments as names
from steerscope.export import prometheus as told
from steerscope.export.instruments import Instrument, num_samples
from steerscope.steering.admission import RESERVED_NAMES
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.totals import OPS, PHASES, CanaryOutcome

NUM_NAMED: Final = 3
"""So many metrics are named to who is over the limit."""
_OTEL_SIGNALS: Final = 2
"""Metrics and logs."""


class Row(NamedTuple):
    """A metric's series: of each engine, and beside them."""

    instrument: Instrument
    of_engine: int
    of_hub: int


@dataclass(frozen=True, slots=True)
class Budget:
    """All metrics, in the order in which they are declared."""

    rows: tuple[Row, ...]

    @property
    def of_engine(self) -> int:
        """The series that come with each engine."""
        return sum(row.of_engine for row in self.rows)

    @property
    def of_hub(self) -> int:
        """The series that a hub has without any engine."""
        return sum(row.of_hub for row in self.rows)

    def num_series(self, num_engines: int) -> int:
        """All series of a hub that has heard of so many engines."""
        return self.of_hub + num_engines * self.of_engine


def declared(catalog: Catalog, settings: Settings) -> Budget:
    """Exact once all series are there, while no policy is created and only policies are used."""
    policies = (*catalog.policies, *settings.policies)
    pairs = told.steered_pairs(Columns(catalog), policies)
    return _budget(catalog, settings, len(policies), int(pairs.sum()))


def most(catalog: Catalog, settings: Settings) -> Budget:
    """What cannot be exceeded."""
    num_policies = len(catalog.policies) + len(settings.policies)
    num_policies = max(num_policies, settings.hub.max_policies)
    return _budget(catalog, settings, num_policies, sum(Columns(catalog).steerable) * len(OPS))


def check(catalog: Catalog, settings: Settings) -> None:
    """Raise ``ConfigError`` if one engine's series may be more than the settings allow."""
    limit, found = settings.telemetry.max_series_per_engine, most(catalog, settings)
    if found.of_engine <= limit:
        return
    largest = sorted(found.rows, key=lambda row: row.of_engine, reverse=True)[:NUM_NAMED]
    parts = ", ".join(f"{row.of_engine} of {row.instrument.name}" for row in largest)
    raise ConfigError(
        f"telemetry.max_series_per_engine: {limit}, and one engine may have {found.of_engine} "
        f"series ({parts}, ...): select fewer features or baselines, lower hub.max_policies, "
        "or raise the limit"
    )


def _budget(catalog: Catalog, settings: Settings, num_policies: int, num_pairs: int) -> Budget:
    of_engine = _of_engine(catalog, num_policies + len(RESERVED_NAMES), num_pairs)
    of_hub = _of_hub(catalog, settings, num_policies + len(RESERVED_NAMES))
    rows = (Row(i, of_engine.get(i, 0), of_hub.get(i, 0)) for i in names.INSTRUMENTS)
    return Budget(tuple(rows))


def _of_engine(catalog: Catalog, num_policies: int, num_pairs: int) -> dict[Instrument, int]:
    bounds, signals = names.bounds_for(catalog), catalog.signals
    num_features, num_baselines = len(catalog.document.features), len(catalog.document.baselines)
    return {
        names.SIGNAL_SCORE: len(signals) * num_samples(bounds.score),
        names.SIGNAL_REQUESTS: sum(len(told.signal_labels(signal)) for signal in signals),
        names.FEATURE_ACTIVATION: num_features * len(PHASES) * num_samples(bounds.activation),
        names.FEATURE_ACTIVE_TOKENS: num_features * len(PHASES),
        names.OBSERVED_TOKENS: len(PHASES),
        names.CACHED_TOKENS: 1,
        names.UNOBSERVED_TOKENS: len(told.UNOBSERVED_REASONS),
        names.STEERING_REQUESTS: num_policies,
        names.STEERED_TOKENS: num_pairs,
        names.STEERING_DOSE: num_samples(bounds.dose),
        names.FRAMES: 1,
        names.FRAMES_DROPPED: len(told.ENGINE_LOSSES),
        names.READOUT_LAG: num_samples(bounds.lag),
        names.STEP_OVERHEAD: num_samples(bounds.overhead),
        names.ENGINE_LAST_SEEN: 1,
        names.FEATURE_DRIFT_PSI: num_baselines,
        names.FEATURE_DRIFT_KS: num_baselines,
        names.FEATURE_DRIFT_TOKENS: num_baselines,
    }


def _of_hub(catalog: Catalog, settings: Settings, num_policies: int) -> dict[Instrument, int]:
    num_checks = len(settings.canary.checks) if settings.canary is not None else 0
    return {
        names.STEERING_REQUESTS: num_policies * len(told.FRONT_END_OUTCOMES),
        names.FRAMES_DROPPED: len(told.HUB_LOSSES),
        names.HUB_CPU: 1,
        names.STEERING_OVERRIDE: len(told.OVERRIDES),
        names.HUB_RESTARTS: 1,
        names.OTEL_DROPPED: _OTEL_SIGNALS if settings.otel is not None else 0,
        names.PROPAGATION_TIMEOUTS: 1,
        names.CANARY_RUNS: num_checks * len(CanaryOutcome),
        names.CANARY_LAST_SUCCESS: num_checks,
        names.CANARY_SCORE: num_checks * len(catalog.signals),
        names.BUILD_INFO: 1,
    }
