"""What each step does on the host, in loops that numba compiles; it comes with vLLM.

After a forward pass on the same core the caches hold nothing of ours, and every numpy call is ten
times dearer than in a benchmark of its own: one loop instead of six calls is what counts.

They are for the batch plan, for the values that are kept by KV slot, and for what is told.

Shapes: T tokens of the step, R its requests, E tokens that are steered, F features, N slots,
M lines of K spans, B blocks of a request; S and P as in ``roster.Steps``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

UNKNOWN, FOREIGN, SEEN, EDITED = range(4)
"""States of a KV slot; the last two hold what a step read there. See ``slots``."""


def _lay(
    line_R: IntArray,
    spans_MK3: IntArray,
    query_start_loc: IntArray,
    first_positions: IntArray,
    rows_T: IntArray,
    until_R: IntArray,
) -> None:
    """Write the spans' rows over the step's tokens, a later span of a request over an earlier one.

    ``until_R`` becomes the least of itself and the first position where a row may be another.
    """
    for r in range(len(line_R)):
        if line_R[r] < 0:
            continue
        first, stop, at = query_start_loc[r], query_start_loc[r + 1], first_positions[r]
        for k in range(spans_MK3.shape[1]):
            begin, end, row = spans_MK3[line_R[r], k]
            for t in range(max(begin - at + first, first), min(end - at + first, stop)):
                rows_T[t] = row
            for edge in (begin, end):
                if at < edge < until_R[r]:
                    until_R[r] = edge


def _locate(
    num_requests_S: IntArray,
    num_steps_S: IntArray,
    rows_P: IntArray,
    lengths_P: IntArray,
    positions_P: IntArray,
    blocks_RB: npt.NDArray[np.int32],
    block_size: int,
    slots_T: IntArray,
) -> None:
    """Write the KV slot of each token of the steps; see ``roster.Steps``."""
    t = first_p = 0
    for s in range(len(num_requests_S)):
        stop_p = first_p + num_requests_S[s]
        for step in range(num_steps_S[s]):
            for p in range(first_p, stop_p):
                for position in range(positions_P[p], positions_P[p] + lengths_P[p]):
                    at = position + step
                    block = blocks_RB[rows_P[p], at // block_size]
                    slots_T[t] = block * block_size + at % block_size
                    t += 1
        first_p = stop_p


def _merge(
    num_requests_S: IntArray,
    num_steps_S: IntArray,
    rows_P: IntArray,
    lengths_P: IntArray,
    positions_P: IntArray,
    first_P: IntArray,
    starts_P: IntArray,
    order_T: IntArray,
) -> int:
    """Put each request's tokens in one piece: how many requests there are; see ``roster.Steps``.

    Or -1 where a request's tokens do not follow each other. In the order in which they first come,
    ``first_P`` becomes where in [P] that is, ``starts_P`` (one longer) where the request's tokens
    begin, and ``order_T`` which of the steps' tokens each is.
    """
    piece_N = np.full(rows_P.max() + 1, -1)
    next_P, filled_P = np.zeros_like(rows_P), np.zeros_like(rows_P)
    num_pieces = p = 0
    for s in range(len(num_requests_S)):
        for _ in range(num_requests_S[s]):
            count = lengths_P[p] * num_steps_S[s]
            piece = piece_N[rows_P[p]]
            if piece < 0:
                piece = piece_N[rows_P[p]] = num_pieces
                first_P[piece], next_P[piece], filled_P[piece] = p, positions_P[p], 0
                num_pieces += 1
            elif positions_P[p] != next_P[piece]:
                return -1
            next_P[piece] += count
            filled_P[piece] += count
            p += 1
    starts_P[0] = 0
    for piece in range(num_pieces):
        starts_P[piece + 1] = starts_P[piece] + filled_P[piece]
        filled_P[piece] = 0
    t = first_p = 0
    for s in range(len(num_requests_S)):
        stop_p = first_p + num_requests_S[s]
        for _ in range(num_steps_S[s]):
            for p in range(first_p, stop_p):
                piece = piece_N[rows_P[p]]
                for _ in range(lengths_P[p]):
                    order_T[starts_P[piece] + filled_P[piece]] = t
                    filled_P[piece] += 1
                    t += 1
        first_p = stop_p
    return num_pieces


def _keep(
    slots_T: IntArray, acts_TF: FloatArray, kept_NF: FloatArray, state_N: npt.NDArray[np.uint8]
) -> None:
    """Keep each token's activations under its slot, where there is one, and say that it is seen."""
    for t in range(len(slots_T)):
        slot = slots_T[t]
        if slot < len(state_N):
            state_N[slot] = SEEN
            for f in range(acts_TF.shape[1]):
                kept_NF[slot, f] = acts_TF[t, f]


