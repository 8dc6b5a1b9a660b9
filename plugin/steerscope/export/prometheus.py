"""The Prometheus exporter: a collector that reads the totals when it is scraped.

Series of a known engine are there from its first frame on, at zero, for everything that
the catalog declares: rules never see an absent series.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Timestamp
from prometheus_client.utils import floatToGoString

from steerscope import __version__
from steerscope.catalog.model import ModelMatch
from steerscope.catalog.store import Catalog
from steerscope.export import instruments as names
from steerscope.export.instruments import Instrument
from steerscope.steering.interventions import Op
from steerscope.steering.rules import OverrideMode
from steerscope.telemetry import exemplars as telemetry
from steerscope.telemetry.exemplars import Exemplars
from steerscope.telemetry.histograms import HistogramArray
from steerscope.telemetry.reductions import Missing
from steerscope.telemetry.totals import (
    PHASES,
    CanaryOutcome,
    CanaryTotals,
    EngineTotals,
    FrameLoss,
    HubTotals,
    Outcome,
)
from steerscope.telemetry.tracks import EngineKey, Unobserved

Labels = tuple[str, ...]
NO_ENGINE: Labels = ("", "")
"""Empty label values, which Prometheus takes for absent labels."""

NO_OVERRIDE = "none"
_NO_EXEMPLARS: Mapping[int, telemetry.Exemplar] = MappingProxyType({})

UNOBSERVED_REASONS = tuple(r for r in Unobserved if r is not Unobserved.OVER_LIMIT)


class Totals(Protocol):
    """Where the engines' totals are found."""

    @property
    def engines(self) -> Mapping[EngineKey, EngineTotals]:
        """The totals of each engine heard of so far."""


@dataclass(frozen=True, slots=True)
class _Still:
    """Totals that nobody adds to."""

    engines: Mapping[EngineKey, EngineTotals]


