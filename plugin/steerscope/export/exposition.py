"""The metrics page: what engines are counted by from templates, the rest by prometheus_client.

What a series is called does not change from scrape to scrape: a template is the text of all
samples that one engine adds to a family, with a place for each value. prometheus_client makes
every line anew, and takes many times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, Protocol, TypeAlias

from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.exposition import DOTS, VALUES
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from steerscope.export.tables import Block, Labels, Table, escaped

Encode: TypeAlias = Callable[[Collector], bytes]

_END: Final = "# EOF\n"
_RENAMING: Final = tuple(f"escaping={scheme}" for scheme in (DOTS, VALUES))
"""Ways to write names in which ours change, too. Who asks for them gets the page slowly."""


class Collected(Protocol):
    """Where the families come from."""

    def tables(self) -> Iterable[Table]:
        """Those that grow with engines, features and policies."""

    def of_hub(self) -> Iterable[Metric]:
        """The others."""


class MetricsPage:
    """Writes the page; belongs to the hub's loop."""

    def __init__(self, collected: Collected) -> None:
        self._collected = collected
        self._templates: dict[tuple[str, Labels], tuple[tuple[Labels, ...], str]] = {}
        """By metric and owner, as long as the series are these."""

    def text(self, accept: str) -> bytes:
        """The page in the format that the HTTP header ``accept`` names."""
        encode, content_type = choose_encoder(accept)
        tables, of_hub = self._collected.tables(), self._collected.of_hub()
        if any(way in content_type for way in _RENAMING):
            return _encoded(encode, (*(table.metric() for table in tables), *of_hub))
        with_exemplars = content_type.startswith("application/openmetrics-text")
        parts = []
        for table in tables:
            parts.append(_heading(encode, table))
            parts += [self._written(table, block, with_exemplars) for block in table.blocks]
        return "".join(parts).encode() + _encoded(encode, of_hub)

    def _written(self, table: Table, block: Block, with_exemplars: bool) -> str:
        values: list[float | str] = [*block.values]
        if with_exemplars:
            for place, exemplar in block.exemplars.items():
                values[place] = f"{values[place]}{_shown(exemplar)}"
        return self._template(table, block) % tuple(values)

    def _template(self, table: Table, block: Block) -> str:
        key = table.instrument.name, block.owner
        known = self._templates.get(key)
        if known is None or known[0] != block.series:
            known = block.series, table.template(block.series)
            self._templates[key] = known
        return known[1]


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _encoded(encode: Encode, families: Iterable[Metric]) -> bytes:
    return encode(_Families(families))


def _heading(encode: Encode, table: Table) -> str:
    """The lines before the samples, which differ by format."""
    empty = Table(table.instrument, ()).metric()
    return _encoded(encode, [empty]).decode().removesuffix(_END)


def _shown(exemplar: Exemplar) -> str:
    """As OpenMetrics has it, behind the value."""
    labels = ",".join(f'{name}="{escaped(value)}"' for name, value in exemplar.labels.items())
    return f" # {{{labels}}} {exemplar.value} {exemplar.timestamp}"
