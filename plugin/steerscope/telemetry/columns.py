"""A frame's sites as blocks of the catalog's columns.

Shapes: T tokens of the frame, F features of the whole catalog in layer order (the
columns), C of them that a signal reads, S sites; a block holds adjacent sites, so its
columns are adjacent too.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from steerscope.catalog.model import Signal
from steerscope.catalog.store import Catalog
from steerscope.telemetry.frames import SiteActivations, acts_TF, edits

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Edits:
    """What steering did to a block, made dense: zero where nothing was edited."""

    deltas_TF: FloatArray
    doses_TS: FloatArray


@dataclass(frozen=True, slots=True)
class Block:
    """What one frame says about adjacent sites."""

    sites: slice
    columns: slice
    acts_TF: FloatArray
    finite_T: BoolArray | None
    """Tokens without NaN or infinity; None when that is all of them."""
    edits: Edits | None
    is_whole: bool
    """Whether these are all sites."""

    def rows(self, of_T: BoolArray) -> FloatArray:
        """The activations of some tokens; not a copy if those are all."""
        return self.acts_TF if of_T.all() else self.acts_TF[of_T]

    def plain_T(self) -> BoolArray:
        """Tokens that are finite and were not changed (bool [T])."""
        plain_T = self.finite_T
        if plain_T is None:
            plain_T = np.ones(len(self.acts_TF), np.bool_)
        if self.edits is not None:
            plain_T = plain_T & ~self.edits.deltas_TF.any(axis=1)
        return plain_T


class Columns:
    """Where each site and feature of a catalog has its columns. Immutable."""

    def __init__(self, catalog: Catalog) -> None:
        self.features = tuple(f.name for site in catalog.sites.values() for f in site)
        self.steerable = tuple(catalog.vectors[n].W_dec is not None for n in self.features)
        self.index = {name: column for column, name in enumerate(self.features)}
        self.site_names = tuple(str(key) for key in catalog.sites)
        self._widths = tuple(len(features) for features in catalog.sites.values())
        self._offsets = (0, *accumulate(self._widths))
        self._site_index = {name: i for i, name in enumerate(self.site_names)}
        self.site_of = tuple(s for s, width in enumerate(self._widths) for _ in range(width))
        self.read_by_signals = tuple(sorted({self.index[n] for n in _read_by(catalog.signals)}))
        """The columns [C] that some signal reads, in ascending order."""
        self.place_of = {column: place for place, column in enumerate(self.read_by_signals)}

    def blocks(self, sites: Iterable[SiteActivations]) -> Iterator[Block]:
        """The sites as blocks; raise ``ValueError`` on one that the catalog does not have."""
        run: list[SiteActivations] = []
        start = 0
        for index, site in sorted(((self._index(s), s) for s in sites), key=lambda pair: pair[0]):
            if run and index != start + len(run):
                yield self._block(start, run)
                run = []
            start = start if run else index
            run.append(site)
        if run:
            yield self._block(start, run)

    def signal_columns(self, columns: slice) -> tuple[slice, list[int]]:
        """Those of a block's columns that signals read: places in [C], and in the block."""
        first = bisect_left(self.read_by_signals, columns.start)
        last = bisect_left(self.read_by_signals, columns.stop)
        inside = [column - columns.start for column in self.read_by_signals[first:last]]
        return slice(first, last), inside

    def _index(self, site: SiteActivations) -> int:
        index = self._site_index.get(site.site)
        if index is None or site.num_features != self._widths[index]:
            raise ValueError(f"no site {site.site!r} of {site.num_features} features")
        return index

    def _block(self, start: int, run: list[SiteActivations]) -> Block:
        acts = np.concatenate([acts_TF(site) for site in run], axis=1)
        finite = np.isfinite(acts)
        stop = start + len(run)
        return Block(
            sites=slice(start, stop),
            columns=slice(self._offsets[start], self._offsets[stop]),
            acts_TF=acts,
            finite_T=None if finite.all() else finite.all(axis=1),
            edits=_edits(run, len(acts)) if any(site.edit_tokens for site in run) else None,
            is_whole=len(run) == len(self.site_names),
        )


def _read_by(signals: Iterable[Signal]) -> Iterator[str]:
    for signal in signals:
        for term in signal.terms:
            yield term.feature
            if term.span is not None:
                yield term.span.feature


def _edits(run: list[SiteActivations], num_tokens: int) -> Edits:
    deltas = [np.zeros((num_tokens, site.num_features), np.float32) for site in run]
    doses_TS = np.zeros((num_tokens, len(run)), np.float32)
    for s, site in enumerate(run):
        tokens, site_deltas, site_doses = edits(site)
        deltas[s][tokens] = np.nan_to_num(site_deltas)
        doses_TS[tokens, s] = np.nan_to_num(site_doses)
    return Edits(np.concatenate(deltas, axis=1), doses_TS)


AnyArray = TypeVar("AnyArray", BoolArray, FloatArray)

_FIRST_ROWS = 64


def grown(
    rows: AnyArray, num_rows: int, take: Callable[[int], bool] = lambda num_bytes: True
) -> AnyArray:
    """``rows`` with room for ``num_rows`` of them: doubled when short, new ones zero.

    Or as they are, if ``take`` does not grant the bytes.
    """
    if num_rows <= len(rows):
        return rows
    shape = (max(_FIRST_ROWS, 2 * len(rows), num_rows), *rows.shape[1:])
    if not take(math.prod(shape) * rows.itemsize - rows.nbytes):
        return rows
    larger = np.zeros(shape, rows.dtype)
    larger[: len(rows)] = rows
    return larger
