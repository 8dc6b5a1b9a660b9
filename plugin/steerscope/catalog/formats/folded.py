"""Encoders that become ours by a change of scale.

Shapes: D model width, n chosen latents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steerscope.catalog.formats import hooks
from steerscope.catalog.formats.linear import Linear
from steerscope.catalog.formats.source import Options, Weights
from steerscope.catalog.tensors import FloatArray
from steerscope.errors import CatalogError


@dataclass(frozen=True, slots=True)
class Gated:
    """``weights`` are those of the gate's own path, its bias b_mag."""

    weights: Linear

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """The magnitude path: W_enc e^r, and b_mag with b_dec folded in after the scaling."""
        chosen = list(indices)
        W_enc_nD, b_n = self.weights.encoder(chosen)
        b_mag_n = self.weights.tensors.read(self.weights.b_enc)[chosen]
        grown_n = self._grown(chosen)
        return W_enc_nD * grown_n[:, None], b_mag_n + grown_n * (b_n - b_mag_n)

    def threshold(self, indices: Sequence[int]) -> FloatArray:
        """Where the gate opens: the b_dec term is in both paths, so it drops out."""
        chosen = list(indices)
        b_mag_n = self.weights.tensors.read("b_mag")[chosen]
        b_gate_n = self.weights.tensors.read("b_gate")[chosen]
        return np.maximum(b_mag_n - self._grown(chosen) * b_gate_n, np.float32(0))

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """As stored."""
        return self.weights.decoder(indices)

    def _grown(self, chosen: list[int]) -> FloatArray:
        grown_n: FloatArray = np.exp(self.weights.tensors.read("r_mag")[chosen])
        return grown_n


@dataclass(frozen=True, slots=True)
class Rescaled:
    """Activations measured in units of the decoder's norm: out of W_dec, into the encoder."""

    weights: Linear

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """Times the norms."""
        W_enc_nD, b_enc_n = self.weights.encoder(indices)
        norms_n = self._norms(indices)
        return W_enc_nD * norms_n[:, None], b_enc_n * norms_n

    def threshold(self, indices: Sequence[int]) -> None:
        """Only TopK SAEs have this."""

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """Of unit norm."""
        return self.weights.tensors.rows("W_dec", indices) / self._norms(indices)[:, None]

    def _norms(self, indices: Sequence[int]) -> FloatArray:
        W_dec_nD = self.weights.tensors.rows("W_dec", indices)
        norms_n: FloatArray = np.linalg.norm(W_dec_nD, axis=1).astype(np.float32)
        return np.maximum(norms_n, np.float32(1e-8))


@dataclass(frozen=True, slots=True)
class BeforeWeight:
    """Made for a norm's output before its weight: n @ W = (n * w) @ (W / w)."""

    weights: Weights
    norm_D: FloatArray

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """Each row of the encoder over the norm's weight."""
        W_enc_nD, b_enc_n = self.weights.encoder(indices)
        return W_enc_nD / self.norm_D, b_enc_n

    def threshold(self, indices: Sequence[int]) -> FloatArray | None:
        """As stored."""
        return self.weights.threshold(indices)

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """As stored."""
        return self.weights.decoder(indices)


def before_weight(weights: Weights, hook: str, layer: int, options: Options) -> Weights:
    """The weights as they read ``mlp_in``, where they were made for the norm before its weight."""
    if hook != hooks.NORMALIZED or options.mlp_norm is None:
        return weights
    norm_D = options.mlp_norm(layer)
    if not np.isfinite(norm_D).all() or not norm_D.all():
        raise CatalogError(f"the norm before the MLP of layer {layer} has a weight of 0 or NaN")
    return BeforeWeight(weights, norm_D)
