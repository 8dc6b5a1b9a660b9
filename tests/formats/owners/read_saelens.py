"""What SAELens makes of a dictionary it did not write: `read_saelens.py DICTIONARY INPUTS OUT`."""

import sys
from pathlib import Path

import sae_lens
import torch
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(dictionary: Path, inputs: Path, out: Path) -> None:
    """Encode and rebuild the inputs."""
    loaded = sae_lens.SAE.load_from_disk(dictionary)
    acts_NK = loaded.encode(load_file(inputs)["x"])
    save_file({"acts": acts_NK, "rebuilt": loaded.decode(acts_NK)}, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
