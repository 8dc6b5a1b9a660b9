"""repeng's control vectors, and what they do to a model: `make_repeng.py FOLDER`.

Beside the files: a tiny Llama, and its logits and layer outputs when repeng steers it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from repeng import ControlModel, ControlVector
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

WIDTH, NUM_LAYERS, VOCAB = 64, 4, 96
STEERED = (1, 2)
COEFFICIENT = 2.5


def llama() -> LlamaForCausalLM:
    """A tiny Llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=NUM_LAYERS, vocab_size=VOCAB,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def seen(model: ControlModel, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """The logits, and the stream as it leaves each layer."""
    out = model(tokens, output_hidden_states=True)
    # transformers records the last layer's after the final norm
    streams = {f"resid_post.{i}": out.hidden_states[i + 1][0] for i in range(NUM_LAYERS - 1)}
    return {"logits": out.logits[0], **streams}


def main(folder: Path) -> None:
    """Export two vectors and write what the first does to the model."""
    drawn = np.random.default_rng(0)
    directions = {i: drawn.standard_normal(WIDTH).astype(np.float32) for i in range(NUM_LAYERS)}
    vector = ControlVector("llama", directions)
    vector.export_gguf(folder / "vector.gguf")
    half = {i: direction.astype(np.float16) for i, direction in directions.items()}
    ControlVector("llama", half).export_gguf(folder / "half.gguf")

    model = llama()
    model.save_pretrained(folder / "model")
    tokens = torch.randint(VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))
    controlled = ControlModel(model, STEERED)
    plain = seen(controlled, tokens)
    controlled.set_control(ControlVector.import_gguf(folder / "vector.gguf"), COEFFICIENT)
    steered = seen(controlled, tokens)
    told = {"tokens": tokens, **{f"direction.{i}": torch.tensor(directions[i]) for i in directions}}
    told |= {f"plain.{name}": tensor for name, tensor in plain.items()}
    told |= {f"steered.{name}": tensor for name, tensor in steered.items()}
    save_file({name: t.contiguous().clone() for name, t in told.items()},
              folder / "expected.safetensors")  # fmt: skip


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
