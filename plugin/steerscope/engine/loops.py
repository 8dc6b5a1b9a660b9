"""What each step does on the host, in loops that numba compiles; it comes with vLLM.

After a forward pass on the same core the caches hold nothing of ours, and every numpy call is ten
times dearer than in a benchmark of its own: one loop instead of six calls is what counts.

On a CPU, in float32, ``read`` is ``reference.encode`` for a step of few tokens, ``edit`` and
``land`` are ``reference.edit`` and ``reference.decode`` for the steered ones. A policy edits one or
two of a site's features; torch would gather every parameter of all of them, these visit the edited
ones alone. The others are for the batch plan and for the values that are kept by KV slot.

Shapes: T tokens of the step, R its requests, E tokens that are steered, D model width, F features,
S rows, N slots, B blocks of a request.
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

_TINY, _LARGEST = np.finfo(np.float32).tiny, np.finfo(np.float32).max


def _read(
    hidden_TD: FloatArray,
    residual_TD: FloatArray,
    W_enc_DF: FloatArray,
    b_enc_F: FloatArray,
    threshold_F: FloatArray,
    acts_TF: FloatArray,
    x_TD: FloatArray,
) -> None:
    """x and ``reference.encode`` of a few tokens."""
    num_features = len(b_enc_F)
    for t in range(len(hidden_TD)):
        acts_F = acts_TF[t]
        for f in range(num_features):
            acts_F[f] = b_enc_F[f]
        for d in range(hidden_TD.shape[1]):
            x = hidden_TD[t, d] + residual_TD[t, d]
            x_TD[t, d] = x
            for f in range(num_features):
                acts_F[f] += x * W_enc_DF[d, f]
        for f in range(num_features):
            if acts_F[f] <= threshold_F[f]:
                acts_F[f] = 0.0


def _edit(
    steered_E: IntArray,
    rows_T: IntArray,
    edited_SF: IntArray,
    num_edited_S: IntArray,
    parameters_SPF: FloatArray,
    gate_index_SF: IntArray,
    acts_TF: FloatArray,
    deltas_TF: FloatArray,
    doses_T: FloatArray,
) -> None:
    """Write the steered tokens' changes; zero their doses."""
    for t in steered_E:
        row = rows_T[t]
        deltas_TF[t] = 0.0
        doses_T[t] = 0.0
        for j in range(num_edited_S[row]):
            f = edited_SF[row, j]
            scale, add, lo, hi, self_above, gate_above, gate_below = parameters_SPF[row, :, f]
            act, gate = acts_TF[t, f], acts_TF[t, gate_index_SF[row, f]]
            if act > self_above and gate > gate_above and gate < gate_below:
                wanted = scale * act + add
                if wanted < lo:
                    wanted = lo
                if wanted > hi:
                    wanted = hi
                deltas_TF[t, f] = wanted - act


def _land(
    steered_E: IntArray,
    rows_T: IntArray,
    edited_SF: IntArray,
    num_edited_S: IntArray,
    max_dose_S: FloatArray,
    W_dec_FD: FloatArray,
    mine_F: npt.NDArray[np.bool_],
    y_TD: FloatArray,
    deltas_TF: FloatArray,
    doses_T: FloatArray,
    out_TD: FloatArray,
    at_E: IntArray,
) -> None:
    """Add the changes of the features in ``mine_F`` to row ``at_E[e]`` of ``out_TD``, capped.

    Their deltas are cut by what the cap left, doses are raised to this place's.
    """
    width = y_TD.shape[1]
    change_D = np.empty(width, np.float32)
    for e in range(len(steered_E)):
        t = steered_E[e]
        row = rows_T[t]
        change_D[:] = 0.0
        for j in range(num_edited_S[row]):
            f = edited_SF[row, j]
            if mine_F[f] and deltas_TF[t, f] != 0.0:
                for d in range(width):
                    change_D[d] += deltas_TF[t, f] * W_dec_FD[f, d]
        change, size = np.float32(0.0), np.float32(0.0)
        for d in range(width):
            change += change_D[d] * change_D[d]
            size += y_TD[t, d] * y_TD[t, d]
        dose = min(np.sqrt(change) / max(np.sqrt(size), _TINY), _LARGEST)
        share = max_dose_S[row] / dose if dose > max_dose_S[row] else np.float32(1.0)
        doses_T[t] = max(doses_T[t], dose * share)
        for d in range(width):
            out_TD[at_E[e], d] += change_D[d] * share
        for j in range(num_edited_S[row]):
            f = edited_SF[row, j]
            if mine_F[f]:
                deltas_TF[t, f] *= share


