"""Features as research publishes them, one file for each format.

Everything is turned into a ``Source`` (see ``formats/source.py``); what does not fit the equation
exactly is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

from steerscope.catalog.formats import (
    circuit_tracer,
    directions,
    gemma_scope,
    linear_probe,
    pickles,
    repeng,
    saelens,
    sparsify,
)
from steerscope.catalog.formats.source import Columns, Options, Source
from steerscope.errors import CatalogError

__all__ = ["FORMATS", "Columns", "Format", "Options", "Source", "open_source"]


class Format(NamedTuple):
    """How to open a path, and how its features are named: ``14`` may be a latent or a layer."""

    open: Callable[[Path, Options], AbstractContextManager[Source]]
    by_layer: bool = False


FORMATS: Mapping[str, Format] = {
    "saelens": Format(saelens.open_folder),
    "gemma-scope": Format(gemma_scope.open_file),
    "sparsify": Format(sparsify.open_folder),
    "circuit-tracer": Format(circuit_tracer.open_layer),
    "linear-probe": Format(linear_probe.open_file),
    "repeng": Format(repeng.open_layer, by_layer=True),
    "directions": Format(directions.open_file),
}


@contextmanager
def open_source(format: str, path: Path, options: Options | None = None) -> Iterator[Source]:
    """Open what lies at ``path``; raise ``CatalogError`` naming what cannot be exact, and why."""
    if format not in FORMATS:
        raise CatalogError(f"no format {format!r}; there are {', '.join(FORMATS)}")
    if not path.exists():
        raise CatalogError(f"{path}: no such file or folder")
    pickles.refuse(path)
    with FORMATS[format].open(path, options or Options()) as source:
        yield source
