"""Plain directions: a safetensors file, each of whose tensors [D] (or [1, D]) is one.

The site and layer are said by the caller, or in the file's metadata under those keys. A direction
can be read (how much of it the stream holds) and written (``add a`` adds ``a`` times the vector).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from steerscope.catalog.formats import hooks
from steerscope.catalog.formats.source import Options, Source, directions
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.catalog.tensors import FloatArray, TensorFile
from steerscope.errors import CatalogError


@contextmanager
def open_file(path: Path, options: Options) -> Iterator[Source]:
    """All directions of the file, named as its tensors are."""
    with TensorFile(path) as tensors:
        names = tuple(sorted(tensors.entries))
        place = told(tensors, options)
        vectors = [vector(tensors, name) for name in names]
    widths = sorted({v.size for v in vectors})
    if len(widths) != 1:
        raise CatalogError(f"{path}: directions of widths {widths}, expected one width")
    try:
        weights = directions(np.stack(vectors))
    except CatalogError as error:
        raise CatalogError(f"{path}: {error}") from None
    yield Source(
        kind=FeatureKind.DIRECTION,
        site=place.site,
        layer=place.layer,
        d_in=widths[0],
        d_sae=len(names),
        activation=Activation.IDENTITY,
        weights=weights,
        names=names,
    )


def vector(tensors: TensorFile, name: str) -> FloatArray:
    """A tensor that is one vector, [D] or [1, D]."""
    shape = tensors.entry(name).shape
    if not shape or math.prod(shape) != shape[-1]:
        raise CatalogError(f"{tensors.path}: {name!r} is {list(shape)}, expected one vector")
    return tensors.read(name).reshape(-1)


def told(tensors: TensorFile, options: Options) -> hooks.Place:
    """Site and layer by the file's metadata or the caller."""
    site, layer = tensors.metadata.get("site"), tensors.metadata.get("layer")
    try:
        return hooks.Place(
            hooks.agreed("site", Site(site) if site else None, options.site),
            hooks.agreed("layer", int(layer) if layer else None, options.layer),
        )
    except (ValueError, TypeError, OverflowError, CatalogError) as error:
        raise CatalogError(f"{tensors.path}: {error}") from None
