"""Sparsify's SAEs and transcoders, made and read by Sparsify: `make_sparsify.py FOLDER`."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its sparse decoder needs a GPU

import torch
from expected import D_MODEL, D_SAE, K, randomise, write
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

RESID, MLP = "layers.3", "layers.2.mlp"
"""Its folders are named for the module whose output (a transcoder: input too) was trained on."""


def coder(dtype: torch.dtype = torch.float32, **settings: Any) -> SparseCoder:
    """A sparse coder with random weights."""
    config = SparseCoderConfig(**{"num_latents": D_SAE, "k": K, **settings})
    made = SparseCoder(D_MODEL, config)
    randomise(dict(made.named_parameters()), seed=len(settings))
    return made.to(dtype)


def tell(folder: Path, case: str, hookpoint: str) -> None:
    """Load it from disk with Sparsify, in float32, and write its activations."""
    loaded = SparseCoder.load_from_disk(folder / case / hookpoint).float()

    def encode(x_ND: Tensor) -> Tensor:
        found = loaded.encode(x_ND)
        acts_NK = torch.zeros(len(x_ND), loaded.num_latents)
        return acts_NK.scatter_(1, found.top_indices, found.top_acts)

    def decode(acts_NK: Tensor) -> Tensor:
        values, indices = acts_NK.topk(K)
        return loaded.decode(values, indices)

    write(folder, case, encode, decode)


def main(folder: Path) -> None:
    """Write every case."""
    cases = {
        "sae": (RESID, coder()),
        "sae_mlp": (MLP, coder()),
        "sae_expansion": (RESID, coder(num_latents=0, expansion_factor=D_SAE // D_MODEL)),
        "sae_bfloat16": (RESID, coder(torch.bfloat16)),
        "transcoder": (MLP, coder(transcode=True)),
        "skip_transcoder": (MLP, coder(transcode=True, skip_connection=True)),
    }
    for case, (hookpoint, made) in cases.items():
        made.save_to_disk(folder / case / hookpoint)
        tell(folder, case, hookpoint)
    coder(activation="groupmax").save_to_disk(folder / "groupmax" / RESID)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
