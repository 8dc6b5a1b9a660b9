"""docs/metrics.md: every metric, event and bucket, as the code has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from steerscope.export import instruments as names
from steerscope.export import otlp_events
from steerscope.export.budget import Row
from steerscope.export.instruments import INSTRUMENTS, Instrument, Kind

from steerscope_dashboards.promql import BOUNDS, number
from steerscope_dashboards.reference import cardinality, labels
from steerscope_dashboards.reference.examples import EXAMPLES
from steerscope_dashboards.reference.uses import Uses, uses

EVENT_ATTRIBUTES: Final[Mapping[str, str]] = MappingProxyType(
    {
        otlp_events.NAME: "the signal's name",
        otlp_events.SCORE: "its score, 0 to 1",
        otlp_events.LABEL: "the label of the band that the score is in",
        otlp_events.RESPONSE_ID: "the id that the client got; reports are found by it",
        otlp_events.REQUEST_MODEL: "the model as vLLM serves it",
        otlp_events.PROVIDER: "`vllm`",
        otlp_events.ENGINE: "vLLM's engine",
        otlp_events.SEQUENCE: "vLLM's own id, which tells several completions of a request apart",
        otlp_events.COMPLETE: "whether every token of the sequence was observed",
        otlp_events.POLICY: "what steered it; absent if nothing did",
        otlp_events.CANARY: "true, where the canary asked; absent where a user did",
    }
)

OTLP_KINDS: Final[Mapping[Kind, str]] = MappingProxyType(
    {
        Kind.COUNTER: "Sum, monotonic and cumulative",
        Kind.GAUGE: "Gauge",
        Kind.HISTOGRAM: "Histogram with explicit bounds, cumulative",
    }
)

_SOURCE: Final = "../plugin/steerscope/export/instruments.py"
_HEAD: Final = f"""\
# Metrics

Made by `make metrics-reference` from [`export/instruments.py`]({_SOURCE}) and from what is \
[generated for Grafana and Prometheus](../dashboards/generated); do not edit.
What they mean, and what to do about them: [operators-guide.md](operators-guide.md).

The hub tells them at `/metrics` on `hub.http_address`, as text or, to a scraper that asks, as \
OpenMetrics with exemplars. vLLM's own `/metrics` repeats them: scrape one of the two.
Counters count since the hub started. An engine's series are there from its first frame on, at \
zero; only what cannot be known is absent (drift on too few tokens, a canary's score before it \
has one).
No label is ever a request's id, a tenant or a text."""

_FULL: Final = names.ACTIVATION_SERIES // (2 * names.num_samples(names.ACTIVATION_TIERS[0]))
_CARDINALITY: Final = f"""\
## Cardinality

Catalog and settings decide how many series there are, and `steerscope check` counts them. A \
running hub adds only created policies, and features that requests edit in ways of their own. A \
launch is refused if one engine might come to more than `telemetry.max_series_per_engine` \
({cardinality.LIMIT}).

For catalogs of which every feature can be written and has a baseline of each phase, with \
{cardinality.NUM_SIGNALS} signals of three bands and {cardinality.NUM_POLICIES} policies of one \
edit each; *at most*: once `hub.max_policies` are in force and every feature was edited in every \
way. Above {_FULL} features activations have fewer buckets."""

_OTLP: Final = """\
## OpenTelemetry

With `otel` configured the same goes to a collector, under the same names (`_total` included), \
units and bounds. A label with an empty value is an absent attribute. The kinds:"""

_EVENT: Final = """\
### The event `{event}`

One for each score of each finished sequence, through the Logs API, severity INFO, in the trace \
of the client's `traceparent` if it sent one. It holds no text of prompts or answers.

| attribute | is |
| --- | --- |"""


def page(generated: Path) -> str:
    """The whole text; ``generated`` is the folder of dashboards and rules."""
    used = uses(generated)
    parts = [_HEAD, _overview()]
    parts += [_metric(instrument, used[instrument.name]) for instrument in INSTRUMENTS]
    parts += [_cardinality(), _OTLP, _otlp_kinds(), _events()]
    return "\n\n".join(parts) + "\n"


