# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
"""A tap's arithmetic on a GPU, in Triton: ``reference`` is the equation, and what it is tested by.

Shapes: T tokens of the step, T_max the most there can be, D model width, F features of one site,
S steering rows (row 0 neutral).

Three kernels a site. ``encode`` sums ``x @ W_enc``; a step of few tokens is split over D as well,
so that all of the GPU reads ``W_enc``. ``edit`` adds those partial sums in order, which makes them
the same in every run. ``land`` is one program a token: that of an unsteered token returns at once,
and a steered one keeps its stream in registers and reads only the rows of ``W_dec`` that it adds.

Safe under CUDA graph capture: nothing is allocated, nothing waits, no branch on the host looks at
a tensor's content, and how a step is cut up follows from T, D and F alone. Each way of cutting is
compiled when it is first met; ``sizes`` names a number of tokens for each, to be met beforehand.
Products are IEEE float32, never TF32. TopK dictionaries are not read here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerscope.engine.reference import Encoder, Rows

triton: Any = import_module("triton") if find_spec("triton") else None
tl: Any = import_module("triton.language") if triton else None

PROGRAMS = 512
"""D is split until there are so many, or nearly: some four for each processor of a large GPU."""

MIN_DEPTH = 128
"""Of D, in one split: less is over before it is worth the partial sum it leaves."""

MIN_BLOCK_T, MAX_BLOCK_T = 16, 64
"""Tokens at a time, in ``encode``."""

BLOCK_D = 32
"""Of D, at a time, in ``encode``."""

LIMITS = torch.finfo(torch.float32)


def runs_on(device: torch.device) -> bool:
    """Whether Triton is installed and compiles for ``device``; its interpreter runs on any."""
    return triton is not None and (device.type == "cuda" or triton.knobs.runtime.interpret)


def _jit(kernel: Callable[..., Any]) -> Any:
    """Triton's, not compiled anew for a number of tokens that 16 happens to divide."""
    return triton.jit(kernel, do_not_specialize=["num_tokens"]) if triton else kernel


class Cut(NamedTuple):
    """How a step is cut into blocks, and over D; follows from T, D and F."""

    block_T: int
    block_F: int
    splits: int
    depth: int
    edit_T: int


