"""The encoder and decoder of a dictionary as stored tensors, most of which stay on disk.

Shapes: D model width, K latents of the dictionary, n chosen ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steerscope.catalog.authoring import BLOCK_LATENTS
from steerscope.catalog.tensors import FloatArray, TensorFile
from steerscope.errors import CatalogError


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """Names of the tensors and how they lie.

    Attributes:
        W_enc: [D, K] if ``latents_last``, else [K, D].
        b_dec: subtracted from the input before it is encoded; None if it is not.
        W_dec: [K, D]; None if it must not be written.
        positive: the owner puts a relu inside the jump: a threshold below 0 is one of 0.
    """

    tensors: TensorFile
    W_enc: str = "W_enc"
    latents_last: bool
    b_enc: str = "b_enc"
    b_dec: str | None = None
    jump: str | None = None
    W_dec: str | None = None
    positive: bool = True

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """W_enc [n, D] and b_enc [n]: (x - b_dec) @ W + b = x @ W + (b - b_dec @ W)."""
        take = self.tensors.columns if self.latents_last else self.tensors.rows
        W_enc_nD = take(self.W_enc, indices)
        b_enc_n = self.tensors.read(self.b_enc)[list(indices)]
        if self.b_dec is None:
            return W_enc_nD, b_enc_n
        b_dec_D = self.tensors.read(self.b_dec)
        return W_enc_nD, (b_enc_n - _product(W_enc_nD, b_dec_D)).astype(np.float32)

    def threshold(self, indices: Sequence[int]) -> FloatArray | None:
        """[n], or None without one."""
        if self.jump is None:
            return None
        threshold_n = self.tensors.read(self.jump)[list(indices)]
        return np.maximum(threshold_n, np.float32(0)) if self.positive else threshold_n

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """W_dec [n, D]."""
        return None if self.W_dec is None else self.tensors.rows(self.W_dec, indices)

    def shape(self) -> tuple[int, int]:
        """(D, K); ``CatalogError`` unless all tensors agree on them."""
        entry = self.tensors.entry(self.W_enc)
        if len(entry.shape) != 2:
            raise self._wrong(self.W_enc, "a matrix")
        d_in, d_sae = entry.shape if self.latents_last else entry.shape[::-1]
        for name, wanted in (
            (self.b_enc, (d_sae,)),
            (self.b_dec, (d_in,)),
            (self.jump, (d_sae,)),
            (self.W_dec, (d_sae, d_in)),
        ):
            if name is not None and self.tensors.entry(name).shape != wanted:
                raise self._wrong(name, str(list(wanted)))
        return d_in, d_sae

    def _wrong(self, name: str, wanted: str) -> CatalogError:
        shape = list(self.tensors.entry(name).shape)
        return CatalogError(f"{self.tensors.path}: {name!r} is {shape}, expected {wanted}")


def _product(W_nD: FloatArray, b_D: FloatArray) -> npt.NDArray[np.float64]:
    """W @ b in double precision, a few rows at a time."""
    b_D64 = b_D.astype(np.float64)
    blocks = [W_nD[i : i + BLOCK_LATENTS] @ b_D64 for i in range(0, len(W_nD), BLOCK_LATENTS)]
    return np.concatenate(blocks) if blocks else np.zeros(0)
