"""Gemma Scope's ``params.npz`` in plain numpy, and what is no such file.

Shapes: T tokens, D width, K latents.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from steerscope.catalog.formats import Options, open_source
from steerscope.catalog.formats.npz import NpzFile
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

T, D, K = 32, 12, 40


def some_weights():
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (D, K), "W_dec": (K, D), "b_enc": (K,), "b_dec": (D,), "threshold": (K,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def weights():
    return some_weights()


def save(folder, weights, variant="res", write=np.savez):
    folder = folder / f"gemma-scope-2b-pt-{variant}" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "params.npz", **weights)
    return folder / "params.npz"


def test_it_is_a_jumprelu_whose_b_dec_is_not_subtracted(tmp_path, weights):
    x_TD = np.random.default_rng(1).normal(size=(T, D))
    pre_TK = x_TD @ weights["W_enc"] + weights["b_enc"]
    expected = np.maximum(pre_TK, 0) * (pre_TK > weights["threshold"])
    with open_source("gemma-scope", save(tmp_path, weights)) as source:
        assert (source.site, source.layer) == (Site.RESID_POST, 12)
        assert source.activation is Activation.JUMPRELU
        columns = source.columns([5, 39, 0])
    ours = x_TD @ columns.W_enc.T + columns.b_enc
    ours = np.where(ours > columns.threshold, ours, 0)
    np.testing.assert_allclose(ours, expected[:, [5, 39, 0]], atol=1e-5)
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"][[5, 39, 0]])
    assert source.provenance["sae"] == "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"


def test_a_folder_or_a_link_into_a_cache_will_do(tmp_path, weights):
    file = save(tmp_path, weights)
    blob = file.rename(tmp_path / "blob")
    file.symlink_to(blob)
    with open_source("gemma-scope", file.parent) as source:
        assert (source.site, source.layer) == (Site.RESID_POST, 12)


def test_the_mlps_variant_is_at_mlp_out(tmp_path, weights):
    with open_source("gemma-scope", save(tmp_path, weights, "mlp")) as source:
        assert source.site is Site.MLP_OUT


@pytest.mark.parametrize(
    ("variant", "message"),
    [("att", "inside attention"), ("transcoders", "the norm before its weight")],
)
def test_what_reads_no_site_of_ours_is_refused_even_if_one_is_said(
    tmp_path, weights, variant, message
):
    file = save(tmp_path, weights, variant)
    with (
        pytest.raises(CatalogError, match=message),
        open_source("gemma-scope", file, Options(site=Site.MLP_IN)),
    ):
        pass


def test_a_transcoder_of_a_known_model_has_the_norms_weight_divided_out(tmp_path, weights):
    norm_D = np.linspace(0.5, 2, D, dtype=np.float32)
    options = Options(mlp_norm=lambda _: norm_D)
    with open_source("gemma-scope", save(tmp_path, weights, "transcoders"), options) as source:
        assert (source.kind, source.site) == (FeatureKind.TRANSCODER_LATENT, Site.MLP_IN)
        columns = source.columns([5])
    np.testing.assert_allclose(columns.W_enc[0] * norm_D, weights["W_enc"][:, 5], rtol=1e-6)
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"][[5]])


def test_without_a_telling_path_site_and_layer_must_be_said(tmp_path, weights):
    np.savez(tmp_path / "params.npz", **weights)
    with (
        pytest.raises(CatalogError, match="which site"),
        open_source("gemma-scope", tmp_path / "params.npz"),
    ):
        pass
    options = Options(site=Site.RESID_PRE, layer=4)
    with open_source("gemma-scope", tmp_path / "params.npz", options) as source:
        assert (source.site, source.layer) == (Site.RESID_PRE, 4)


def test_a_compressed_file_is_refused_with_what_to_do(tmp_path, weights):
    file = save(tmp_path, weights, write=np.savez_compressed)
    with (
        pytest.raises(CatalogError, match=r"compressed \(numpy.savez does not\)"),
        open_source("gemma-scope", file),
    ):
        pass


def test_objects_are_not_unpickled(tmp_path, weights):
    weights["threshold"] = np.array([print] * K, dtype=object)
    with (
        pytest.raises(CatalogError, match="another size than its shape"),
        open_source("gemma-scope", save(tmp_path, weights)),
    ):
        pass


def test_fortran_order_is_refused_not_misread(tmp_path, weights):
    weights["W_enc"] = np.asfortranarray(weights["W_enc"])
    with (
        pytest.raises(CatalogError, match="Fortran order"),
        open_source("gemma-scope", save(tmp_path, weights)),
    ):
        pass


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_read_as_float32(tmp_path, weights, dtype):
    weights["W_dec"] = weights["W_dec"].astype(dtype)
    with open_source("gemma-scope", save(tmp_path, weights)) as source:
        W_dec = source.columns([3]).W_dec
    np.testing.assert_array_equal(W_dec, weights["W_dec"][[3]].astype(np.float32))


def test_integers_are_refused_by_name(tmp_path, weights):
    weights["W_enc"] = weights["W_enc"].astype(np.int32)
    with (
        pytest.raises(CatalogError, match="'W_enc' is <i4, expected floats"),
        open_source("gemma-scope", save(tmp_path, weights)) as source,
    ):
        source.columns([0])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_or_with_a_byte_changed_is_read_or_refused_never_worse(
    data, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp() / "cut_npz"
    folder.mkdir(exist_ok=True)
    whole = folder / "whole.npz"
    if not whole.exists():
        np.savez(whole, **some_weights())
    content = bytearray(whole.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / "params.npz").write_bytes(content)
    options, told = Options(site=Site.RESID_POST, layer=0), None
    try:
        with open_source("gemma-scope", folder / "params.npz", options) as source:
            source.columns([0, K - 1])
    except CatalogError as error:
        told = str(error)
    assert told is None or str(folder) in told


def test_a_file_cut_short_is_always_refused(tmp_path):
    np.savez(tmp_path / "whole.npz", **some_weights())
    content = (tmp_path / "whole.npz").read_bytes()
    for size in range(0, len(content), 97):
        (tmp_path / "cut.npz").write_bytes(content[:size])
        with pytest.raises(CatalogError):
            NpzFile(tmp_path / "cut.npz")
