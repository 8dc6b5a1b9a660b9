"""A file as we read it beside what its owner makes of it.

Shapes: N tokens, D width, K latents.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from steerscope.catalog.formats import Source
from steerscope.catalog.model import Activation
from steerscope.engine import reference
from torch import Tensor

TOLERANCE = 1e-5
"""For inputs of about unit variance; a product of 64 terms rounds to about 1e-6."""
LARGE = 30.0
"""How much larger the second inputs are, and so their rounding."""
MAX_UNDECIDED = 0.002
"""Share of activations so near their threshold that rounding decides."""


class Encoded(NamedTuple):
    """Our activations [N, K], and where they hang on less than the tolerance."""

    acts_NK: Tensor
    undecided_NK: Tensor


def read_ours(source: Source, x_ND: Tensor, tolerance: float = TOLERANCE) -> Encoded:
    """All of a source's latents by the reference."""
    encoder = _encoder(source)
    acts_NK = reference.encode(x_ND, encoder)
    pre_NK = x_ND @ encoder.W_enc_DF + encoder.b_enc_F
    if source.activation is Activation.TOPK:
        assert source.k is not None
        bound_N1, next_N1 = pre_NK.topk(source.k + 1, dim=1).values[:, -2:].split(1, dim=1)
        return Encoded(acts_NK, (bound_N1 - next_N1 < tolerance).expand_as(acts_NK))
    jumps_K = encoder.threshold_F != 0
    return Encoded(acts_NK, jumps_K & ((pre_NK - encoder.threshold_F).abs() < tolerance))


def _encoder(source: Source) -> reference.Encoder:
    everyone = range(source.d_sae)
    columns = source.columns(everyone)
    threshold_K = torch.zeros(source.d_sae)
    if columns.threshold is not None:
        threshold_K = torch.from_numpy(columns.threshold)
    dictionaries: tuple[reference.TopK, ...] = ()
    if source.activation is Activation.TOPK:
        assert source.k is not None
        blocks = list(source.whole_encoder())
        places_K = torch.arange(source.d_sae)
        W_enc_KD = torch.cat([torch.from_numpy(block.W_enc) for block in blocks])
        b_enc_K = torch.cat([torch.from_numpy(block.b_enc) for block in blocks])
        dictionaries = (reference.TopK(W_enc_KD, b_enc_K, source.k, places_K, places_K),)
    W_enc_DK = torch.from_numpy(columns.W_enc).T.contiguous()
    return reference.Encoder(W_enc_DK, torch.from_numpy(columns.b_enc), threshold_K, dictionaries)


def check_parity(source: Source, expected: Path, *, steers: bool = True) -> None:
    """Assert that we read and, where it ``steers``, write what the owner does."""
    owner = load_file(expected)
    for prefix, tolerance in (("", TOLERANCE), ("large_", LARGE * TOLERANCE)):
        acts_NK = owner[f"{prefix}acts"]
        active = float((acts_NK != 0).float().mean())
        assert 0.005 < active < 0.9, "nothing is compared where nothing, or all, is active"
        ours = read_ours(source, owner[f"{prefix}x"], tolerance)
        assert ours.undecided_NK.float().mean() <= MAX_UNDECIDED
        away_NK = (ours.acts_NK - acts_NK).abs().masked_fill(ours.undecided_NK, 0.0)
        print(f"{expected.stem} {prefix or 'unit '}away by {float(away_NK.max()):.1e}")
        assert float(away_NK.max()) <= tolerance
    W_dec = source.columns(range(source.d_sae)).W_dec
    if steers:
        assert W_dec is not None
        torch.testing.assert_close(torch.from_numpy(W_dec), owner["W_dec"], rtol=0, atol=1e-6)
    else:
        assert W_dec is None
