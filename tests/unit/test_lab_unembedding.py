"""Promoted tokens: what Transformers' own final norm and head do to a small step of the stream.

Shapes: V vocabulary, D model width.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from steerscope.errors import LabError
from steerscope.lab.unembedding import Unembedding
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


def llama(tied):
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=tied)), "norm"


def gemma():
    """Its norms multiply by one plus their weight."""
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=None)
    return Gemma2ForCausalLM(config), "norm"


def gpt2():
    """Its last norm takes the mean away, and has a bias."""
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(config), "ln_f"


MODELS = {"tied": lambda: llama(True), "untied": lambda: llama(False), "gemma": gemma, "gpt2": gpt2}


def random_model(kind):
    torch.manual_seed(0)
    model, norm_name = MODELS[kind]()
    norm = getattr(model.base_model, norm_name)
    for parameter in norm.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return model.double().eval(), norm


def final_stream(model, norm):
    """What the final norm reads at the last token of a prompt [D]."""
    seen = []
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(torch.tensor([[3, 1, 4, 1, 5]]))
    hook.remove()
    return seen[0][0, -1].detach()


def size_of(x_D, kind, eps):
    """What the norm divides by."""
    centred_D = x_D - x_D.mean() if kind == "gpt2" else x_D
    return torch.sqrt(centred_D.square().mean() + eps)


@pytest.mark.parametrize("kind", MODELS)
def test_logits_move_as_the_model_moves_them_while_the_norms_size_holds(kind, tmp_path):
    """A step that keeps the stream's size to first order: then only the direct path is left.

    d logits / d step = W_U @ (w * step) / size, for any step at a right angle to the stream
    (LayerNorm: both centred). The vocabulary's mean is taken from both sides.
    """
    model, norm = random_model(kind)
    model.save_pretrained(tmp_path)
    x_D = final_stream(model, norm)
    torch.manual_seed(1)
    step_D = torch.randn(16, dtype=torch.float64)
    across_D = x_D - x_D.mean() if kind == "gpt2" else x_D
    step_D -= (step_D @ across_D) / (across_D @ across_D) * across_D

    def logits(x_D):
        return model.lm_head(norm(x_D))

    _, moved_V = torch.func.jvp(logits, (x_D,), (step_D,))
    found = Unembedding(tmp_path).of(step_D.float().numpy(), count=40)
    eps = model.config.layer_norm_epsilon if kind == "gpt2" else model.config.rms_norm_eps
    expected_V = (moved_V - moved_V.mean()) * size_of(x_D, kind, eps)
    told = dict(found.promoted)
    np.testing.assert_allclose(
        [told[t] for t in range(40)], expected_V.detach().numpy(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_any_step_moves_logits_so_where_the_norm_divides_by_what_it_did(kind, tmp_path):
    model, norm = random_model(kind)
    model.save_pretrained(tmp_path)
    x_D = final_stream(model, norm)
    step_D = 0.01 * torch.randn(16, dtype=torch.float64)
    size = size_of(x_D, kind, model.config.rms_norm_eps)
    plain_V = model.lm_head(norm.weight * x_D / size)
    np.testing.assert_allclose(plain_V.detach(), model.lm_head(norm(x_D)).detach(), atol=1e-7)
    moved_V = (model.lm_head(norm.weight * (x_D + step_D) / size) - plain_V).detach() * size
    told = dict(Unembedding(tmp_path).of(step_D.float().numpy(), count=40).promoted)
    expected_V = (moved_V - moved_V.mean()).numpy()
    np.testing.assert_allclose([told[t] for t in range(40)], expected_V, rtol=1e-4, atol=1e-6)


def folder(tmp_path, tensors, config=None):
    save_file({n: np.asarray(t, np.float32) for n, t in tensors.items()},
              tmp_path / "model.safetensors")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return tmp_path


EYE = {"model.embed_tokens.weight": np.eye(4), "model.norm.weight": [1.0, 2.0, 3.0, 4.0]}


def test_both_ends_are_told_in_order(tmp_path):
    found = Unembedding(folder(tmp_path, EYE)).of(np.ones(4, np.float32), count=2)
    assert found.promoted == ((3, 1.5), (2, 0.5))
    assert found.suppressed == ((0, -1.5), (1, -0.5))


def test_a_vocabulary_smaller_than_what_is_asked_for_is_told_whole(tmp_path):
    found = Unembedding(folder(tmp_path, EYE)).of(np.ones(4, np.float32))
    assert len(found.promoted) == len(found.suppressed) == 4


def test_a_head_of_its_own_comes_before_the_embedding(tmp_path):
    head = {"lm_head.weight": np.eye(4)[::-1]}
    found = Unembedding(folder(tmp_path, EYE | head)).of(np.ones(4, np.float32), count=1)
    assert found.promoted == ((0, 1.5),)


@pytest.mark.parametrize(
    ("model_type", "offset"),
    [("llama", 0.0), ("gemma", 1.0), ("gemma2", 1.0), ("gemma3_text", 1.0), ("gemma3n", 0.0),
     ("gemma4", 0.0), ("qwen3_next", 1.0)],
)  # fmt: skip
def test_one_is_added_to_the_norms_weight_where_the_model_does_so(tmp_path, model_type, offset):
    (told,) = (
        dict(Unembedding(folder(tmp_path, EYE, {"model_type": model_type})).of(way, 4).promoted)
        for way in [np.eye(4, dtype=np.float32)[0]]
    )
    assert told[0] - told[1] == pytest.approx(1.0 + offset)


def test_weights_in_several_files_are_found(tmp_path):
    folder(tmp_path, EYE)
    whole = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for i, (name, tensor) in enumerate(whole.items()):
        save_file({name: tensor}, tmp_path / f"model-{i}.safetensors")
    assert Unembedding(tmp_path).of(np.ones(4, np.float32), 1).promoted == ((3, 1.5),)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"model.norm.weight": np.ones(4)}, "no unembedding under a name we know"),
        ({"model.embed_tokens.weight": np.eye(4)}, "no final norm under a name we know"),
    ],
)
def test_a_model_that_keeps_them_elsewhere_is_refused(tmp_path, tensors, reason):
    with pytest.raises(LabError, match=reason):
        Unembedding(folder(tmp_path, tensors))


def test_bad_files_are_refused(tmp_path):
    folder(tmp_path, EYE)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(LabError, match=r"config\.json"):
        Unembedding(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors at all")
    with pytest.raises(LabError, match=r"model\.safetensors"):
        Unembedding(tmp_path)
