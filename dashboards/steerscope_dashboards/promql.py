"""PromQL made of instruments: a wrong label, kind or bucket bound fails while it is written.

A ``Vector`` knows which labels it carries, so that no ``by`` can name one that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, NamedTuple

from prometheus_client.utils import floatToGoString
from steerscope.export import instruments as names
from steerscope.export.instruments import Instrument, Kind

TARGET: Final = ("job", "instance")
"""Labels that Prometheus itself puts on whatever it scrapes."""

BOUNDS: Final[Mapping[Instrument, tuple[float, ...]]] = MappingProxyType(
    {
        names.SIGNAL_SCORE: names.SCORE_BOUNDS,
        names.FEATURE_ACTIVATION: names.ACTIVATION_TIERS[-1],
        names.STEERING_DOSE: names.DOSE_BOUNDS,
        names.READOUT_LAG: names.LAG_BOUNDS,
        names.STEP_OVERHEAD: names.OVERHEAD_BOUNDS,
    }
)
"""Bucket bounds that every catalog has."""

WITH_EXEMPLARS: Final = (names.SIGNAL_SCORE,)
"""Histograms whose buckets carry the trace of a request that fell into them."""


class ExpressionError(ValueError):
    """An expression asks an instrument for what it does not have."""


class Matcher(NamedTuple):
    """One condition on a label: ``label operator "value"``."""

    label: str
    operator: str
    value: str

    def __str__(self) -> str:
        escaped = self.value.replace("\\", "\\\\").replace('"', '\\"')
        return f'{self.label}{self.operator}"{escaped}"'


def equals(label: str, value: str) -> Matcher:
    """``label="value"``."""
    return Matcher(label, "=", value)


def none_of(label: str, *values: str) -> Matcher:
    """``label!~"a|b"``; the values are slugs, which mean themselves in a regular expression."""
    return Matcher(label, "!~", "|".join(values))


@dataclass(frozen=True, slots=True)
class Vector:
    """An instant vector: its text, and the labels that its samples carry."""

    text: str
    labels: frozenset[str]

    def __str__(self) -> str:
        return self.text

    def sum(self, *by: str) -> Vector:
        """The sum by these labels."""
        return self._aggregate("sum", by)

    def min(self, *by: str) -> Vector:
        """The least by these labels."""
        return self._aggregate("min", by)

    def max(self, *by: str) -> Vector:
        """The greatest by these labels."""
        return self._aggregate("max", by)

    def over(self, whole: Vector) -> Vector:
        """The quotient; both sides must carry the same labels, or none would match."""
        if self.labels != whole.labels:
            raise ExpressionError(f"{sorted(self.labels)} / {sorted(whole.labels)}: {self}")
        return Vector(f"{self._operand()} / {whole._operand()}", self.labels)

    def plus(self, other: Vector) -> Vector:
        """The sum of two vectors with the same labels."""
        if self.labels != other.labels:
            raise ExpressionError(f"{sorted(self.labels)} + {sorted(other.labels)}: {self}")
        return Vector(f"({self} + {other})", self.labels)

    def above(self, bound: float) -> Vector:
        """1 for each sample above the bound, 0 for the others."""
        return Vector(f"({self} > bool {number(bound)})", self.labels)

    def given(self, other: Vector, least: float) -> Vector:
        """The samples whose namesakes in the other are at least so many."""
        if self.labels != other.labels:
            raise ExpressionError(f"{sorted(self.labels)} and {sorted(other.labels)}: {self}")
        return Vector(f"({self} and {other} >= {number(least)})", self.labels)

    def at_most(self, bound: float) -> Vector:
        """Larger values are taken for the bound."""
        return Vector(f"clamp_max({self}, {number(bound)})", self.labels)

    def largest(self, count: int) -> Vector:
        """So many samples, the largest."""
        return Vector(f"topk({count}, {self})", self.labels)

    def complement(self) -> Vector:
        """``1 - self``, of a share."""
        return Vector(f"1 - {self._operand()}", self.labels)

    def divided(self, by: float) -> Vector:
        """Divided by a number."""
        return Vector(f"{self._operand()} / {number(by)}", self.labels)

    def _aggregate(self, function: str, by: tuple[str, ...]) -> Vector:
        if missing := set(by) - self.labels:
            raise ExpressionError(f"{self} has no label {', '.join(sorted(missing))}")
        grouping = f" by ({', '.join(by)})" if by else ""
        return Vector(f"{function}{grouping} ({self})", frozenset(by))

    def _operand(self) -> str:
        # `x / y` inside another binary operation needs its own parentheses.
        return f"({self})" if " / " in self.text or " - " in self.text else self.text


def current(gauge: Instrument, *matchers: Matcher) -> Vector:
    """A gauge as it is."""
    _check_kind(gauge, Kind.GAUGE)
    return _select(gauge, "", matchers)


def age(timestamp: Instrument, *matchers: Matcher) -> Vector:
    """Seconds since a gauge's time."""
    return Vector(f"time() - {current(timestamp, *matchers)}", current(timestamp).labels)


