"""The steered half of the equation on a CPU: loops, compiled by numba, over what a row edits.

A policy edits one or two of a site's features. Torch would gather every parameter of every
feature, a dozen operations over mostly neutral numbers; these visit the edited ones alone. The
equation is ``reference.edit`` and ``reference.decode``, in float32. numba comes with vLLM.

Shapes: T tokens of the step, E of them steered, D model width, F features, S rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

_TINY, _LARGEST = np.finfo(np.float32).tiny, np.finfo(np.float32).max


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


class Loops(NamedTuple):
    """Both functions, compiled."""

    edit: Callable[..., None]
    land: Callable[..., None]


@functools.cache
def compiled() -> Loops:
    """Compile, which takes half a second, before the first step and once per process."""
    from numba import njit  # an import of its own third of a second, for workers on a CPU alone

    # Sums may be taken in any order, which is what lets them run in parallel lanes;
    # not-a-number and infinity keep their meaning.
    jit = njit(fastmath={"reassoc", "contract"}, error_model="numpy", nogil=True)
    loops = Loops(jit(_edit), jit(_land))
    one, index = np.zeros(1, np.int64), np.zeros((1, 1), np.int64)
    table, doses, mine = (
        np.zeros((1, 1), np.float32),
        np.zeros(1, np.float32),
        np.zeros(1, np.bool_),
    )
    parameters = np.zeros((1, 7, 1), np.float32)
    loops.edit(one, one, index, one, parameters, index, table, table.copy(), doses)
    loops.land(
        one, one, index, one, doses, table, mine, table, table.copy(), doses, table.copy(), one
    )
    return loops
