"""The first real steps are checked against plain torch: better no server than wrong numbers.

Checked: that every tapped site ran on every token of the step; that the activations it wrote
for the first token are those of what it read there, recomputed in double precision; that the
tokens have the positions that the plan took them for.

Shapes: D model width, F features of a site, K latents of a whole dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerscope.engine.plan import IntArray
from steerscope.engine.reference import Encoder, TopK
from steerscope.engine.taps import SiteTap
from steerscope.errors import UnsupportedEngineError

NUM_STEPS = 3
"""Steps that are checked after each start."""

RTOL = 1e-4
"""Error allowed, relative to the sum of the products' sizes."""

BLOCK = 1024
"""How many latents of a dictionary are recomputed at a time."""

_UNTOUCHED = -1.5e38
"""No activation: marks what a site did not write."""


class Canary:
    """Sings for the first ``NUM_STEPS`` steps."""

    def __init__(self, sites: Sequence[SiteTap]) -> None:
        self._sites = sites
        self._left = NUM_STEPS

    def __bool__(self) -> bool:
        return self._left > 0

    def before(self, num_tokens: int) -> None:
        """Mark the buffers; the forward must overwrite the marks."""
        for site in self._sites:
            site.acts_of_step(num_tokens).fill_(_UNTOUCHED)

    def after(self, positions_T: IntArray, served_T: Tensor | None) -> None:
        """Raise ``UnsupportedEngineError`` if the step was not what we took it for."""
        served = positions_T if served_T is None else served_T[: len(positions_T)]
        if served.tolist() != positions_T.tolist():
            raise _dead("the runner's positions are not those of the plan")
        for site in self._sites:
            acts_TF = site.acts_of_step(len(positions_T))
            if bool((acts_TF == _UNTOUCHED).any()):
                raise _dead(f"{site.key} did not see every token")
            self._compare(site, acts_TF[0])
        self._left -= 1
        if not self:
            for site in self._sites:
                site.is_probed = False

    def _compare(self, site: SiteTap, acts_F: Tensor) -> None:
        acts_F, encoder = acts_F.double(), site.encoder
        pre_F, tolerance_F = _pre(site.probe_D, encoder.W_enc_DF.T, encoder.b_enc_F)
        low_F, high_F = _edges(site.probe_D, encoder)
        # At the edge rounding decides whether the feature is active: a jump, not an error.
        must_be_silent_F = pre_F + tolerance_F < low_F
        must_be_active_F = pre_F - tolerance_F > high_F
        is_active_F, is_off_F = acts_F != 0.0, (acts_F - pre_F).abs() > tolerance_F
        wrong_F = is_off_F & (is_active_F | must_be_active_F) | is_active_F & must_be_silent_F
        if bool(wrong_F.any()):
            feature = site.features[int(wrong_F.nonzero()[0])]
            raise _dead(f"{feature.name} at {site.key} is not what plain torch makes of it")


def _edges(x_D: Tensor, encoder: Encoder) -> tuple[Tensor, Tensor]:
    """What a feature must exceed to be active: a number, or bounds of it where it competes."""
    low_F = encoder.threshold_F.double()
    high_F = low_F.clone()
    for dictionary in encoder.dictionaries:
        kth = _kth(x_D, dictionary)
        for edge_F, bound in zip((low_F, high_F), kth, strict=True):
            edge_F[dictionary.columns_N] = bound.clamp_min(0.0)
    return low_F, high_F


def _kth(x_D: Tensor, dictionary: TopK) -> tuple[Tensor, Tensor]:
    """Bounds of a dictionary's k-th largest, wherever rounding put each of its latents."""
    pre_K, tolerance_K = _pre(x_D, dictionary.W_enc_KD, dictionary.b_enc_K)
    low, high = (
        edge_K.topk(dictionary.k).values[-1]
        for edge_K in (pre_K - tolerance_K, pre_K + tolerance_K)
    )
    return low, high


def _pre(x_D: Tensor, W_enc_KD: Tensor, b_enc_K: Tensor) -> tuple[Tensor, Tensor]:
    """Of one token, what enters the activation, [K], and by how much float32 may miss it, [K]."""
    x_D, pre, size = x_D.double(), [], []
    for block_KD in torch.split(W_enc_KD, BLOCK):
        rows_KD = block_KD.double()
        pre.append(rows_KD @ x_D)
        size.append(rows_KD.abs() @ x_D.abs())
    b_enc_K = b_enc_K.double()
    return torch.cat(pre) + b_enc_K, RTOL * (torch.cat(size) + b_enc_K.abs())


def _dead(reason: str) -> UnsupportedEngineError:
    return UnsupportedEngineError(f"canary: {reason}; steerscope would report wrong numbers")
