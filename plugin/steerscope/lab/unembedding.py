"""Which tokens a feature's decoder promotes and suppresses, read straight from the weights.

The direct path only: the decoder row through the final norm's weight and the unembedding. What
later layers make of it is not seen, so that for an early layer this is a hint at most. The final
norm also divides by the stream's size, for all tokens alike: that is left out.

Shapes: V vocabulary, D model width.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from steerscope.catalog.tensors import FloatArray, TensorFile
from steerscope.errors import CatalogError, LabError

UNEMBEDDINGS = ("lm_head.weight", "embed_out.weight", "model.embed_tokens.weight",
                "transformer.wte.weight", "wte.weight", "model.language_model.embed_tokens.weight",
                "language_model.model.embed_tokens.weight")  # fmt: skip
"""Where models keep it; a model that ties it has only the embedding."""
FINAL_NORMS = ("model.norm.weight", "transformer.ln_f.weight", "ln_f.weight",
               "gpt_neox.final_layer_norm.weight", "model.language_model.norm.weight",
               "language_model.model.norm.weight")  # fmt: skip
ONE_PLUS_WEIGHT = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "vaultgemma",
                             "qwen3_next", "qwen3_5", "qwen3_5_text", "nemotron"})  # fmt: skip
"""Model types whose norms multiply by one plus their weight; later Gemmas do not."""

_BIASES = tuple(name.removesuffix("weight") + "bias" for name in FINAL_NORMS)


@dataclass(frozen=True, slots=True)
class Promoted:
    """Token ids by what one unit of activation adds to their logits, were the norm to divide by 1.

    Relative to the mean over the vocabulary, which the softmax does not see.
    """

    promoted: tuple[tuple[int, float], ...]
    suppressed: tuple[tuple[int, float], ...]


class Unembedding:
    """A model's unembedding, with the final norm's weight folded in."""

    def __init__(self, model: Path) -> None:
        W_VD = _first(model, UNEMBEDDINGS)
        if W_VD is None:
            raise LabError(f"{model}: no unembedding under a name we know ({UNEMBEDDINGS[0]}, ...)")
        norm_D = _first(model, FINAL_NORMS)
        if norm_D is None:
            raise LabError(f"{model}: no final norm under a name we know ({FINAL_NORMS[0]}, ...)")
        W_VD *= norm_D + np.float32(_norm_offset(model))
        if _first(model, _BIASES) is not None:  # a LayerNorm, which takes the mean away first
            W_VD -= W_VD.mean(axis=1, keepdims=True)
        W_VD -= W_VD.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._W_VD = W_VD

    def of(self, W_dec_D: FloatArray, count: int = 10) -> Promoted:
        """The tokens at both ends."""
        logits_V = self._W_VD @ W_dec_D
        order = np.argsort(logits_V)
        return Promoted(
            tuple((int(t), float(logits_V[t])) for t in order[::-1][:count]),
            tuple((int(t), float(logits_V[t])) for t in order[:count]),
        )


def _norm_offset(model: Path) -> float:
    try:
        kind = json.loads((model / "config.json").read_bytes()).get("model_type", "")
    except (OSError, ValueError, AttributeError) as error:
        raise LabError(f"{model}/config.json: {error}") from None
    return 1.0 if kind in ONE_PLUS_WEIGHT else 0.0


def _first(model: Path, names: tuple[str, ...]) -> FloatArray | None:
    for name in names:
        for path in sorted(model.glob("*.safetensors")):
            try:
                with TensorFile(path) as tensors:
                    if name in tensors.entries:
                        return tensors.read(name)
            except CatalogError as error:
                raise LabError(str(error)) from None
    return None
