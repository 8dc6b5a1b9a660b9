"""The first real steps are checked against plain torch: better no server than wrong numbers.

Checked: that every tapped site ran on every token of the step; that the activations it wrote
for the first token are those of what it read there, recomputed one feature at a time; that the
tokens have the positions that the plan took them for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steerscope.engine.plan import IntArray
from steerscope.engine.taps import SiteTap
from steerscope.errors import UnsupportedEngineError

NUM_STEPS = 3
"""Steps that are checked after each start."""

RTOL = 1e-4
"""Error allowed, relative to the sum of the products' sizes."""

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
            site.acts_TF[:num_tokens] = _UNTOUCHED

    def after(self, positions_T: IntArray, served_T: Tensor | None) -> None:
        """Raise ``UnsupportedEngineError`` if the step was not what we took it for."""
        served = positions_T if served_T is None else served_T[: len(positions_T)]
        if served.tolist() != positions_T.tolist():
            raise _dead("the runner's positions are not those of the plan")
        for site in self._sites:
            acts_TF = site.acts_TF[: len(positions_T)]
            if bool((acts_TF == _UNTOUCHED).any()):
                raise _dead(f"{site.key} did not see every token")
            self._compare(site, acts_TF[0])
        self._left -= 1
        if not self:
            for site in self._sites:
                site.is_probed = False

    def _compare(self, site: SiteTap, acts_F: Tensor) -> None:
        W_enc_DF, b_enc_F, threshold_F = (tensor.double() for tensor in site.encoder)
        products_DF = site.probe_D.double().unsqueeze(1) * W_enc_DF
        pre_F = products_DF.sum(0) + b_enc_F
        tolerance_F = RTOL * (products_DF.abs().sum(0) + b_enc_F.abs())
        expected_F = torch.where(pre_F > threshold_F, pre_F, 0.0)
        wrong_F = (acts_F.double() - expected_F).abs() > tolerance_F
        # At a threshold rounding decides whether the feature is active: a jump, not an error.
        wrong_F &= ~((pre_F - threshold_F).abs() <= tolerance_F)
        if bool(wrong_F.any()):
            feature = site.features[int(wrong_F.nonzero()[0])]
            raise _dead(f"{feature.name} at {site.key} is not what plain torch makes of it")


def _dead(reason: str) -> UnsupportedEngineError:
    return UnsupportedEngineError(f"canary: {reason}; steerscope would report wrong numbers")
