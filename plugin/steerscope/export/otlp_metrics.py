"""The families that Prometheus scrapes, as OTLP metrics: the same numbers under the same names.

One mapping, and no totals of its own. A label whose value is empty, which Prometheus takes for an
absent one, is absent here. Everything is cumulative since the hub started.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple, assert_never

from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client.core import Metric as Family
from prometheus_client.samples import Sample, Timestamp

from steerscope import __version__
from steerscope.export.instruments import INSTRUMENTS, Kind

SCOPE = InstrumentationScope("steerscope", __version__)
"""Who made the telemetry, to whoever gets it."""

_DECLARED = {i.name.removesuffix("_total"): i for i in INSTRUMENTS}
"""By the names of the families."""
_CUMULATIVE = AggregationTemporality.CUMULATIVE


class Period(NamedTuple):
    """When counting began and when it was read, in nanoseconds since the epoch."""

    start_ns: int
    end_ns: int


def metrics_data(families: Iterable[Family], resource: Resource, period: Period) -> MetricsData:
    """All that was collected, for an OTLP exporter; families without a sample are left out."""
    metrics = [_metric(family, period) for family in families if family.samples]
    scope = ScopeMetrics(SCOPE, metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(family: Family, period: Period) -> Metric:
    instrument = _DECLARED[family.name]
    data = _data(instrument.kind, family.samples, period)
    return Metric(instrument.name, instrument.help, instrument.unit, data)


def _data(kind: Kind, samples: Iterable[Sample], period: Period) -> Sum | Gauge | Histogram:
    match kind:
        case Kind.COUNTER:
            return Sum(_numbers(samples, period), _CUMULATIVE, is_monotonic=True)
        case Kind.GAUGE:
            return Gauge(_numbers(samples, period))
        case Kind.HISTOGRAM:
            return Histogram(list(_histograms(samples, period)), _CUMULATIVE)
        case _:
            assert_never(kind)


def _numbers(samples: Iterable[Sample], period: Period) -> list[NumberDataPoint]:
    return [NumberDataPoint(_attributes(s.labels), *period, s.value) for s in samples]


def _histograms(samples: Iterable[Sample], period: Period) -> Iterator[HistogramDataPoint]:
    """Each series is its buckets, from the lowest on, then its count, then its sum."""
    buckets: list[Sample] = []
    for sample in samples:
        if sample.name.endswith("_bucket"):
            buckets.append(sample)
        elif sample.name.endswith("_sum"):
            yield _histogram(buckets, sample, period)
            buckets = []


def _histogram(buckets: list[Sample], total: Sample, period: Period) -> HistogramDataPoint:
    cumulative = [0, *(int(bucket.value) for bucket in buckets)]
    return HistogramDataPoint(
        _attributes(total.labels),
        *period,
        count=cumulative[-1],
        sum=total.value,
        bucket_counts=[upper - lower for lower, upper in pairwise(cumulative)],
        explicit_bounds=[float(bucket.labels["le"]) for bucket in buckets[:-1]],
        min=None,  # type: ignore[arg-type]  # not kept; the exporters leave it out then
        max=None,  # type: ignore[arg-type]
        exemplars=[made for bucket in buckets if (made := _exemplar(bucket)) is not None],
    )


def _exemplar(bucket: Sample) -> Exemplar | None:
    found = bucket.exemplar
    if found is None:
        return None
    assert isinstance(found.timestamp, Timestamp)
    return Exemplar(
        {},
        found.value,
        found.timestamp.sec * 1_000_000_000 + found.timestamp.nsec,
        span_id=int(found.labels["span_id"], 16),
        trace_id=int(found.labels["trace_id"], 16),
    )


def _attributes(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if value}