class HubCollector(Collector):
    """Turns totals into metric families.

    ``policies`` names the policies in force, ``override`` the mode of the override, or ``none``.
    """

    def __init__(
        self,
        catalog: Catalog,
        totals: Totals,
        hub: HubTotals,
        policies: Callable[[], Iterable[str]],
        model_match: ModelMatch,
        override: Callable[[], str] = lambda: NO_OVERRIDE,
        exemplars: Exemplars | None = None,
    ) -> None:
        self._exemplars = Exemplars(()) if exemplars is None else exemplars
        self._override = override
        self._catalog = catalog
        self._model_match = model_match
        self._totals = totals
        self._hub = hub
        self._policies = policies

    def snapshot(self) -> HubCollector:
        """A collector of what this one would collect now, which another thread may read later."""
        policies, override = list(self._policies()), self._override()
        engines = {key: _still(totals) for key, totals in self._totals.engines.items()}
        return HubCollector(
            self._catalog,
            _Still(engines),
            copy.deepcopy(self._hub),
            lambda: policies,
            self._model_match,
            lambda: override,
            copy.deepcopy(self._exemplars),
        )

    def collect(self) -> Iterator[Metric]:
        """Every family, also those without a sample yet."""
        engines = [((k.model_name, k.engine), t) for k, t in self._totals.engines.items()]
        yield from self._signals(engines)
        yield from _features(engines)
        yield from _tokens(engines)
        yield self._steering_requests(engines)
        yield from _steering(engines)
        yield from self._frames(engines)
        yield _last_seen(engines)
        yield _counter(names.HUB_CPU, [((), time.process_time())])
        yield _counter(names.HUB_RESTARTS, [((), self._hub.restarts)])
        undelivered = [((signal,), n) for signal, n in sorted(self._hub.undelivered.items())]
        yield _counter(names.OTEL_DROPPED, undelivered)
        yield _counter(names.PROPAGATION_TIMEOUTS, [((), self._hub.propagation_timeouts)])
        yield self._steering_override()
        yield from _drift(engines)
        yield from _canaries(self._hub.canaries)
        yield self._build_info()

    def _signals(self, engines: Sequence[tuple[Labels, EngineTotals]]) -> Iterator[Metric]:
        scores = _family(names.SIGNAL_SCORE)
        labelled = []
        for engine, totals in engines:
            for series, signal in enumerate(totals.signals):
                exemplars = self._exemplars.of(EngineKey(*engine), signal.name)
                _add_histogram(scores, (*engine, signal.name), totals.score, series, exemplars)
                for label in (*(band.label for band in signal.labels), *Missing):
                    count = totals.labels[signal.name, label]
                    labelled.append(((*engine, signal.name, label), count))
        yield scores
        yield _counter(names.SIGNAL_REQUESTS, labelled)

    def _steering_requests(self, engines: Sequence[tuple[Labels, EngineTotals]]) -> Metric:
        policies = list(self._policies())
        front_end = (Outcome.ADMITTED, Outcome.REJECTED, Outcome.OVERRULED)
        samples = [
            ((*NO_ENGINE, policy, outcome), self._hub.outcomes[policy, outcome])
            for policy in policies
            for outcome in front_end
        ]
        samples += [
            ((*engine, policy, Outcome.APPLIED), totals.applied[policy])
            for engine, totals in engines
            for policy in policies
        ]
        return _counter(names.STEERING_REQUESTS, samples)

    def _frames(self, engines: Sequence[tuple[Labels, EngineTotals]]) -> Iterator[Metric]:
        yield _counter(names.FRAMES, [(engine, totals.frames) for engine, totals in engines])
        lost = [
            ((*NO_ENGINE, reason), self._hub.frames_lost[reason])
            for reason in (FrameLoss.MALFORMED, FrameLoss.TOO_MANY_ENGINES)
        ]
        lost += [
            ((*engine, reason), totals.frames_lost[reason])
            for engine, totals in engines
            for reason in (FrameLoss.NOT_SENT, FrameLoss.LOST, FrameLoss.CATALOG_MISMATCH)
        ]
        yield _counter(names.FRAMES_DROPPED, lost)
        lag, overhead = _family(names.READOUT_LAG), _family(names.STEP_OVERHEAD)
        for engine, totals in engines:
            _add_histogram(lag, engine, totals.lag, 0)
            _add_histogram(overhead, engine, totals.overhead, 0)
        yield lag
        yield overhead

    def _steering_override(self) -> Metric:
        family, in_force = _gauge(names.STEERING_OVERRIDE), self._override()
        for mode in (NO_OVERRIDE, *OverrideMode):
            family.add_metric((mode,), float(mode == in_force))
        return family

    def _build_info(self) -> Metric:
        document = self._catalog.document
        family = _gauge(names.BUILD_INFO)
        catalog = (document.name, document.version, self._catalog.digest)
        family.add_metric((__version__, *catalog, self._model_match), 1)
        return family


def _still(totals: EngineTotals) -> EngineTotals:
    """A copy of the numbers; what they are of never changes, and is shared."""
    return copy.deepcopy(totals, {id(o): o for o in (totals.columns, totals.signals)})


def _features(engines: Sequence[tuple[Labels, EngineTotals]]) -> Iterator[Metric]:
    activation = _family(names.FEATURE_ACTIVATION)
    active = []
    for engine, totals in engines:
        for column, feature in enumerate(totals.columns.features):
            for phase, name in enumerate(PHASES):
                labels = (*engine, feature, name)
                _add_histogram(activation, labels, totals.activation, 2 * column + phase)
                active.append((labels, int(totals.active[column, phase])))
    yield activation
    yield _counter(names.FEATURE_ACTIVE_TOKENS, active)


def _tokens(engines: Sequence[tuple[Labels, EngineTotals]]) -> Iterator[Metric]:
    observed = [
        ((*engine, name), int(totals.observed[phase]))
        for engine, totals in engines
        for phase, name in enumerate(PHASES)
    ]
    unobserved = [
        ((*engine, reason), totals.unobserved[reason])
        for engine, totals in engines
        for reason in UNOBSERVED_REASONS
    ]
    yield _counter(names.OBSERVED_TOKENS, observed)
    yield _counter(names.CACHED_TOKENS, [(engine, t.cached) for engine, t in engines])
    yield _counter(names.UNOBSERVED_TOKENS, unobserved)


