"""EleutherAI's sparsify in plain numpy. Shapes: T tokens, D width, K latents."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from steerscope.catalog.formats import Options, open_source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

T, D, K, TOP = 32, 12, 48, 4
GEMMA = Options(architecture="Gemma2ForCausalLM")


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    shapes = {"encoder.weight": (K, D), "encoder.bias": (K,), "W_dec": (K, D), "b_dec": (D,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save(folder, weights, **config):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae.safetensors")
    tree = {"activation": "topk", "expansion_factor": 4, "normalize_decoder": True,
            "num_latents": K, "k": TOP, "multi_topk": False, "skip_connection": False,
            "transcode": False, "d_in": D, **config}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(tree))
    return folder


def topk(pre_TK):
    """Sparsify: the k largest of relu(pre), all others 0."""
    acts_TK = np.maximum(pre_TK, 0)
    order_TK = np.argsort(-acts_TK, axis=1)[:, :TOP]
    kept_TK = np.zeros_like(acts_TK)
    np.put_along_axis(kept_TK, order_TK, np.take_along_axis(acts_TK, order_TK, 1), 1)
    return kept_TK


@pytest.mark.parametrize("transcode", [False, True])
def test_its_encoder_is_topk_over_relu_and_only_a_sae_subtracts_b_dec(tmp_path, weights, transcode):
    folder = save(tmp_path / "layers.5.mlp", weights, transcode=transcode)
    with open_source("sparsify", folder) as source:
        assert (source.activation, source.k, source.layer) == (Activation.TOPK, TOP, 5)
        blocks = list(source.whole_encoder())
        columns = source.columns([7, 2])
    x_TD = np.random.default_rng(1).normal(size=(T, D))
    centred_TD = x_TD if transcode else x_TD - weights["b_dec"]
    expected = topk(centred_TD @ weights["encoder.weight"].T + weights["encoder.bias"])
    W_enc_KD = np.concatenate([block.W_enc for block in blocks])
    b_enc_K = np.concatenate([block.b_enc for block in blocks])
    np.testing.assert_allclose(topk(x_TD @ W_enc_KD.T + b_enc_K), expected, atol=1e-5)
    np.testing.assert_array_equal(columns.W_enc, W_enc_KD[[7, 2]])
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"][[7, 2]])


@pytest.mark.parametrize(
    ("hookpoint", "transcode", "kind", "site", "steers"),
    [
        ("layers.5", False, FeatureKind.SAE_LATENT, Site.RESID_POST, True),
        ("h.5", False, FeatureKind.SAE_LATENT, Site.RESID_POST, True),
        ("layers.5.mlp", False, FeatureKind.SAE_LATENT, Site.MLP_OUT, True),
        ("layers.5.self_attn", False, FeatureKind.SAE_LATENT, Site.ATTN_OUT, True),
        ("layers.5.mlp", True, FeatureKind.TRANSCODER_LATENT, Site.MLP_IN, True),
        ("layers.5", True, FeatureKind.TRANSCODER_LATENT, Site.RESID_PRE, False),
    ],
)
def test_the_folders_name_says_where_it_belongs(
    tmp_path, weights, hookpoint, transcode, kind, site, steers
):
    with open_source(
        "sparsify", save(tmp_path / hookpoint, weights, transcode=transcode)
    ) as source:
        assert (source.kind, source.site, source.layer) == (kind, site, 5)
        assert (source.columns([0]).W_dec is not None) is steers
        assert bool(source.notes) is not steers


def test_a_skip_connection_changes_neither_reading_nor_writing(tmp_path, weights):
    with open_source("sparsify", save(tmp_path / "layers.5.mlp", weights, transcode=True)) as one:
        plain = one.columns(range(K))
    weights["W_skip"] = np.ones((D, D), np.float32)
    folder = save(tmp_path / "skip" / "layers.5.mlp", weights, transcode=True, skip_connection=True)
    with open_source("sparsify", folder) as other:
        skipping = other.columns(range(K))
    np.testing.assert_array_equal(plain.W_enc, skipping.W_enc)
    np.testing.assert_array_equal(plain.W_dec, skipping.W_dec)


def test_where_a_norm_follows_the_mlp_its_output_is_not_ours(tmp_path, weights):
    folder = save(tmp_path / "layers.5.mlp", weights)
    with (
        pytest.raises(CatalogError, match="before the norm"),
        open_source("sparsify", folder, GEMMA),
    ):
        pass
    folder = save(tmp_path / "layers.5.mlp", weights, transcode=True)
    with open_source("sparsify", folder, GEMMA) as source:
        assert source.columns([0]).W_dec is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, "'groupmax' is not exact"),
        ({"signed": True}, "signed"),
        ({"k": 0}, "k is 0"),
        ({"k": K + 1}, "says otherwise"),
        ({"num_latents": K + 1}, "says otherwise"),
        ({"d_in": D + 1}, "says otherwise"),
        ({"k": "4"}, r"\$\.k"),
    ],
)
def test_what_is_not_exact_is_refused_with_its_reason(tmp_path, weights, config, message):
    folder = save(tmp_path / "layers.5", weights, **config)
    with pytest.raises(CatalogError, match=message), open_source("sparsify", folder):
        pass


def test_a_transcoder_of_attention_reads_no_site_of_ours(tmp_path, weights):
    folder = save(tmp_path / "layers.5.self_attn", weights, transcode=True)
    with pytest.raises(CatalogError, match="no site of ours"), open_source("sparsify", folder):
        pass


def test_a_folder_of_another_name_needs_site_and_layer(tmp_path, weights):
    folder = save(tmp_path / "downloaded", weights)
    with pytest.raises(CatalogError, match="which site"), open_source("sparsify", folder):
        pass
    options = Options(site=Site.RESID_POST, layer=2)
    with open_source("sparsify", folder, options) as source:
        assert (source.site, source.layer) == (Site.RESID_POST, 2)
