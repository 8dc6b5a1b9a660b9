"""What every outside format is turned into: one place in a model, and its latents.

Shapes: D model width, n chosen latents. Everything is float32 and everything the owner does to
the input is folded in, so that ``f = act(x @ W_enc + b_enc)`` holds for the raw stream ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from steerscope.catalog.authoring import BLOCK_LATENTS
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.catalog.store import DictionaryVectors
from steerscope.catalog.tensors import FloatArray
from steerscope.errors import CatalogError


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the caller says where a file does not. A file that says otherwise is refused.

    Attributes:
        architecture: the model's class, as in its ``config.json``; tells apart hooks that some
            models have before a norm and others after it.
        mlp_norm: the weight [D] by which a layer's norm before its MLP multiplies, if it does
            nothing else but divide by the root mean square.
    """

    site: Site | None = None
    layer: int | None = None
    architecture: str = ""
    mlp_norm: Callable[[int], FloatArray] | None = None


class Columns(NamedTuple):
    """Chosen latents: ``threshold`` is for jumprelu only; without ``W_dec`` they are read-only."""

    W_enc: FloatArray
    b_enc: FloatArray
    threshold: FloatArray | None
    W_dec: FloatArray | None


class Weights(Protocol):
    """Where a source's numbers come from."""

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """W_enc [n, D] and b_enc [n]."""

    def threshold(self, indices: Sequence[int]) -> FloatArray | None:
        """[n], for jumprelu."""

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """W_dec [n, D], or None if it must not be written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An opened dictionary, probe or set of directions: all at one site of one layer.

    Attributes:
        k: how many latents are active at a token; topk only.
        names: of the latents, where the format names them; ``index_of`` takes them.
        provenance: what goes into a feature's ``source``.
        notes: what someone who imports from here should be told.
    """

    kind: FeatureKind
    site: Site
    layer: int
    d_in: int
    d_sae: int
    activation: Activation
    weights: Weights
    k: int | None = None
    names: tuple[str, ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def index_of(self, reference: str) -> int:
        """A latent's index, given as a number or, where the format has names, by name."""
        if reference in self.names:
            return self.names.index(reference)
        if not reference.isdecimal() or int(reference) >= self.d_sae:
            known = ", ".join(self.names[:8]) or f"0 to {self.d_sae - 1}"
            raise CatalogError(f"no latent {reference!r} there, only {known}")
        return int(reference)

    def columns(self, indices: Iterable[int]) -> Columns:
        """The chosen latents; nothing else of the encoder is looked at."""
        chosen = [self._checked(index) for index in indices]
        W_enc, b_enc = self.weights.encoder(chosen)
        threshold = self.weights.threshold(chosen)
        return Columns(W_enc, b_enc, threshold, self.weights.decoder(chosen))

    def whole_encoder(self) -> Iterator[DictionaryVectors]:
        """All latents in order, some at a time: a topk dictionary need not fit into memory."""
        for first in range(0, self.d_sae, BLOCK_LATENTS):
            block = range(first, min(first + BLOCK_LATENTS, self.d_sae))
            yield DictionaryVectors(*self.weights.encoder(block))

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.d_sae:
            raise CatalogError(f"no latent {index} there, only 0 to {self.d_sae - 1}")
        return index


@dataclass(frozen=True, slots=True)
class Held:
    """Weights that are few enough to be in memory: directions, probes."""

    all: Columns

    def encoder(self, indices: Sequence[int]) -> tuple[FloatArray, FloatArray]:
        """Of those in memory."""
        return self.all.W_enc[list(indices)], self.all.b_enc[list(indices)]

    def threshold(self, indices: Sequence[int]) -> FloatArray | None:
        """There is none."""
        return None

    def decoder(self, indices: Sequence[int]) -> FloatArray | None:
        """Of those in memory."""
        return None if self.all.W_dec is None else self.all.W_dec[list(indices)]


def directions(vectors_nD: FloatArray) -> Held:
    """Directions: ``add a`` adds ``a`` times the vector; ``f`` is how much of it the stream holds.

    W_enc = d / |d|^2, so that clamping sets what is read: (x + (v - f) d) @ W_enc = v.
    """
    squares_n = np.square(vectors_nD.astype(np.float64)).sum(axis=1)
    if not (squares_n > 0).all() or not np.isfinite(squares_n).all():
        raise CatalogError("a direction is zero, NaN or infinite")
    W_enc_nD = (vectors_nD / squares_n[:, None]).astype(np.float32)
    b_enc_n = np.zeros(len(vectors_nD), np.float32)
    return Held(Columns(W_enc_nD, b_enc_n, None, vectors_nD.astype(np.float32)))