def _keep_edits(
    slots_E: IntArray,
    deltas_EF: FloatArray,
    doses_E: FloatArray,
    kept_deltas_NF: FloatArray,
    kept_doses_N: FloatArray,
) -> None:
    """Keep what was changed at the steered tokens."""
    for e in range(len(slots_E)):
        slot = slots_E[e]
        if slot < len(kept_doses_N):
            kept_doses_N[slot] = doses_E[e]
            for f in range(deltas_EF.shape[1]):
                kept_deltas_NF[slot, f] = deltas_EF[e, f]


def _mark(
    slots_T: IntArray,
    steered_E: IntArray,
    is_edited_E: npt.NDArray[np.bool_],
    state_N: npt.NDArray[np.uint8],
) -> None:
    """Say which slots' tokens were edited at some site, the last token's where one comes again."""
    e = 0
    for t in range(len(slots_T)):
        is_steered = e < len(steered_E) and steered_E[e] == t
        if slots_T[t] < len(state_N):
            state_N[slots_T[t]] = EDITED if is_steered and is_edited_E[e] else SEEN
        e += is_steered


def _follows(
    query_start_loc: IntArray, first_positions: IntArray, at_R: IntArray, until_R: IntArray
) -> bool:
    """Whether each request has one token, at the position after its own in ``at_R``.

    And before its own in ``until_R``. If so, ``at_R`` becomes those positions.
    """
    follows = query_start_loc[0] == 0
    for r in range(len(at_R)):
        at = first_positions[r]
        follows &= query_start_loc[r + 1] == r + 1 and at == at_R[r] + 1 and at < until_R[r]
    if follows:
        for r in range(len(at_R)):
            at_R[r] += 1
    return bool(follows)


class Loops(NamedTuple):
    """The functions, compiled."""

    lay: Callable[..., None]
    locate: Callable[..., None]
    merge: Callable[..., int]
    keep: Callable[..., None]
    keep_edits: Callable[..., None]
    mark: Callable[..., None]
    follows: Callable[..., bool]


@functools.cache
def start() -> Future[Loops]:
    """Compile, or load, while vLLM compiles the model."""
    return ThreadPoolExecutor(1, thread_name_prefix="steerscope-loops").submit(_compile)


@functools.cache
def compiled() -> Loops:
    """The loops; the first call waits for them."""
    return start().result()


def _compile() -> Loops:
    """Two to four seconds the first time; then half of one, from what numba kept."""
    try:
        return _jitted(is_kept=True)
    except (RuntimeError, OSError):  # no folder that numba could write to, or it is full
        return _jitted(is_kept=False)


def _jitted(is_kept: bool) -> Loops:
    """``is_kept``: whether numba keeps them beside this file, or in the user's cache folder."""
    from numba import njit  # an import of a third of a second, which only workers need

    jit = njit(error_model="numpy", nogil=True, cache=is_kept)
    loops = Loops(*map(jit, (_lay, _locate, _merge, _keep, _keep_edits, _mark, _follows)))
    _call_each(loops)
    return loops


def _call_each(loops: Loops) -> None:
    """With the types that they will be called with: that is when numba compiles."""
    row, starts, blocks = np.zeros(1, np.int64), np.array([0, 1]), np.zeros((1, 1), np.int32)
    table, dose, state = (
        np.zeros((1, 1), np.float32),
        np.zeros(1, np.float32),
        np.zeros(1, np.uint8),
    )
    loops.lay(row, np.zeros((1, 1, 3), np.int64), starts, row, row, row)
    loops.locate(row, row, row, row, row, blocks, 1, row)
    loops.merge(row, row, row, row, row, row, starts, row)
    loops.keep(row, table, table, state)
    loops.keep_edits(row, table, dose, table, dose)
    loops.mark(row, row, dose > 0.0, state)
    for ints in (np.int64, np.int32):  # vLLM's runners have the shorter ones
        loops.follows(starts.astype(ints), row.astype(ints), row, row)
