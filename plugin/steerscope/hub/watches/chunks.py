"""What one frame brought, as a few tokens of one completion at a time.

Shapes: T tokens of a frame, F features of a block; N rows of any such array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from steerscope.telemetry.columns import Block, Columns, Edits, FloatArray
from steerscope.telemetry.requests import BlockNews, Share, Step
from steerscope.telemetry.tracks import RequestTrack

MAX_VALUES = 32_768
"""Activations in one message, at most: also as runs of one token below what gRPC clients take."""


class Run(NamedTuple):
    """Adjacent observed tokens of one feature; no ``deltas`` if none of them was changed."""

    feature: str
    first_position: int
    activations: list[float]
    deltas: list[float]


class Chunk(NamedTuple):
    """Rows ``first`` to ``last`` of a frame's blocks, the first one at ``position``.

    It refers to the frame's arrays and copies nothing; to a track it does not refer, so that
    it keeps alive nothing that the ledger has forgotten.
    """

    external_id: str
    request_id: str
    num_prompt_tokens: int
    blocks: Sequence[Block] = ()
    first: int = 0
    last: int = 0
    position: int = 0
    is_finished: bool = False


def tokens_per_message(columns: Columns) -> int:
    """How many tokens of all features go into one message."""
    return max(MAX_VALUES // max(len(columns.features), 1), 1)


def num_chunks(step: Step, max_tokens: int) -> int:
    """How many ``chunks`` would make of the step, without making them."""
    count = 0
    for shares, blocks in _together(step.blocks):
        if len(blocks[0].acts_TF) <= max_tokens:
            count += len(shares)
        else:
            count += sum(len(_starts(share, max_tokens)) for share in shares)
    return count


def chunks(step: Step, max_tokens: int) -> Iterator[tuple[Chunk, int]]:
    """The tokens of a step, at most ``max_tokens`` at a time, and how many bytes each keeps.

    They are its part of the arrays, of which rows of requests not known here are kept as well.
    """
    for shares, blocks in _together(step.blocks):
        found = [chunk for share in shares for chunk in _pieces(share, blocks, max_tokens)]
        num_bytes = sum(map(_num_bytes, blocks)) // max(len(found), 1)
        yield from ((chunk, num_bytes) for chunk in found)


def of_track(track: RequestTrack) -> Chunk:
    """No tokens yet of that completion."""
    start = track.start
    return Chunk(start.external_id, start.request_id, start.num_prompt_tokens)


def runs(chunk: Chunk, columns: Columns, wanted: frozenset[str]) -> Iterator[Run]:
    """The chunk's runs of the features wanted, in the order of the catalog's columns."""
    for block in chunk.blocks:
        names = enumerate(columns.features[block.columns])
        named = {column: name for column, name in names if name in wanted}
        spans = list(_observed(block, chunk.first, chunk.last))
        deltas = None if block.edits is None else functools.partial(_deltas, block.edits)
        yield from runs_of(named, spans, block.acts_TF, deltas, shift=chunk.position - chunk.first)


def runs_of(
    named: Mapping[int, str],
    spans: Iterable[tuple[int, int]],
    acts_NF: FloatArray,
    deltas: Callable[[int, int, int], FloatArray | None] | None,
    shift: int = 0,
) -> Iterator[Run]:
    """The runs of columns of one array.

    Args:
        named: the features wanted, by column.
        spans: the rows observed, from one to before another.
        acts_NF: the array.
        deltas: the changes from one row to before another of one column, if there were any.
        shift: from a row to its position.
    """
    columns = list(named)
    read = [(first, last, acts_NF[first:last, columns].T.tolist()) for first, last in spans]
    for i, (column, name) in enumerate(named.items()):
        for first, last, acts_F in read:
            changes = deltas(first, last, column) if deltas is not None else None
            changed = [] if changes is None else changes.tolist()
            yield Run(name, first + shift, acts_F[i], changed)


def _together(news: Iterable[BlockNews]) -> Iterator[tuple[list[Share], list[Block]]]:
    """The blocks that are of the same tokens."""
    for _, same in groupby(news, key=lambda each: id(each.shares)):
        found = list(same)
        yield found[0].shares, [each.block for each in found]


def _pieces(share: Share, blocks: Sequence[Block], max_tokens: int) -> Iterator[Chunk]:
    start, shift = share.track.start, share.position - share.first
    whose = (start.external_id, start.request_id, start.num_prompt_tokens, blocks)
    for first in _starts(share, max_tokens):
        yield Chunk(*whose, first, min(first + max_tokens, share.last), first + shift)


def _num_bytes(block: Block) -> int:
    return block.acts_TF.nbytes + (0 if block.edits is None else block.edits.deltas_TF.nbytes)


def _starts(share: Share, max_tokens: int) -> range:
    return range(share.first, max(share.last, share.first + 1), max_tokens)


def _observed(block: Block, first: int, last: int) -> Iterator[tuple[int, int]]:
    if block.finite_T is None:
        yield from [(first, last)] * (first < last)
        return
    finite = np.zeros(last - first + 2, np.int8)
    finite[1:-1] = block.finite_T[first:last]
    edges = (first + np.flatnonzero(np.diff(finite))).tolist()
    yield from zip(edges[::2], edges[1::2], strict=True)


def _deltas(edits: Edits, first: int, last: int, column: int) -> FloatArray | None:
    deltas = edits.deltas_TF[first:last, column]
    return deltas if deltas.any() else None
