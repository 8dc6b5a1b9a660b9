"""The equation, in plain PyTorch. Every kernel cites this file and is tested against it.

Shapes: T tokens, D model width, F features of one site, S steering rows; K latents of a whole
dictionary (its d_sae), N of which are features of the site.

    x      = hidden + residual                     [T, D]  vLLM keeps the sum split
    pre    = x @ W_enc + b_enc                     [T, F]  selected encoder columns, b_dec folded in
    f      = act(pre)                              [T, F]  relu | jumprelu | identity | topk
    f'     = clip(scale * f + add, lo, hi)         [T, F]  parameters of the token's steering row
    delta  = ((f' - f) * gate) @ W_dec             [T, D]
    dose   = |delta| / |y|                         [T]     y: what is written to, before the edit
    hidden = hidden + delta * min(1, max_dose / dose)      the SAE's error term is untouched

y is x, save for a transcoder, which reads ``mlp_in`` and writes ``mlp_out``.

topk: f = relu(pre) where pre is among the k largest of all K latents of its dictionary, else 0.
Latents that tie with the k-th largest are all kept, where ``torch.topk`` keeps any k of them: which
ones would be the library's accident. relu comes before the selection in EleutherAI's sparsify and
after it in SAELens, which is the same: what is not positive is 0 either way.

Sources: JumpReLU, Rajamanoharan et al. 2024 (arXiv 2407.14435); editing one latent
while keeping the reconstruction error, Templeton et al. 2024; TopK, Gao et al. 2024
(arXiv 2406.04093); names as in SAELens.
All of it in float32 whatever the model's dtype. Row 0 is neutral.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NEUTRAL_ROW = 0

MAX_WIDE_BYTES = 64 << 20
"""What the latents of a whole dictionary may take at a time (or one token's): a longer step is
read in blocks of tokens."""


class TopK(NamedTuple):
    """A whole dictionary of which k latents are active, and N features of the site in it.

    ``latents_N`` are their places among its K latents, ``columns_N`` among the site's features.
    """

    W_enc_KD: Tensor
    b_enc_K: Tensor
    k: int
    latents_N: Tensor
    columns_N: Tensor


class Encoder(NamedTuple):
    """The read half. relu is jumprelu with threshold 0; identity has threshold -inf.

    A topk feature has a column too, but what counts is its place in one of ``dictionaries``.
    """

    W_enc_DF: Tensor
    b_enc_F: Tensor
    threshold_F: Tensor
    dictionaries: tuple[TopK, ...] = ()


class Rows(NamedTuple):
    """Edit parameters: of all rows [S, F] or, gathered, of each token [T, F].

    The gate holds where ``f > self_above``, ``f[gate_index] > gate_above`` and
    ``f[gate_index] < gate_below``; neutral bounds are infinite. ``max_dose`` is one number
    for the whole row, [S, 1] or [T, 1].
    """

    scale: Tensor
    add: Tensor
    lo: Tensor
    hi: Tensor
    self_above: Tensor
    gate_index: Tensor
    gate_above: Tensor
    gate_below: Tensor
    max_dose: Tensor

    def at(self, rows_T: Tensor) -> Rows:
        """Each token's parameters."""
        return Rows(*(table[rows_T] for table in self))


def encode(x_TD: Tensor, encoder: Encoder, out_TF: Tensor | None = None) -> Tensor:
    """Feature activations [T, F] of the residual stream; not-a-number where that is none."""
    acts_TF = torch.addmm(encoder.b_enc_F, x_TD, encoder.W_enc_DF, out=out_TF)
    acts_TF.masked_fill_(acts_TF <= encoder.threshold_F, 0.0)
    for dictionary in encoder.dictionaries:
        acts_TF.index_copy_(1, dictionary.columns_N, encode_topk(x_TD, dictionary))
    return acts_TF


def encode_topk(x_TD: Tensor, dictionary: TopK) -> Tensor:
    """Activations [T, N] of a dictionary's features, a block of tokens at a time."""
    bytes_per_token = dictionary.b_enc_K.nbytes
    blocks = torch.split(x_TD, max(MAX_WIDE_BYTES // bytes_per_token, 1))
    return torch.cat([_select(block_TD, dictionary) for block_TD in blocks])


def _select(x_TD: Tensor, dictionary: TopK) -> Tensor:
    pre_TK = torch.addmm(dictionary.b_enc_K, x_TD, dictionary.W_enc_KD.T)
    kth_T1 = pre_TK.topk(dictionary.k, dim=1, sorted=False).values.amin(1, keepdim=True)
    # Of the same product as the k-th: another may differ in the last bit, and the k-th latent
    # itself would be below it.
    pre_TN = pre_TK.index_select(1, dictionary.latents_N)
    return torch.where(pre_TN < kth_T1, 0.0, pre_TN.relu())


def edit(acts_TF: Tensor, rows_TF: Rows) -> Tensor:
    """The change of each feature, ``(f' - f) * gate`` [T, F]; exactly 0 on a neutral row."""
    edited_TF = torch.clamp(rows_TF.scale * acts_TF + rows_TF.add, rows_TF.lo, rows_TF.hi)
    gated_by_TF = acts_TF.gather(1, rows_TF.gate_index)
    holds_TF = (
        (acts_TF > rows_TF.self_above)
        & (gated_by_TF > rows_TF.gate_above)
        & (gated_by_TF < rows_TF.gate_below)
    )
    return torch.where(holds_TF, edited_TF - acts_TF, 0.0)


class Written(NamedTuple):
    """A change of the stream [T, D], its dose [T], and how much of it the cap left [T, 1]."""

    delta_TD: Tensor
    dose_T: Tensor
    share_T1: Tensor


def decode(delta_TF: Tensor, W_dec_FD: Tensor, y_TD: Tensor, max_dose_T1: Tensor) -> Written:
    """The change of what is written to, its dose held to ``max_dose``."""
    limits = torch.finfo(torch.float32)
    delta_TD = delta_TF @ W_dec_FD
    size_T1 = torch.linalg.vector_norm(y_TD, dim=-1, keepdim=True).clamp_min(limits.tiny)
    dose_T1 = torch.linalg.vector_norm(delta_TD, dim=-1, keepdim=True) / size_T1
    dose_T1 = dose_T1.clamp_max(limits.max)  # of a stream that is zero
    share_T1 = torch.where(dose_T1 > max_dose_T1, max_dose_T1 / dose_T1, 1.0)
    return Written(delta_TD * share_T1, (dose_T1 * share_T1).squeeze(1), share_T1)
