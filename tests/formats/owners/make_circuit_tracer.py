"""circuit-tracer's transcoders, made and read by circuit-tracer: `make_circuit_tracer.py FOLDER`.

Its ``TopK`` is not among them: a file does not say that it was used, nor its k.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from circuit_tracer.transcoder import SingleLayerTranscoder, TranscoderSet, load_transcoder_set
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from expected import D_MODEL, D_SAE, randomise, write
from torch import Tensor

NUM_LAYERS = 2
LAYER = 1
"""The one of the set's layers that is compared."""

Activation = Callable[[Tensor], Tensor]


def one(
    layer: int, activation: Activation, skip: bool, dtype: torch.dtype
) -> SingleLayerTranscoder:
    """A transcoder of one layer, with random weights."""
    made = SingleLayerTranscoder(
        D_MODEL, D_SAE, activation, layer, skip, device=torch.device("cpu"), dtype=torch.float32
    )
    randomise(dict(made.named_parameters()), seed=layer)
    return made.to(dtype)


def keep(
    folder: Path,
    case: str,
    activation: Callable[[], Activation],
    skip: bool = False,
    dtype: torch.dtype = torch.float32,
    hooks: tuple[str, str] = ("mlp.hook_in", "hook_mlp_out"),
) -> None:
    """Save a set of transcoders as its repositories hold them, and write what it makes of one."""
    made = TranscoderSet(
        {layer: one(layer, activation(), skip, dtype) for layer in range(NUM_LAYERS)}, *hooks
    )
    made.to_safetensors(str(folder / case))
    config(folder / case, "transcoder_set", hooks)
    paths = {i: str(folder / case / f"layer_{i}.safetensors") for i in range(NUM_LAYERS)}
    loaded = load_transcoder_set(paths, case, *hooks, device=torch.device("cpu"))[LAYER]
    tell(folder, case, loaded)


def config(folder: Path, kind: str, hooks: tuple[str, str]) -> None:
    """The file that its repositories have beside the weights."""
    told = {
        "model_kind": kind, "model_name": "tiny", "scan": folder.name,
        "feature_input_hook": hooks[0], "feature_output_hook": hooks[1],
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(told))


def tell(folder: Path, case: str, loaded: SingleLayerTranscoder) -> None:
    """Write a transcoder's activations, and what each latent adds to the MLP's output."""

    def decode(acts_NK: Tensor) -> Tensor:
        nothing_ND = torch.zeros(len(acts_NK), D_MODEL)
        return loaded.decode(acts_NK, nothing_ND)

    write(folder, case, loaded.encode, decode)


def cross_layer(folder: Path, case: str, activation: str) -> None:
    """Save a cross-layer transcoder: a latent is read at one layer and writes to several."""
    made = CrossLayerTranscoder(
        NUM_LAYERS, D_SAE, D_MODEL, activation, lazy_decoder=False,
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    randomise(dict(made.named_parameters()), seed=len(activation))
    made.to_safetensors(str(folder / case))
    config(folder / case, "cross_layer_transcoder", ("hook_resid_mid", "hook_mlp_out"))
    loaded = load_clt(str(folder / case), device=torch.device("cpu"), dtype=torch.float32)
    write(folder, case, lambda x_ND: loaded.encode_layer(x_ND, LAYER))


def main(folder: Path) -> None:
    """Write every case."""

    def relu() -> Activation:
        return torch.nn.functional.relu

    def jumprelu() -> Activation:
        return JumpReLU(torch.zeros(D_SAE), 0.1)

    keep(folder, "relu", relu)
    keep(folder, "relu_skip", relu, skip=True)
    keep(folder, "relu_bfloat16", relu, dtype=torch.bfloat16)
    keep(folder, "jumprelu", jumprelu)
    keep(folder, "resid_mid", relu, hooks=("hook_resid_mid", "hook_mlp_out"))
    keep(folder, "normalized", relu, hooks=("ln2.hook_normalized", "hook_mlp_out"))
    cross_layer(folder, "cross_layer", "relu")
    cross_layer(folder, "cross_layer_jumprelu", "jump_relu")


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
