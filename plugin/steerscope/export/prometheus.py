"""The Prometheus exporter: a collector that reads the totals when it is scraped.

Series of a known engine are there from its first frame on, at zero, for everything that
the catalog declares and policies may do: rules never see an absent series. ``budget.py`` counts
them beforehand.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Timestamp

from steerscope import __version__
from steerscope.catalog.model import ModelMatch, Signal
from steerscope.catalog.store import Catalog
from steerscope.export import instruments as names
from steerscope.export.tables import (
    INFINITE,
    Block,
    Engines,
    Samples,
    Table,
    by_engine,
    le_of,
    one_each,
    samples_of,
    single,
)
from steerscope.steering.admission import RESERVED_NAMES
from steerscope.steering.interventions import Policy
from steerscope.steering.rules import OverrideMode
from steerscope.telemetry import exemplars as telemetry
from steerscope.telemetry.columns import BoolArray, Columns
from steerscope.telemetry.exemplars import Exemplars
from steerscope.telemetry.reductions import Missing
from steerscope.telemetry.totals import (
    OPS,
    PHASES,
    CanaryOutcome,
    CanaryTotals,
    EngineTotals,
    FrameLoss,
    HubTotals,
    Outcome,
)
from steerscope.telemetry.tracks import EngineKey, Unobserved

NO_OVERRIDE = "none"
OVERRIDES = (NO_OVERRIDE, *OverrideMode)
UNOBSERVED_REASONS = tuple(r for r in Unobserved if r is not Unobserved.OVER_LIMIT)
ENGINE_LOSSES = (FrameLoss.NOT_SENT, FrameLoss.LOST, FrameLoss.SHED, FrameLoss.CATALOG_MISMATCH)
HUB_LOSSES = (FrameLoss.MALFORMED, FrameLoss.TOO_MANY_ENGINES)
FRONT_END_OUTCOMES = (Outcome.ADMITTED, Outcome.REJECTED, Outcome.OVERRULED)

_DRIFT_DIGITS = 6
"""Behind the point: more is noise, and each digit is told of every feature."""


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

    ``policies`` tells those that there are, ``override`` the mode of the override, or ``none``.
    """

    def __init__(
        self,
        catalog: Catalog,
        totals: Totals,
        hub: HubTotals,
        policies: Callable[[], Iterable[Policy]],
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
        yield from (table.metric() for table in self.tables())
        yield from self.of_hub()

    def tables(self) -> Iterator[Table]:
        """The families that grow with engines, features and policies."""
        engines = [((k.model_name, k.engine), t) for k, t in self._totals.engines.items()]
        policies = tuple(self._policies())
        yield self._scores(engines)
        yield by_engine(names.SIGNAL_REQUESTS, engines, _labels)
        yield from _features(engines)
        yield from _tokens(engines)
        yield self._steering_requests(engines, policies)
        yield _steered(engines, policies)
        yield one_each(names.STEERING_DOSE, engines, lambda of: of.dose)
        yield from self._frames(engines)
        yield from _drift(engines)

    def of_hub(self) -> Iterator[Metric]:
        """The other families."""
        hub, in_force = self._hub, self._override()
        yield single(names.HUB_CPU, {(): time.process_time()})
        yield single(names.HUB_RESTARTS, {(): hub.restarts})
        yield single(names.OTEL_DROPPED, {(s,): n for s, n in sorted(hub.undelivered.items())})
        yield single(names.PROPAGATION_TIMEOUTS, {(): hub.propagation_timeouts})
        modes: Samples = {(mode,): float(mode == in_force) for mode in OVERRIDES}
        yield single(names.STEERING_OVERRIDE, modes)
        yield from _canaries(hub.canaries)
        document = self._catalog.document
        catalog = (document.name, document.version, self._catalog.digest)
        yield single(names.BUILD_INFO, {(__version__, *catalog, self._model_match): 1})

    def _scores(self, engines: Engines) -> Table:
        blocks, le = [], INFINITE
        for engine, totals in engines:
            of, le = totals.score, le_of(totals.score)
            signals = [signal.name for signal in totals.signals]
            exemplars = {
                series * (len(le) + 2) + bucket: _exemplar(exemplar)
                for series, signal in enumerate(signals)
                for bucket, exemplar in self._exemplars.of(EngineKey(*engine), signal).items()
            }
            of_signals = tuple((*engine, signal) for signal in signals)
            blocks.append(Block(engine, of_signals, samples_of(of), exemplars))
        return Table(names.SIGNAL_SCORE, blocks, le)

    def _steering_requests(self, engines: Engines, policies: Sequence[Policy]) -> Table:
        known = [*(policy.name for policy in policies), *sorted(RESERVED_NAMES)]
        asked: Samples = {
            (policy, outcome): self._hub.outcomes[policy, outcome]
            for policy in known
            for outcome in FRONT_END_OUTCOMES
        }

        def applied(of: EngineTotals) -> Samples:
            return {(policy, Outcome.APPLIED): of.applied[policy] for policy in known}

        return by_engine(names.STEERING_REQUESTS, engines, applied, asked)

    def _frames(self, engines: Engines) -> Iterator[Table]:
        def lost(of: EngineTotals) -> Samples:
            return {(reason,): of.frames_lost[reason] for reason in ENGINE_LOSSES}

        unclear: Samples = {(reason,): self._hub.frames_lost[reason] for reason in HUB_LOSSES}
        yield by_engine(names.FRAMES, engines, lambda of: {(): of.frames})
        yield by_engine(names.FRAMES_DROPPED, engines, lost, unclear)
        yield one_each(names.READOUT_LAG, engines, lambda of: of.lag)
        yield one_each(names.STEP_OVERHEAD, engines, lambda of: of.overhead)
        now, heard = time.monotonic_ns(), [(key, of) for key, of in engines if of.frames]
        # Of the others all frames were refused, and none counted.
        yield by_engine(
            names.ENGINE_LAST_SEEN,
            heard,
            lambda of: {(): max(now - of.last_seen_ns, 0) * 1e-9},
        )


def signal_labels(signal: Signal) -> tuple[str, ...]:
    """Each label that a sequence may get."""
    return tuple(dict.fromkeys((*(band.label for band in signal.labels), *Missing)))


def steered_pairs(columns: Columns, policies: Iterable[Policy]) -> BoolArray:
    """Which features the policies edit, and how: bool [features, ``OPS``]."""
    edited: BoolArray = np.zeros((len(columns.features), len(OPS)), np.bool_)
    for edit in (edit for policy in policies for edit in policy.interventions):
        if (column := columns.index.get(edit.feature)) is not None:
            edited[column, OPS.index(edit.op)] = columns.steerable[column]
    return edited


def _still(totals: EngineTotals) -> EngineTotals:
    """A copy of the numbers; what they are of never changes, and is shared."""
    return copy.deepcopy(totals, {id(o): o for o in (totals.columns, totals.signals)})


def _labels(of: EngineTotals) -> Samples:
    return {
        (signal.name, label): of.labels[signal.name, label]
        for signal in of.signals
        for label in signal_labels(signal)
    }


def _features(engines: Engines) -> Iterator[Table]:
    activation, active, le = [], [], INFINITE
    for engine, of in engines:
        series = tuple((*engine, name, phase) for name in of.columns.features for phase in PHASES)
        activation.append(Block(engine, series, samples_of(of.activation)))
        active.append(Block(engine, series, of.active.ravel().tolist()))
        le = le_of(of.activation)
    yield Table(names.FEATURE_ACTIVATION, activation, le)
    yield Table(names.FEATURE_ACTIVE_TOKENS, active)


def _tokens(engines: Engines) -> Iterator[Table]:
    def observed(of: EngineTotals) -> Samples:
        return {(name,): int(of.observed[phase]) for phase, name in enumerate(PHASES)}

    def unobserved(of: EngineTotals) -> Samples:
        return {(reason,): of.unobserved[reason] for reason in UNOBSERVED_REASONS}

    yield by_engine(names.OBSERVED_TOKENS, engines, observed)
    yield by_engine(names.CACHED_TOKENS, engines, lambda of: {(): of.cached})
    yield by_engine(names.UNOBSERVED_TOKENS, engines, unobserved)


def _steered(engines: Engines, policies: Sequence[Policy]) -> Table:
    """What policies would do, and whatever was ever done."""
    blocks = []
    for engine, of in engines:
        there = steered_pairs(of.columns, policies) | (of.steered > 0)
        features = of.columns.features
        series = tuple((*engine, features[f], OPS[o]) for f, o in np.argwhere(there).tolist())
        blocks.append(Block(engine, series, of.steered[there].tolist()))
    return Table(names.STEERED_TOKENS, blocks)


def _drift(engines: Engines) -> Iterator[Table]:
    psi, ks, tokens = [], [], []
    for engine, of in engines:
        every = list(of.drift.measure(time.monotonic()))
        series = tuple((*engine, found.feature, found.phase) for found in every)
        tokens.append(Block(engine, series, [found.num_tokens for found in every]))
        known = tuple(s for s, found in zip(series, every, strict=True) if found.psi is not None)
        psi.append(Block(engine, known, _rounded(found.psi for found in every)))
        ks.append(Block(engine, known, _rounded(found.ks for found in every)))
    yield Table(names.FEATURE_DRIFT_PSI, psi)
    yield Table(names.FEATURE_DRIFT_KS, ks)
    yield Table(names.FEATURE_DRIFT_TOKENS, tokens)


def _rounded(values: Iterable[float | None]) -> list[float]:
    known = np.array([value for value in values if value is not None], np.float64)
    rounded: list[float] = known.round(_DRIFT_DIGITS).tolist()
    return rounded


def _canaries(canaries: Mapping[str, CanaryTotals]) -> Iterator[Metric]:
    runs: Samples = {
        (name, outcome): canary.runs[outcome]
        for name, canary in canaries.items()
        for outcome in CanaryOutcome
    }
    scores: Samples = {
        (name, signal): score
        for name, canary in canaries.items()
        for signal, score in canary.scores.items()
    }
    yield single(names.CANARY_RUNS, runs)
    last: Samples = {(name,): canary.last_success for name, canary in canaries.items()}
    yield single(names.CANARY_LAST_SUCCESS, last)
    yield single(names.CANARY_SCORE, scores)


def _exemplar(exemplar: telemetry.Exemplar) -> Exemplar:
    trace = {"trace_id": exemplar.trace.trace_id, "span_id": exemplar.trace.span_id}
    seconds, nanoseconds = divmod(exemplar.time_ns, 1_000_000_000)
    return Exemplar(trace, exemplar.score, Timestamp(seconds, nanoseconds))
