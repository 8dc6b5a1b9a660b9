"""repeng's control vectors: what they do to a model there is what ``add`` does here.

Shapes: N tokens, D width.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from steerscope.catalog.formats import Options, open_source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.engine import reference
from torch import Tensor, nn
from transformers import LlamaForCausalLM

NUM_LAYERS = 4
STEERED = (1, 2)
COEFFICIENT = 2.5


class Adding:
    """A forward hook on a layer: our equation, adding to one direction."""

    def __init__(self, file: Path, layer: int) -> None:
        with open_source("repeng", file, Options(layer=layer)) as source:
            columns = source.columns([0])
        self.W_enc_DF = torch.from_numpy(columns.W_enc).T
        self.W_dec_FD = torch.from_numpy(columns.W_dec)
        self.encoder = reference.Encoder(self.W_enc_DF, torch.zeros(1), torch.tensor([-math.inf]))

    def __call__(self, _: nn.Module, __: object, out_BND: Tensor) -> Tensor:
        x_ND = out_BND[0]
        acts_NF = reference.encode(x_ND, self.encoder)
        one_N1 = torch.ones_like(acts_NF)
        rows = reference.Rows(
            scale=one_N1, add=COEFFICIENT * one_N1, lo=-math.inf * one_N1, hi=math.inf * one_N1,
            self_above=-math.inf * one_N1, gate_index=torch.zeros_like(acts_NF, dtype=torch.long),
            gate_above=-math.inf * one_N1, gate_below=math.inf * one_N1,
            max_dose=math.inf * one_N1,
        )  # fmt: skip
        delta_NF = reference.edit(acts_NF, rows)
        return out_BND + reference.decode(delta_NF, self.W_dec_FD, x_ND, rows.max_dose).delta_TD


def seen(model: LlamaForCausalLM, tokens: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True)
    streams = {f"resid_post.{i}": out.hidden_states[i + 1][0] for i in range(NUM_LAYERS - 1)}
    return {"logits": out.logits[0], **streams}


def test_adding_a_direction_does_to_a_model_what_repengs_set_control_does(
    repeng_files: Path,
) -> None:
    owner = load_file(repeng_files / "expected.safetensors")
    model = LlamaForCausalLM.from_pretrained(repeng_files / "model").eval()
    for name, plain in seen(model, owner["tokens"]).items():
        torch.testing.assert_close(plain, owner[f"plain.{name}"], rtol=0, atol=1e-5)
    for layer in STEERED:
        hook = Adding(repeng_files / "vector.gguf", layer)
        model.model.layers[layer].register_forward_hook(hook)
    for name, steered in seen(model, owner["tokens"]).items():
        torch.testing.assert_close(steered, owner[f"steered.{name}"], rtol=0, atol=1e-4)
    moved = (owner["steered.resid_post.2"] - owner["plain.resid_post.2"]).norm(dim=-1)
    assert float(moved.min()) > 1


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_direction_is_the_vector_that_was_exported_and_reads_how_much_of_it_is_there(
    layer: int, repeng_files: Path
) -> None:
    wanted_D = load_file(repeng_files / "expected.safetensors")[f"direction.{layer}"].numpy()
    with open_source("repeng", repeng_files / "vector.gguf", Options(layer=layer)) as source:
        assert (source.kind, source.activation) == (FeatureKind.DIRECTION, Activation.IDENTITY)
        assert (source.site, source.layer) == (Site.RESID_POST, layer)
        columns = source.columns([0])
    assert columns.W_dec is not None
    np.testing.assert_array_equal(columns.W_dec[0], wanted_D)
    assert float(wanted_D @ columns.W_enc[0]) == pytest.approx(1.0, abs=1e-6)


def test_a_vector_of_half_precision_is_read_as_stored(repeng_files: Path) -> None:
    wanted_D = load_file(repeng_files / "expected.safetensors")["direction.1"].half().float()
    with open_source("repeng", repeng_files / "half.gguf", Options(layer=1)) as source:
        W_dec = source.columns([0]).W_dec
    assert W_dec is not None
    np.testing.assert_array_equal(W_dec[0], wanted_D.numpy())
