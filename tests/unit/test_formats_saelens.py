"""SAELens folders against the formulas in SAELens' own docstrings, in plain numpy.

Shapes: T tokens, D width, K latents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from steerscope.catalog.formats import Options, open_source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

T, D, K = 64, 12, 40
CHOSEN = [3, 0, 39, 17]

SAE = {"metadata": {"hook_name": "blocks.3.hook_resid_post", "sae_lens_version": "6.54.0"}}
TRANSCODER = {
    "apply_b_dec_to_input": False,
    "d_out": D,
    "metadata": {"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"},
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def weights(rng):
    shapes = {"W_enc": (D, K), "W_dec": (K, D), "b_enc": (K,), "b_dec": (D,), "threshold": (K,),
              "r_mag": (K,), "b_mag": (K,), "b_gate": (K,)}  # fmt: skip
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


PARTS = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("r_mag", "b_mag", "b_gate"),
    "topk": ("b_enc",),
    "transcoder": ("b_enc",),
    "jumprelu_transcoder": ("b_enc", "threshold"),
}


def save(
    folder: Path, weights: dict[str, np.ndarray], architecture: str, config: dict[str, Any]
) -> Path:
    folder.mkdir(exist_ok=True)
    kept = {"W_enc", "W_dec", "b_dec", *PARTS.get(architecture, ("b_enc",))}
    extra = {name: w for name, w in weights.items() if name in kept or name.startswith("extra_")}
    save_file(
        {n.removeprefix("extra_"): w for n, w in extra.items()}, folder / "sae_weights.safetensors"
    )
    tree = {"d_in": D, "d_sae": K, "architecture": architecture, "dtype": "float32", **config}
    (folder / "cfg.json").write_text(json.dumps(tree))
    return folder


def relu(x):
    return np.maximum(x, 0)


def ours(columns, x_TD):
    pre_TF = x_TD @ columns.W_enc.T + columns.b_enc
    bound_F = 0 if columns.threshold is None else columns.threshold
    return np.where(pre_TF > bound_F, pre_TF, 0)


def open_chosen(folder):
    with open_source("saelens", folder) as source:
        return source, source.columns(CHOSEN)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_a_standard_sae_is_relu_with_b_dec_folded_in(tmp_path, weights, rng, apply_b_dec):
    config = SAE | {"apply_b_dec_to_input": apply_b_dec}
    source, columns = open_chosen(save(tmp_path / "sae", weights, "standard", config))
    assert (source.kind, source.activation) == (FeatureKind.SAE_LATENT, Activation.RELU)
    assert (source.site, source.layer) == (Site.RESID_POST, 3)
    assert (source.d_in, source.d_sae) == (D, K)
    x_TD = rng.normal(size=(T, D))
    centred_TD = x_TD - weights["b_dec"] if apply_b_dec else x_TD
    expected = relu(centred_TD @ weights["W_enc"] + weights["b_enc"])[:, CHOSEN]
    np.testing.assert_allclose(ours(columns, x_TD), expected, atol=1e-5)
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"][CHOSEN])


def test_a_jumprelu_sae_has_a_relu_inside_its_jump(tmp_path, weights, rng):
    assert (weights["threshold"][CHOSEN] < 0).any(), "else nothing is shown"
    _, columns = open_chosen(save(tmp_path / "sae", weights, "jumprelu", SAE))
    x_TD = rng.normal(size=(T, D))
    pre_TK = (x_TD - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    expected = relu(pre_TK) * (pre_TK > weights["threshold"])
    np.testing.assert_allclose(ours(columns, x_TD), expected[:, CHOSEN], atol=1e-5)


@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_a_gated_sae_is_a_jumprelu_exactly(tmp_path, weights, rng, apply_b_dec):
    config = SAE | {"apply_b_dec_to_input": apply_b_dec}
    source, columns = open_chosen(save(tmp_path / "sae", weights, "gated", config))
    assert source.activation is Activation.JUMPRELU
    x_TD = rng.normal(size=(T, D))
    s_TK = (x_TD - weights["b_dec"] * apply_b_dec) @ weights["W_enc"]
    gate_TK = s_TK + weights["b_gate"] > 0
    expected = gate_TK * relu(s_TK * np.exp(weights["r_mag"]) + weights["b_mag"])
    np.testing.assert_allclose(ours(columns, x_TD), expected[:, CHOSEN], atol=2e-5)


@pytest.mark.parametrize("rescale", [False, True])
def test_a_topk_sae_gives_its_whole_encoder_and_k(tmp_path, weights, rng, rescale):
    config = SAE | {"k": 5, "rescale_acts_by_decoder_norm": rescale}
    with open_source("saelens", save(tmp_path / "sae", weights, "topk", config)) as source:
        assert (source.activation, source.k) == (Activation.TOPK, 5)
        blocks = list(source.whole_encoder())
        columns = source.columns(CHOSEN)
    norms_K = np.linalg.norm(weights["W_dec"], axis=1) if rescale else np.ones(K)
    x_TD = rng.normal(size=(T, D))
    expected = ((x_TD - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]) * norms_K
    W_enc_KD = np.concatenate([block.W_enc for block in blocks])
    b_enc_K = np.concatenate([block.b_enc for block in blocks])
    np.testing.assert_allclose(x_TD @ W_enc_KD.T + b_enc_K, expected, atol=5e-5)
    np.testing.assert_array_equal(columns.W_enc, W_enc_KD[CHOSEN])
    np.testing.assert_allclose(
        columns.W_dec, weights["W_dec"][CHOSEN] / norms_K[CHOSEN, None], rtol=1e-6
    )


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_transcoder"])
def test_a_transcoder_from_mlp_in_to_mlp_out_does_not_subtract_b_dec(
    tmp_path, weights, rng, architecture
):
    source, columns = open_chosen(save(tmp_path / "t", weights, architecture, TRANSCODER))
    assert (source.kind, source.site) == (FeatureKind.TRANSCODER_LATENT, Site.MLP_IN)
    x_TD = rng.normal(size=(T, D))
    pre_TK = x_TD @ weights["W_enc"] + weights["b_enc"]
    bound = weights["threshold"] if "jump" in architecture else 0
    expected = (relu(pre_TK) * (pre_TK > bound))[:, CHOSEN]
    np.testing.assert_allclose(ours(columns, x_TD), expected, atol=1e-5)
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"][CHOSEN])


@pytest.mark.parametrize(
    ("hooks", "site"),
    [
        ({"hook_name": "blocks.2.hook_resid_mid", "hook_name_out": "blocks.2.hook_mlp_out"},
         Site.RESID_MID),
        ({"hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.4.hook_mlp_out"},
         Site.MLP_IN),
        ({"hook_name": "blocks.2.mlp.hook_in"}, Site.MLP_IN),
    ],
)  # fmt: skip
def test_a_transcoder_that_does_not_write_our_mlp_out_is_read_only(tmp_path, weights, hooks, site):
    folder = save(tmp_path / "t", weights, "transcoder", TRANSCODER | {"metadata": hooks})
    source, columns = open_chosen(folder)
    assert source.site is site
    assert columns.W_dec is None
    assert "read-only" in source.notes[-1]


def test_the_keys_of_saelens_before_version_6_are_understood(tmp_path, weights):
    old = {"hook_point": "blocks.{layer}.hook_resid_pre", "hook_layer": 7,
           "hook_point_head_index": None, "activation_fn_str": "relu",
           "normalize_activations": False}  # fmt: skip
    source, _ = open_chosen(save(tmp_path / "old", weights, "standard", old))
    assert (source.site, source.layer, source.activation) == (
        Site.RESID_PRE, 7, Activation.RELU,
    )  # fmt: skip


def test_topk_of_saelens_before_version_6_is_a_standard_sae_with_another_activation(
    tmp_path, weights
):
    old = {"hook_name": "blocks.7.hook_resid_pre", "activation_fn": "topk",
           "activation_fn_kwargs": {"k": 4}}  # fmt: skip
    source, _ = open_chosen(save(tmp_path / "old", weights, "standard", old))
    assert (source.activation, source.k) == (Activation.TOPK, 4)


def test_gemma_scope_2s_name_for_what_the_mlp_reads_is_resolved_by_hugging_faces(tmp_path, weights):
    metadata = {"hook_name": "blocks.2.hook_mlp_in", "hook_name_out": "blocks.2.hook_mlp_out"}
    folder = save(tmp_path / "t", weights, "transcoder", TRANSCODER | {"metadata": metadata})
    with pytest.raises(CatalogError, match="say --site"), open_source("saelens", folder):
        pass
    with open_source("saelens", folder, Options(site=Site.MLP_IN)) as source:
        assert source.site is Site.MLP_IN
    metadata["hf_hook_name"] = "model.layers.2.pre_feedforward_layernorm.output"
    folder = save(tmp_path / "t", weights, "transcoder", TRANSCODER | {"metadata": metadata})
    with open_source("saelens", folder) as source:
        assert source.site is Site.MLP_IN


def metadata(**keys):
    return {"metadata": SAE["metadata"] | keys}


REFUSED = [
    ("abstopk", SAE, "architecture 'abstopk' has no exact equivalent"),
    ("temporal", SAE, "architecture 'temporal'"),
    ("batchtopk", SAE, "save_inference_model saves it as a jumprelu"),
    ("nonsense", SAE, "architecture 'nonsense'"),
    ("standard", SAE | {"normalize_activations": "layer_norm"}, "scales each token"),
    ("standard", SAE | {"normalize_activations": "constant_norm_rescale"}, "scales each token"),
    ("standard", SAE | {"normalize_activations": True}, "fold_activation_norm_scaling_factor"),
    ("standard", SAE | {"normalize_activations": "covariance_whitening"}, "needs a matrix"),
    ("standard", SAE | {"normalize_activations": "new"}, "'new' is not known here"),
    ("standard", SAE | {"reshape_activations": "hook_z"}, "heads inside attention"),
    ("standard", SAE | {"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu'"),
    ("jumprelu", SAE | {"activation_fn": "topk"}, "activation_fn 'topk' is not exact"),
    ("standard", metadata(hook_head_index=3), "one attention head"),
    ("standard", metadata(hook_name="blocks.3.attn.hook_z"), "is inside attention"),
    ("standard", metadata(hook_name="blocks.3.ln2.hook_normalized"), "norm before its weight"),
    ("standard", metadata(hook_name="blocks.3.hook_q"), "no site of ours"),
    ("standard", {}, "which site"),
    ("standard", SAE | {"d_sae": K + 1}, "says otherwise"),
    ("standard", SAE | {"d_in": "12"}, r"d_in"),
    ("topk", SAE | {"k": 0}, "k is 0"),
    ("topk", SAE | {"k": K + 1}, "expected 1 to 40"),
    ("topk", SAE, "k is None"),
    ("transcoder", TRANSCODER | {"apply_b_dec_to_input": True}, "b_dec is at its output"),
    (
        "transcoder",
        TRANSCODER | {"metadata": TRANSCODER["metadata"]
                      | {"model_from_pretrained_kwargs": {"fold_ln": True}}},
        "fold_ln",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config", "message"), REFUSED)
def test_what_is_not_exact_is_refused_with_its_reason(
    tmp_path, weights, architecture, config, message
):
    folder = save(tmp_path / "sae", weights, architecture, config)
    with pytest.raises(CatalogError, match=message), open_source("saelens", folder):
        pass


def test_a_scaling_factor_of_ones_is_ignored_and_any_other_refused(tmp_path, weights):
    weights["extra_scaling_factor"] = np.ones(K, np.float32)
    with open_source("saelens", save(tmp_path / "sae", weights, "standard", SAE)):
        pass
    weights["extra_scaling_factor"][2] = 1.5
    folder = save(tmp_path / "sae", weights, "standard", SAE)
    with (
        pytest.raises(CatalogError, match="scales the decoder only"),
        open_source("saelens", folder),
    ):
        pass


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "threshold"])
def test_a_tensor_of_another_shape_is_refused_by_name(tmp_path, weights, name):
    told = "b_enc" if name == "W_enc" else name  # the encoder's shape is what others are held to
    weights[name] = weights[name][..., :-1].copy()
    folder = save(tmp_path / "sae", weights, "jumprelu", SAE)
    with pytest.raises(CatalogError, match=f"'{told}' is"), open_source("saelens", folder):
        pass


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_a_tensor_that_is_missing_is_refused_by_name(tmp_path, weights, name):
    del weights[name]
    folder = save(tmp_path / "sae", weights, "jumprelu", SAE)
    with pytest.raises(CatalogError, match=f"'{name}' is missing"), open_source("saelens", folder):
        pass


def test_a_layer_that_contradicts_the_file_is_refused(tmp_path, weights):
    folder = save(tmp_path / "sae", weights, "standard", SAE)
    with (
        pytest.raises(CatalogError, match="layer is 3 by the file, 4 was asked for"),
        open_source("saelens", folder, Options(layer=4)),
    ):
        pass


def test_an_index_out_of_range_is_refused(tmp_path, weights):
    with open_source("saelens", save(tmp_path / "sae", weights, "standard", SAE)) as source:
        for index in (-1, K):
            with pytest.raises(CatalogError, match=f"no latent {index} there"):
                source.columns([0, index])
        with pytest.raises(CatalogError, match="no latent 'x' there"):
            source.index_of("x")
        assert source.index_of("7") == 7


def test_the_whole_sae_can_be_read_at_once(tmp_path, weights):
    with open_source("saelens", save(tmp_path / "sae", weights, "jumprelu", SAE)) as source:
        columns = source.columns(range(K))
    np.testing.assert_array_equal(columns.W_enc, weights["W_enc"].T)
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"])


def test_someone_who_used_the_defaults_of_transformer_lens_is_told_what_they_do(tmp_path, weights):
    source, _ = open_chosen(save(tmp_path / "a", weights, "standard", SAE))
    assert "centre the stream" in source.notes[0]
    raw = metadata(model_from_pretrained_kwargs={"center_writing_weights": False})
    source, _ = open_chosen(save(tmp_path / "b", weights, "standard", raw))
    assert source.notes == ()