def cut(num_tokens: int, D: int, F: int) -> Cut:
    """Larger blocks of tokens read ``W_enc`` less often; smaller ones leave less of a GPU idle."""
    block_T = MIN_BLOCK_T if num_tokens <= 128 else 32 if num_tokens <= 512 else MAX_BLOCK_T
    block_F = _block_F(F)
    programs = _ceil(num_tokens, block_T) * _ceil(F, block_F)
    wanted = max(min(PROGRAMS // programs, D // MIN_DEPTH), 1)
    depth = _ceil(_ceil(D, 1 << (wanted.bit_length() - 1)), BLOCK_D) * BLOCK_D
    edit_T = 1 if num_tokens <= 128 else 4 if num_tokens <= 2048 else 16
    return Cut(block_T, block_F, _ceil(D, depth), depth, edit_T)


def _block_F(F: int) -> int:
    return min(max(_power_of_2(F), 16), 64)


def scratch_shape(max_num_tokens: int, D: int, F: int) -> tuple[int]:
    """Of the float32 scratch for partial sums: at least ``splits * T * F`` of any step.

    The bytes are four times this, and at most 8 MiB however large T_max, D and F are. Sites run
    one after another and can share one scratch.
    """
    in_blocks = PROGRAMS * MAX_BLOCK_T * _block_F(F)
    return (min(in_blocks, D // MIN_DEPTH * max_num_tokens * F),)


def sizes(max_num_tokens: int, D: int, F: int) -> list[int]:
    """A number of tokens for each way a step of this site can be cut."""
    cuts = ((cut(T, D, F), T) for T in range(1, max_num_tokens + 1, MIN_BLOCK_T))
    return sorted(dict(cuts).values())


def encode_and_edit(
    hidden_TD: Tensor,
    residual_TD: Tensor | None,
    encoder: Encoder,
    rows: Rows,
    rows_T: Tensor,
    acts_TF: Tensor,
    deltas_TF: Tensor,
    doses_T: Tensor,
    scratch: Tensor,
    probe_D: Tensor | None = None,
) -> None:
    """Read the features of T tokens, and say what their rows change: T is that of ``hidden_TD``.

    The activations of all T tokens are written, the changes (exactly 0 on the neutral row), and
    doses of 0; ``probe_D`` takes x at the first token. Buffers may be longer than T, and the rest
    of them stays as it is; a matrix or table may be part of a wider one, its rows apart.
    """
    num_tokens, D = hidden_TD.shape
    F = encoder.b_enc_F.numel()
    if not num_tokens:
        return
    how = cut(num_tokens, D, F)
    is_split = how.splits > 1
    tables = (rows.scale, rows.add, rows.lo, rows.hi)
    gates = (rows.self_above, rows.gate_above, rows.gate_below)
    assert not encoder.dictionaries
    assert len({table.stride(0) for table in tables + gates}) == 1
    assert not is_split or scratch.numel() >= how.splits * num_tokens * F
    grid = (_ceil(F, how.block_F), _ceil(num_tokens, how.block_T), how.splits)
    _encode[grid](
        *_matrix(hidden_TD),
        *_matrix(residual_TD),
        *_matrix(encoder.W_enc_DF),
        encoder.b_enc_F,
        encoder.threshold_F,
        *((scratch, F) if is_split else _matrix(acts_TF)),
        probe_D,
        num_tokens,
        D,
        F,
        how.depth,
        IS_SPLIT=is_split,
        BLOCK_T=how.block_T,
        BLOCK_F=how.block_F,
        BLOCK_D=BLOCK_D,
        enable_fp_fusion=True,
    )
    _edit[(_ceil(F, how.block_F), _ceil(num_tokens, how.edit_T))](
        scratch,
        *_matrix(acts_TF),
        *_matrix(deltas_TF),
        doses_T,
        rows_T,
        encoder.b_enc_F,
        encoder.threshold_F,
        *tables,
        *gates,
        rows.scale.stride(0),
        *_matrix(rows.gate_index),
        num_tokens,
        F,
        SPLITS=how.splits,
        BLOCK_T=how.edit_T,
        BLOCK_F=how.block_F,
        enable_fp_fusion=False,  # scale * f + add, each rounded as the reference rounds it
    )


def land(
    hidden_TD: Tensor,
    residual_TD: Tensor | None,
    W_dec_FD: Tensor,
    mine_F: Tensor,
    max_dose_S1: Tensor,
    rows_T: Tensor,
    deltas_TF: Tensor,
    doses_T: Tensor,
) -> None:
    """Add the changes of the features ``mine_F`` to the stream of the steered among T tokens.

    A row's ``max_dose`` scales them down, in ``deltas_TF`` too; a token's dose is the larger of
    this one and the one it has. Unsteered tokens are not touched.
    """
    num_tokens, D = hidden_TD.shape
    if not num_tokens:
        return
    F = mine_F.numel()
    block_D = _power_of_2(D)
    num_warps = min(max(block_D // 256, 4), 16)
    _land[(num_tokens,)](
        *_matrix(hidden_TD),
        *_matrix(residual_TD),
        *_matrix(W_dec_FD),
        mine_F,
        max_dose_S1,
        max_dose_S1.stride(0),
        rows_T,
        *_matrix(deltas_TF),
        doses_T,
        D,
        F,
        TINY=LIMITS.tiny,
        LARGEST=LIMITS.max,
        BLOCK_D=block_D,
        BLOCK_F=min(_power_of_2(F), 128),
        # 64 numbers of W_dec in each thread's registers at a time
        TILE_F=min(max(64 * 32 * num_warps // block_D, 1), 8, _power_of_2(F)),
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


@_jit
def _encode(
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    W_enc_ptr,
    W_enc_stride,
    b_enc_ptr,
    threshold_ptr,
    out_ptr,
    out_stride,
    probe_ptr,
    num_tokens,
    D,
    F,
    depth,
    IS_SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``act(x @ W_enc + b_enc)``, or where D is split the product of one of its parts alone."""
    f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    is_token, is_feature = t < num_tokens, f < F
    begin = split * depth
    sums_TF = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    for start in range(begin, min(begin + depth, D), BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        in_TD = is_token[:, None] & (d < D)[None, :]
        hidden_at = (t * hidden_stride)[:, None] + d[None, :]
        residual_at = (t * residual_stride)[:, None] + d[None, :]
        x_TD = _stream(hidden_ptr, hidden_at, residual_ptr, residual_at, in_TD)
        if probe_ptr is not None:  # noqa: SIM102  (known when compiled)
            if tl.program_id(0) == 0:
                tl.store(probe_ptr + d[None, :] + t[:, None], x_TD, in_TD & (t == 0)[:, None])
        W_enc_DF = tl.load(
            W_enc_ptr + d.to(tl.int64)[:, None] * W_enc_stride + f[None, :],
            (d < D)[:, None] & is_feature[None, :],
            other=0.0,
        )
        sums_TF = tl.dot(x_TD, W_enc_DF, sums_TF, input_precision="ieee")
    if not IS_SPLIT:
        sums_TF = _activation(sums_TF, b_enc_ptr, threshold_ptr, f[None, :], is_feature[None, :])
    at_TF = (split * num_tokens + t)[:, None] * out_stride + f[None, :]
    tl.store(out_ptr + at_TF, sums_TF, is_token[:, None] & is_feature[None, :])


@_jit
def _edit(
    scratch_ptr,
    acts_ptr,
    acts_stride,
    deltas_ptr,
    deltas_stride,
    doses_ptr,
    rows_ptr,
    b_enc_ptr,
    threshold_ptr,
    scale_ptr,
    add_ptr,
    lo_ptr,
    hi_ptr,
    self_above_ptr,
    gate_above_ptr,
    gate_below_ptr,
    table_stride,
    gate_index_ptr,
    gate_index_stride,
    num_tokens,
    F,
    SPLITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """``(f' - f) * gate``; and f, where it is still in parts."""
    f = (tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F))[None, :]
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_TF = (t < num_tokens)[:, None] & (f < F)
    f_TF = f + tl.zeros((BLOCK_T, 1), dtype=tl.int32)
    t_T1 = t[:, None]
    if SPLITS > 1:
        acts_TF = _gathered(
            scratch_ptr, t_T1, f_TF, in_TF, num_tokens, F, b_enc_ptr, threshold_ptr, SPLITS
        )
        tl.store(acts_ptr + t_T1 * acts_stride + f, acts_TF, in_TF)
    else:
        acts_TF = tl.load(acts_ptr + t_T1 * acts_stride + f, in_TF, other=0.0)
    rows_T = tl.load(rows_ptr + t, t < num_tokens, other=0)
    deltas_TF = tl.zeros((BLOCK_T, BLOCK_F), dtype=tl.float32)
    if tl.max((rows_T != 0).to(tl.int32), 0) > 0:
        row_T1 = rows_T.to(tl.int64)[:, None]
        in_TF_steered = in_TF & (row_T1 != 0)
        at_TF = row_T1 * table_stride + f
        gate_TF = tl.load(gate_index_ptr + row_T1 * gate_index_stride + f, in_TF_steered, other=0)
        # Of the parts again: another program may be writing the feature that this one looks at.
        if SPLITS > 1:
            gated_by_TF = _gathered(
                scratch_ptr,
                t_T1,
                gate_TF,
                in_TF_steered,
                num_tokens,
                F,
                b_enc_ptr,
                threshold_ptr,
                SPLITS,
            )
        else:
            gated_by_TF = tl.load(acts_ptr + t_T1 * acts_stride + gate_TF, in_TF_steered, other=0.0)
        scale_TF = tl.load(scale_ptr + at_TF, in_TF_steered, other=1.0)
        add_TF = tl.load(add_ptr + at_TF, in_TF_steered, other=0.0)
        lo_TF = tl.load(lo_ptr + at_TF, in_TF_steered, other=0.0)
        hi_TF = tl.load(hi_ptr + at_TF, in_TF_steered, other=0.0)
        edited_TF = _at_least(scale_TF * acts_TF + add_TF, lo_TF)
        edited_TF = _at_most(edited_TF, hi_TF)
        holds_TF = acts_TF > tl.load(self_above_ptr + at_TF, in_TF_steered, other=0.0)
        holds_TF &= gated_by_TF > tl.load(gate_above_ptr + at_TF, in_TF_steered, other=0.0)
        holds_TF &= gated_by_TF < tl.load(gate_below_ptr + at_TF, in_TF_steered, other=0.0)
        deltas_TF = tl.where(holds_TF & in_TF_steered, edited_TF - acts_TF, 0.0)
    tl.store(deltas_ptr + t_T1 * deltas_stride + f, deltas_TF, in_TF)
    if tl.program_id(0) == 0:
        tl.store(doses_ptr + t, tl.zeros((BLOCK_T,), dtype=tl.float32), t < num_tokens)


@_jit
def _land(
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    W_dec_ptr,
    W_dec_stride,
    mine_ptr,
    max_dose_ptr,
    max_dose_stride,
    rows_ptr,
    deltas_ptr,
    deltas_stride,
    doses_ptr,
    D,
    F,
    TINY: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    TILE_F: tl.constexpr,
):
    """``hidden + delta * min(1, max_dose / dose)`` for one token, if it is steered."""
    t = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + t).to(tl.int64)
    if row == 0:
        return
    d = tl.arange(0, BLOCK_D)
    in_D = d < D
    deltas_ptr += t * deltas_stride
    delta_D = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, F, BLOCK_F):
        if _is_any(_written(deltas_ptr, mine_ptr, start + tl.arange(0, BLOCK_F), F)):
            for first in range(start, min(start + BLOCK_F, F), TILE_F):
                f = first + tl.arange(0, TILE_F)
                deltas_F = _written(deltas_ptr, mine_ptr, f, F)
                if _is_any(deltas_F):
                    W_dec_FD = tl.load(
                        W_dec_ptr + f.to(tl.int64)[:, None] * W_dec_stride + d[None, :],
                        (deltas_F != 0.0)[:, None] & in_D[None, :],
                        other=0.0,
                    )
                    delta_D += tl.sum(deltas_F[:, None] * W_dec_FD, 0)
    y_D = _stream(hidden_ptr, t * hidden_stride + d, residual_ptr, t * residual_stride + d, in_D)
    size = _at_least(tl.sqrt_rn(tl.sum(y_D * y_D, 0)), TINY)
    dose = _at_most(tl.div_rn(tl.sqrt_rn(tl.sum(delta_D * delta_D, 0)), size), LARGEST)
    max_dose = tl.load(max_dose_ptr + row * max_dose_stride)
    share = tl.where(dose > max_dose, tl.div_rn(max_dose, dose), 1.0)
    hidden_ptr += t * hidden_stride
    hidden_D = tl.load(hidden_ptr + d, in_D, other=0.0)
    steered_D = (hidden_D.to(tl.float32) + delta_D * share).to(hidden_D.dtype)
    tl.store(hidden_ptr + d, steered_D, in_D)
    tl.store(doses_ptr + t, _at_least(tl.load(doses_ptr + t), dose * share))
    for start in range(0, F, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        is_mine = tl.load(mine_ptr + f, f < F, other=0) != 0
        deltas_F = tl.load(deltas_ptr + f, is_mine, other=0.0)
        # Threads load the same number: all must have before one stores.
        tl.debug_barrier()
        tl.store(deltas_ptr + f, deltas_F * share, is_mine)


@_jit
def _stream(hidden_ptr, hidden_at, residual_ptr, residual_at, mask):
    """x in float32: vLLM keeps the sum split where there is a residual."""
    x = tl.load(hidden_ptr + hidden_at, mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + residual_at, mask, other=0.0).to(tl.float32)
    return x


@_jit
def _gathered(
    scratch_ptr, t, f_TF, mask, num_tokens, F, b_enc_ptr, threshold_ptr, SPLITS: tl.constexpr
):
    """Activations of the features ``f_TF``: the parts of each, added in order."""
    sums_TF = tl.zeros(f_TF.shape, dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        at_TF = (t + split * num_tokens.to(tl.int64)) * F + f_TF
        sums_TF += tl.load(scratch_ptr + at_TF, mask, other=0.0)
    return _activation(sums_TF, b_enc_ptr, threshold_ptr, f_TF, mask)


@_jit
def _activation(sums, b_enc_ptr, threshold_ptr, f, mask):
    """relu, jumprelu or identity, by the threshold; not-a-number where ``sums`` is none."""
    pre = sums + tl.load(b_enc_ptr + f, mask, other=0.0)
    return tl.where(pre <= tl.load(threshold_ptr + f, mask, other=0.0), 0.0, pre)


@_jit
def _written(deltas_ptr, mine_ptr, f, F):
    """The changes that are written here, 0 for the others."""
    is_mine = tl.load(mine_ptr + f, f < F, other=0) != 0
    return tl.load(deltas_ptr + f, is_mine, other=0.0)


@_jit
def _is_any(values):
    return tl.max((values != 0.0).to(tl.int32), 0) > 0


@_jit
def _at_least(value, bound):
    return tl.maximum(value, bound, propagate_nan=tl.PropagateNan.ALL)


@_jit
def _at_most(value, bound):
    return tl.minimum(value, bound, propagate_nan=tl.PropagateNan.ALL)


def _matrix(matrix: Tensor | None) -> tuple[Tensor | None, int]:
    """A kernel's two arguments: where it is, and how far apart its rows are."""
    if matrix is None:
        return None, 0
    assert matrix.shape[1] == 1 or matrix.stride(1) == 1
    return matrix, matrix.stride(0)


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def _power_of_2(count: int) -> int:
    return 1 << (count - 1).bit_length()