def _overview() -> str:
    rows = (
        (f"[`{i.name}`](#{i.name})", i.kind.value, f"`{i.unit}`", _plain(i.labels))
        for i in INSTRUMENTS
    )
    return _table(("metric", "type", "unit", "labels"), rows)


def _metric(instrument: Instrument, used: Uses) -> str:
    example = EXAMPLES[instrument]
    parts = [f"## {instrument.name}", instrument.help, "\n".join(_facts(instrument))]
    parts.append(f"For example, {example.answers}:")
    parts.append(f"```promql\n{example.vector}\n```")
    parts.append("\n".join(_used(used)))
    return "\n\n".join(parts)


def _facts(instrument: Instrument) -> Iterator[str]:
    yield f"- {instrument.kind}, unit `{instrument.unit}`"
    own = [label for label in instrument.labels if label not in names.ENGINE]
    if len(own) < len(instrument.labels):
        yield f"- {_plain(names.ENGINE)}: the engine that it comes from"
    for label in own:
        yield f"- `{label}`: {labels.values(instrument, label)}"
    if not instrument.labels:
        yield "- no labels: one series for each hub"
    if instrument.kind is Kind.HISTOGRAM:
        yield from _buckets(instrument)


def _buckets(instrument: Instrument) -> Iterator[str]:
    if instrument is names.FEATURE_ACTIVATION:
        for tier in names.ACTIVATION_TIERS[:-1]:
            most = names.ACTIVATION_SERIES // (2 * names.num_samples(tier))
            yield f"- buckets of a catalog of up to {most} features: {_bounds(tier)}"
        yield f"- buckets of a larger one: {_bounds(names.ACTIVATION_TIERS[-1])}"
        return
    more = ""
    if instrument is names.SIGNAL_SCORE:
        more = "; and the bounds of every signal's labels, so that alerts can sit on them"
    yield f"- buckets: {_bounds(BOUNDS[instrument])}{more}"


def _bounds(bounds: Iterable[float]) -> str:
    return ", ".join((*map(number, bounds), "+Inf"))


def _used(used: Uses) -> Iterator[str]:
    told = {
        "dashboards": ", ".join(used.boards),
        "recording rules": _plain(used.recordings),
        "alerts": ", ".join(f"[{a}](../dashboards/runbooks/{a}.md)" for a in used.alerts),
    }
    for kind, users in told.items():
        if users:
            yield f"- {kind}: {users}"
    if not any(told.values()):
        yield "No dashboard or rule that is shipped uses it."


def _cardinality() -> str:
    found = list(cardinality.sizes())
    columns = ("metric", *(f"{size.num_features} features" for size in found))
    rows = [_counted(rows) for rows in zip(*(size.declared.rows for size in found), strict=True)]
    rows.append(("**an engine**", *(f"**{size.declared.of_engine}**" for size in found)))
    rows.append(("an engine at most", *(str(size.most.of_engine) for size in found)))
    rows.append(("a hub beside them", *(str(size.declared.of_hub) for size in found)))
    rows.append(("a hub of four engines", *(str(size.declared.num_series(4)) for size in found)))
    return f"{_CARDINALITY}\n\n{_table(columns, [row for row in rows if row])}"


def _counted(rows: tuple[Row, ...]) -> tuple[str, ...]:
    """A line of the table; empty for what no engine has."""
    if not any(row.of_engine for row in rows):
        return ()
    return (f"`{rows[0].instrument.name}`", *(str(row.of_engine) for row in rows))


def _otlp_kinds() -> str:
    return _table(("here", "in OTLP"), ((kind.value, OTLP_KINDS[kind]) for kind in Kind))


def _events() -> str:
    rows = (f"| `{name}` | {told} |" for name, told in EVENT_ATTRIBUTES.items())
    return "\n".join((_EVENT.format(event=otlp_events.EVENT), *rows))


def _plain(written: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in written)


def _table(columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