def _steering(engines: Sequence[tuple[Labels, EngineTotals]]) -> Iterator[Metric]:
    dose = _family(names.STEERING_DOSE)
    steered = []
    for engine, totals in engines:
        _add_histogram(dose, engine, totals.dose, 0)
        for column, feature in enumerate(totals.columns.features):
            if totals.columns.steerable[column]:
                for i, op in enumerate(Op):
                    steered.append(((*engine, feature, op), int(totals.steered[column, i])))
    yield _counter(names.STEERED_TOKENS, steered)
    yield dose


def _drift(engines: Sequence[tuple[Labels, EngineTotals]]) -> Iterator[Metric]:
    instruments = (names.FEATURE_DRIFT_PSI, names.FEATURE_DRIFT_KS, names.FEATURE_DRIFT_TOKENS)
    psi, ks, tokens = map(_gauge, instruments)
    for engine, totals in engines:
        for found in totals.drift.measure(time.monotonic()):
            labels = (*engine, found.feature, found.phase)
            tokens.add_metric(labels, found.num_tokens)
            if found.psi is not None and found.ks is not None:
                psi.add_metric(labels, found.psi)
                ks.add_metric(labels, found.ks)
    yield from (psi, ks, tokens)


def _canaries(canaries: Mapping[str, CanaryTotals]) -> Iterator[Metric]:
    runs = [
        ((name, outcome), canary.runs[outcome])
        for name, canary in canaries.items()
        for outcome in CanaryOutcome
    ]
    yield _counter(names.CANARY_RUNS, runs)
    last, scores = _gauge(names.CANARY_LAST_SUCCESS), _gauge(names.CANARY_SCORE)
    for name, canary in canaries.items():
        last.add_metric((name,), canary.last_success)
        for signal, score in canary.scores.items():
            scores.add_metric((name, signal), score)
    yield last
    yield scores


def _last_seen(engines: Sequence[tuple[Labels, EngineTotals]]) -> Metric:
    family, now = _gauge(names.ENGINE_LAST_SEEN), time.monotonic_ns()
    for engine, totals in engines:
        if totals.frames:  # else all of them were refused, and none counted
            family.add_metric(engine, max(now - totals.last_seen_ns, 0) * 1e-9)
    return family


def _gauge(instrument: Instrument) -> GaugeMetricFamily:
    return GaugeMetricFamily(instrument.name, instrument.help, labels=instrument.labels)


def _counter(instrument: Instrument, samples: Iterable[tuple[Labels, float]]) -> Metric:
    family = CounterMetricFamily(instrument.name, instrument.help, labels=instrument.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _family(instrument: Instrument) -> HistogramMetricFamily:
    return HistogramMetricFamily(instrument.name, instrument.help, labels=instrument.labels)


def _add_histogram(
    family: HistogramMetricFamily,
    labels: Labels,
    histogram: HistogramArray,
    series: int,
    exemplars: Mapping[int, telemetry.Exemplar] = _NO_EXEMPLARS,
) -> None:
    bounds = [*map(floatToGoString, histogram.bounds.tolist()), "+Inf"]
    cumulative = histogram.counts[series].cumsum().tolist()
    buckets: list[Any] = list(zip(bounds, cumulative, strict=True))
    for bucket, exemplar in exemplars.items():
        buckets[bucket] = (*buckets[bucket], _exemplar(exemplar))
    family.add_metric(labels, buckets, float(histogram.sums[series]))


def _exemplar(exemplar: telemetry.Exemplar) -> Exemplar:
    trace = {"trace_id": exemplar.trace.trace_id, "span_id": exemplar.trace.span_id}
    seconds, nanoseconds = divmod(exemplar.time_ns, 1_000_000_000)
    return Exemplar(trace, exemplar.score, Timestamp(seconds, nanoseconds))
