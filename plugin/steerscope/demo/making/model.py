"""The demo model: a small stock Llama, and the masked forward pass its training uses.

Shape letters: B rows, L tokens of a row, D width, V vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from steerscope.demo.making.tokenizer import EOS, MAX_LENGTH, PAD, SPECIALS

SITE_LAYER: Final = 2
"""The features live in resid_post of this layer: the last one before a name may be read (see
`batches`).
"""
_VOCAB_MULTIPLE: Final = 64


@dataclass(frozen=True, slots=True)
class ModelSize:
    """The shape of the demo model."""

    hidden_size: int = 128
    num_layers: int = 6
    num_heads: int = 4
    intermediate_size: int = 384


def build_model(num_pieces: int, size: ModelSize) -> LlamaForCausalLM:
    """Return a freshly initialised model; the caller seeds torch."""
    config = LlamaConfig(
        vocab_size=math.ceil(num_pieces / _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIALS.index(EOS),
        pad_token_id=SPECIALS.index(PAD),
        initializer_range=0.05,
        attn_implementation="sdpa",
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=SPECIALS.index(EOS), pad_token_id=SPECIALS.index(PAD), do_sample=False
    )
    return model


@dataclass(frozen=True, slots=True)
class SiteNoise:
    """Gaussian training noise at the site, so that only few directions matter there."""

    ratio: float
    """Norm of the noise over the norm of the residual."""
    row_share: float
    generator: torch.Generator


def _with_noise(resid_BLD: Tensor, noise: SiteNoise) -> Tensor:
    noise_BLD = torch.randn(resid_BLD.shape, generator=noise.generator)
    rows_B11 = torch.rand(resid_BLD.shape[0], 1, 1, generator=noise.generator) < noise.row_share
    scale_BL1 = resid_BLD.detach().norm(dim=-1, keepdim=True) * noise.ratio
    share_BL1 = scale_BL1 * rows_B11 / math.sqrt(resid_BLD.shape[-1])
    return torch.addcmul(resid_BLD, noise_BLD, share_BL1)


def masked_logits(
    model: LlamaForCausalLM,
    ids_BL: Tensor,
    masks: tuple[Tensor, Tensor],
    wanted_BL: Tensor,
    noise: SiteNoise,
) -> tuple[Tensor, Tensor]:
    """Run the model with one attention mask up to the site layer and another after it.

    Both masks are bool [B, 1, L, L], True where attention is allowed. Returns float32 logits [N,
    V] of the N wanted positions, in row order.
    """
    core = model.model
    resid_BLD = core.embed_tokens(ids_BL)
    positions_1L = torch.arange(ids_BL.shape[1])[None]
    rotary = core.rotary_emb(resid_BLD, positions_1L)
    for index, layer in enumerate(core.layers):
        mask = masks[0] if index <= SITE_LAYER else masks[1]
        resid_BLD = layer(resid_BLD, attention_mask=mask, position_embeddings=rotary)
        if index == SITE_LAYER:
            resid_BLD = _with_noise(resid_BLD, noise)
    resid_ND = resid_BLD[wanted_BL]
    return cast(Tensor, model.lm_head(core.norm(resid_ND))).float(), resid_ND.float()
