"""Families of metrics as tables: which series an engine adds, and the value of each.

A table becomes prometheus_client's family, or a template of the text that Prometheus reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple, TypeAlias

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from steerscope.export.instruments import Instrument, Kind
from steerscope.telemetry.histograms import HistogramArray
from steerscope.telemetry.totals import EngineTotals

Labels: TypeAlias = tuple[str, ...]
Samples: TypeAlias = Mapping[Labels, float]
Engines: TypeAlias = Sequence[tuple[Labels, EngineTotals]]
Bucket: TypeAlias = tuple[str, float] | tuple[str, float, Exemplar]

NO_ENGINE: Final[Labels] = ("", "")
"""Empty label values, which Prometheus takes for absent labels."""
INFINITE: Final[Labels] = ("+Inf",)


class Block(NamedTuple):
    """What one engine, or the hub itself, adds to a family."""

    owner: Labels
    series: tuple[Labels, ...]
    values: Sequence[float]
    """Of each series in turn its one value; or all its buckets, cumulative, its count, its sum."""
    exemplars: Mapping[int, Exemplar] = MappingProxyType({})
    """By the value's place."""


@dataclass(frozen=True, slots=True)
class Table:
    """A family whose series are known by engine."""

    instrument: Instrument
    blocks: Sequence[Block]
    le: tuple[str, ...] = ()
    """A histogram's bounds as the label has them, the infinite one included."""

    def metric(self) -> Metric:
        """The family as prometheus_client has it."""
        if self.instrument.kind is Kind.HISTOGRAM:
            return self._histograms()
        made = _numbers(self.instrument)
        for block in self.blocks:
            for labels, value in zip(block.series, block.values, strict=True):
                made.add_metric(labels, value)
        return made

    def _histograms(self) -> Metric:
        made, width = _histograms(self.instrument), len(self.le)
        for block in self.blocks:
            starts = range(0, len(block.values), width + 2)
            for labels, start in zip(block.series, starts, strict=True):
                buckets = [self._bucket(block, start, i) for i in range(width)]
                made.add_metric(labels, buckets, block.values[start + width + 1])
        return made

    def _bucket(self, block: Block, start: int, i: int) -> Bucket:
        told, exemplar = (self.le[i], block.values[start + i]), block.exemplars.get(start + i)
        return told if exemplar is None else (*told, exemplar)

    def template(self, series: Iterable[Labels]) -> str:
        """The samples of these series in either text format, with ``%s`` for each value."""
        lines = "".join(self._samples())
        return "".join(
            lines.format(*(escaped(label).replace("%", "%%") for label in labels))
            for labels in series
        )

    def _samples(self) -> Iterator[str]:
        """The lines of one series, with a place for each label."""
        name = self.instrument.name
        places = {label: f"{{{i}}}" for i, label in enumerate(self.instrument.labels)}
        if not self.le:
            yield _sample(name, places)
            return
        for bound in self.le:
            yield _sample(f"{name}_bucket", {**places, "le": bound})
        yield _sample(f"{name}_count", places)
        yield _sample(f"{name}_sum", places)


def single(instrument: Instrument, samples: Samples) -> Metric:
    """A family of counters or gauges that come from no engine."""
    family = _numbers(instrument)
    for labels, value in samples.items():
        family.add_metric(labels, value)
    return family


def by_engine(
    instrument: Instrument,
    engines: Engines,
    found: Callable[[EngineTotals], Samples],
    of_hub: Samples = MappingProxyType({}),
) -> Table:
    """Counters or gauges, by the labels that come after the engine's."""
    owners = [(NO_ENGINE, of_hub), *((engine, found(of)) for engine, of in engines)]
    blocks = [
        Block(owner, tuple((*owner, *labels) for labels in samples), list(samples.values()))
        for owner, samples in owners
    ]
    return Table(instrument, blocks)


def one_each(
    instrument: Instrument, engines: Engines, found: Callable[[EngineTotals], HistogramArray]
) -> Table:
    """One histogram of each engine."""
    arrays = [(engine, found(of)) for engine, of in engines]
    blocks = [Block(engine, (engine,), samples_of(array)) for engine, array in arrays]
    return Table(instrument, blocks, le_of(arrays[0][1]) if arrays else INFINITE)


def le_of(array: HistogramArray) -> tuple[str, ...]:
    """The array's bounds as the label ``le`` has them."""
    return (*map(floatToGoString, array.bounds.tolist()), *INFINITE)


def samples_of(array: HistogramArray) -> list[float]:
    """Of each series its buckets, cumulative, its count and its sum."""
    rows = zip(array.counts.cumsum(axis=1).tolist(), array.sums.tolist(), strict=True)
    return [value for buckets, total in rows for value in (*buckets, buckets[-1], total)]


def escaped(value: str) -> str:
    """A label's value as both text formats have it between quotes."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def _numbers(instrument: Instrument) -> CounterMetricFamily | GaugeMetricFamily:
    """An empty family of a counter or gauge, as prometheus_client has it."""
    is_counter = instrument.kind is Kind.COUNTER
    family = CounterMetricFamily if is_counter else GaugeMetricFamily
    return family(instrument.name, instrument.help, labels=instrument.labels)


def _histograms(instrument: Instrument) -> HistogramMetricFamily:
    """An empty family of a histogram."""
    return HistogramMetricFamily(instrument.name, instrument.help, labels=instrument.labels)


def _sample(name: str, labels: Mapping[str, str]) -> str:
    """Sorted by label, as prometheus_client has it."""
    shown = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{{{shown}}}}} %s\n"
