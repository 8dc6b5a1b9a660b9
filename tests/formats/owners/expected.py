"""What an owner's script writes beside its files: inputs, and what its own classes make of them.

Imported by the scripts here, each under its owner's libraries. Shape letters: N tokens, D width,
K latents.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

NUM_TOKENS = 128
D_MODEL = 64
D_SAE = 256
K = 8
LARGE = 30.0
"""Residual streams of trained models are this much larger than 1 in their later layers."""


def streams(seed: int) -> Tensor:
    """Inputs [N, D] like a residual stream: about unit variance, an offset, one loud dimension."""
    x_ND = torch.randn(NUM_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(seed))
    x_ND += 0.3 * torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed + 1))
    x_ND[:, 3] *= 5
    return x_ND


@torch.no_grad()
def randomise(parameters: dict[str, Tensor], seed: int) -> None:
    """Fill what a fresh dictionary leaves zero or tied, so that a mixed-up tensor is noticed."""
    drawn = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(parameters.items()):
        size = 1 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.3
        parameter.copy_(size * torch.randn(parameter.shape, generator=drawn))
        if name.endswith("threshold"):
            parameter.abs_().add_(0.1)
            parameter[..., :8].neg_()  # the owners differ in what lies between it and 0


@torch.no_grad()
def write(
    folder: Path,
    case: str,
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Write ``<case>.expected.safetensors``: activations at two scales, and each latent's effect.

    The effect is what the owner's decoder adds for one unit of one latent.
    """
    x_ND = streams(len(case))
    large_ND = LARGE * x_ND
    told = {"x": x_ND, "acts": encode(x_ND), "large_x": large_ND, "large_acts": encode(large_ND)}
    if decode is not None:
        eye_KK = torch.eye(D_SAE)
        told["W_dec"] = decode(eye_KK) - decode(torch.zeros_like(eye_KK))
    tensors = {name: value.float().contiguous().clone() for name, value in told.items()}
    save_file(tensors, folder / f"{case}.expected.safetensors")