def rate(counter: Instrument, window: str, *matchers: Matcher) -> Vector:
    """A counter's increase per second."""
    _check_kind(counter, Kind.COUNTER)
    return _over("rate", _select(counter, "", matchers), window)


def increase(counter: Instrument, window: str, *matchers: Matcher) -> Vector:
    """A counter's increase within the window."""
    _check_kind(counter, Kind.COUNTER)
    return _over("increase", _select(counter, "", matchers), window)


def observations(histogram: Instrument, window: str, *matchers: Matcher) -> Vector:
    """How many values a second."""
    _check_kind(histogram, Kind.HISTOGRAM)
    return _over("rate", _select(histogram, "_count", matchers), window)


def total(histogram: Instrument, window: str, *matchers: Matcher) -> Vector:
    """What the values add up to, per second."""
    _check_kind(histogram, Kind.HISTOGRAM)
    return _over("rate", _select(histogram, "_sum", matchers), window)


def buckets(histogram: Instrument, window: str, *matchers: Matcher) -> Vector:
    """Its cumulative buckets per second, with their ``le``."""
    _check_kind(histogram, Kind.HISTOGRAM)
    selected = _select(histogram, "_bucket", matchers)
    return _over("rate", Vector(selected.text, selected.labels | {"le"}), window)


def above(
    histogram: Instrument, bound: float, window: str, *matchers: Matcher, by: tuple[str, ...]
) -> Vector:
    """The share of values above one of the histogram's bounds: exact, not interpolated."""
    if bound not in BOUNDS[histogram]:
        raise ExpressionError(f"{histogram.name}: {bound} is not a bucket bound")
    le = equals("le", floatToGoString(bound))  # type: ignore[no-untyped-call]
    selected = _select(histogram, "_bucket", (*matchers, le), extra=("le",))
    below = _over("rate", selected, window)
    return below.sum(*by).over(observations(histogram, window, *matchers).sum(*by)).complement()


def quantile(q: float, histogram: Vector, *by: str) -> Vector:
    """A quantile of summed buckets, interpolated within one of them."""
    summed = histogram.sum(*by, "le")
    return Vector(f"histogram_quantile({number(q)}, {summed})", frozenset(by))


def is_absent(gauge: Instrument) -> Vector:
    """One sample where there is no series at all, else none."""
    return Vector(f"absent({gauge.name})", frozenset())


def foreign(metric: str, labels: tuple[str, ...]) -> Vector:
    """A metric of somebody else's, vLLM's own say."""
    return Vector(metric, frozenset({*labels, *TARGET}))


def number(value: float) -> str:
    """A number as PromQL and a reader like it."""
    return f"{value:.10g}"


def _select(
    instrument: Instrument,
    suffix: str,
    matchers: tuple[Matcher, ...],
    extra: tuple[str, ...] = (),
) -> Vector:
    labels = frozenset({*instrument.labels, *TARGET})
    for matcher in matchers:
        if matcher.label not in labels | set(extra):
            raise ExpressionError(f"{instrument.name} has no label {matcher.label}")
    selector = ", ".join(map(str, matchers))
    return Vector(f"{instrument.name}{suffix}" + (f"{{{selector}}}" if selector else ""), labels)


def _over(function: str, selected: Vector, window: str) -> Vector:
    return Vector(f"{function}({selected}[{window}])", selected.labels)


def _check_kind(instrument: Instrument, kind: Kind) -> None:
    if instrument.kind is not kind:
        raise ExpressionError(f"{instrument.name} is a {instrument.kind}, not a {kind}")