def _lay(
    request_S: IntArray,
    start_S: IntArray,
    end_S: IntArray,
    row_S: IntArray,
    query_start_loc: IntArray,
    first_positions: IntArray,
    rows_T: IntArray,
    until_R: IntArray,
) -> None:
    """Write the spans' rows over the step's tokens, a later span of a request over an earlier one.

    ``until_R`` becomes the least of itself and the first position where a row may be another.
    """
    for s in range(len(request_S)):
        r = request_S[s]
        at, stop = first_positions[r], query_start_loc[r + 1]
        offset = query_start_loc[r] - at
        for t in range(max(start_S[s] + offset, query_start_loc[r]), min(end_S[s] + offset, stop)):
            rows_T[t] = row_S[s]
        for edge in (start_S[s], end_S[s]):
            if at < edge < until_R[r]:
                until_R[r] = edge


def _locate(
    rows_R: IntArray,
    query_start_loc: IntArray,
    first_positions: IntArray,
    blocks_RB: npt.NDArray[np.int32],
    block_size: int,
    slots_T: IntArray,
) -> None:
    """Write the KV slot of each token of the step."""
    for r in range(len(rows_R)):
        position = first_positions[r]
        for t in range(query_start_loc[r], query_start_loc[r + 1]):
            block = blocks_RB[rows_R[r], position // block_size]
            slots_T[t] = block * block_size + position % block_size
            position += 1


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
    state_N: npt.NDArray[np.uint8],
) -> None:
    """Keep what was changed at the steered tokens; a slot where something was is marked so."""
    for e in range(len(slots_E)):
        slot = slots_E[e]
        if slot < len(state_N):
            kept_doses_N[slot] = doses_E[e]
            for f in range(deltas_EF.shape[1]):
                kept_deltas_NF[slot, f] = deltas_EF[e, f]
            if doses_E[e] > 0.0:
                state_N[slot] = EDITED


def _are_within(at_R: IntArray, from_R: IntArray, until_R: IntArray) -> bool:
    """Whether each position lies in its own range."""
    within = True
    for r in range(len(at_R)):
        within &= from_R[r] <= at_R[r] < until_R[r]
    return within


class Loops(NamedTuple):
    """The functions, compiled."""

    read: Callable[..., None]
    edit: Callable[..., None]
    land: Callable[..., None]
    lay: Callable[..., None]
    locate: Callable[..., None]
    keep: Callable[..., None]
    keep_edits: Callable[..., None]
    are_within: Callable[..., bool]


@functools.cache
def start() -> Future[Loops]:
    """Compile, which takes a second and a half, while vLLM compiles the model."""
    return ThreadPoolExecutor(1, thread_name_prefix="steerscope-loops").submit(_compile)


@functools.cache
def compiled() -> Loops:
    """The loops; the first call waits for them."""
    return start().result()


def _compile() -> Loops:
    from numba import njit  # an import of a third of a second, which only workers need

    # Sums may be taken in any order, which is what lets them run in parallel lanes;
    # not-a-number and infinity keep their meaning.
    jit = njit(fastmath={"reassoc", "contract"}, error_model="numpy", nogil=True)
    functions = (_read, _edit, _land, _lay, _locate, _keep, _keep_edits, _are_within)
    loops = Loops(*map(jit, functions))
    _call_each(loops)
    return loops


def _call_each(loops: Loops) -> None:
    """With the types that they will be called with: that is when numba compiles."""
    row, starts, index = np.zeros(1, np.int64), np.array([0, 1]), np.zeros((1, 1), np.int64)
    dose, state, mine = np.zeros(1, np.float32), np.zeros(1, np.uint8), np.zeros(1, np.bool_)
    table, parameters = np.zeros((1, 1), np.float32), np.zeros((1, 7, 1), np.float32)
    loops.read(table, table, table, dose, dose, table, table)
    loops.edit(row, row, index, row, parameters, index, table, table, dose)
    loops.land(row, row, index, row, dose, table, mine, table, table, dose, table, row)
    loops.lay(row, row, row, row, starts, row, row, row)
    loops.locate(row, starts, row, index.astype(np.int32), 1, row)
    loops.keep(row, table, table, state)
    loops.keep_edits(row, table, dose, table, dose, state)
    loops.are_within(row, row, row)
