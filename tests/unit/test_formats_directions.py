"""Directions, probes and control vectors: one equation, and nothing that is none of these.

Shapes: T tokens, D width.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from steerscope.catalog.formats import Options, open_source
from steerscope.catalog.model import Activation, FeatureKind, Site
from steerscope.errors import CatalogError

T, D = 16, 24
AT = Options(site=Site.RESID_POST, layer=2)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def read(columns, x_TD):
    return x_TD @ columns.W_enc.T + columns.b_enc


def test_adding_to_a_direction_adds_so_much_of_the_vector_and_clamping_sets_what_is_read(
    tmp_path, rng
):
    vector_D = rng.normal(size=D).astype(np.float32)
    save_file({"happy": vector_D}, tmp_path / "v.safetensors")
    with open_source("directions", tmp_path / "v.safetensors", AT) as source:
        assert (source.kind, source.activation) == (FeatureKind.DIRECTION, Activation.IDENTITY)
        assert (source.site, source.layer, source.names) == (Site.RESID_POST, 2, ("happy",))
        columns = source.columns([source.index_of("happy")])
    np.testing.assert_array_equal(columns.W_dec[0], vector_D)
    x_TD = rng.normal(size=(T, D))
    f_T1 = read(columns, x_TD)
    np.testing.assert_allclose(f_T1[:, 0], x_TD @ vector_D / (vector_D @ vector_D), atol=1e-6)
    clamped_TD = x_TD + (3.0 - f_T1) * columns.W_dec
    np.testing.assert_allclose(read(columns, clamped_TD), 3.0, atol=1e-5)


def test_a_files_own_metadata_says_where_its_directions_belong(tmp_path, rng):
    vectors = {name: rng.normal(size=(1, D)).astype(np.float32) for name in ("b", "a")}
    path = tmp_path / "v.safetensors"
    save_file(vectors, path, metadata={"site": "resid_pre", "layer": "7"})
    with open_source("directions", path) as source:
        assert (source.site, source.layer, source.names) == (Site.RESID_PRE, 7, ("a", "b"))
        np.testing.assert_array_equal(source.columns([1]).W_dec, vectors["b"])
    with (
        pytest.raises(CatalogError, match="layer is 7 by the file, 2 was asked for"),
        open_source("directions", path, Options(layer=2)),
    ):
        pass


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": np.zeros(D, np.float32)}, "is zero, NaN or infinite"),
        ({"a": np.full(D, np.nan, np.float32)}, "is zero, NaN or infinite"),
        ({"a": np.ones((2, D), np.float32)}, "expected one vector"),
        ({"a": np.ones((), np.float32)}, "expected one vector"),
        ({"a": np.ones(D, np.float32), "b": np.ones(4, np.float32)}, "widths"),
        ({"a": np.ones(D, np.int32)}, "expected floats"),
        ({}, "widths"),
    ],
)
def test_what_is_no_direction_is_refused(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "v.safetensors")
    with (
        pytest.raises(CatalogError, match=message),
        open_source("directions", tmp_path / "v.safetensors", AT),
    ):
        pass


@pytest.mark.parametrize("metadata", [{"site": "nowhere"}, {"layer": "two"}])
def test_metadata_that_makes_no_sense_is_refused(tmp_path, metadata):
    path = tmp_path / "v.safetensors"
    save_file({"a": np.ones(D, np.float32)}, path, metadata=metadata)
    with pytest.raises(CatalogError, match=r"v\.safetensors"), open_source("directions", path):
        pass


@pytest.mark.parametrize("shape", [(1, D), (D,)])
def test_a_probe_reads_its_logit_and_cannot_be_written(tmp_path, rng, shape):
    weight = rng.normal(size=shape).astype(np.float32)
    save_file({"weight": weight, "bias": np.float32([0.5])}, tmp_path / "probe.safetensors")
    (tmp_path / "probe_config.json").write_text(json.dumps({"layer_idx": 5, "probe_id": "hal"}))
    with open_source("linear-probe", tmp_path) as source:
        assert (source.kind, source.site, source.layer) == (
            FeatureKind.PROBE, Site.RESID_POST, 5,
        )  # fmt: skip
        columns = source.columns([0])
    assert columns.W_dec is None
    x_TD = rng.normal(size=(T, D))
    np.testing.assert_allclose(read(columns, x_TD)[:, 0], x_TD @ weight.ravel() + 0.5, atol=1e-5)
    assert source.provenance == {"probe_id": "hal"}


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"weight": np.ones((1, D), np.float32)}, AT, "'bias' is missing"),
        ({"bias": np.ones(1, np.float32)}, AT, "'weight' is missing"),
        ({"weight": np.ones((2, D), np.float32), "bias": np.ones(2, np.float32)}, AT, "one vector"),
        ({"weight": np.ones((1, D), np.float32), "bias": np.ones(2, np.float32)}, AT, "one number"),
        (
            {"weight": np.ones((1, D), np.float32), "bias": np.ones(1, np.float32)},
            Options(),
            "which layer",
        ),
    ],
)
def test_what_is_no_probe_is_refused(tmp_path, tensors, options, message):
    save_file(tensors, tmp_path / "probe.safetensors")
    with pytest.raises(CatalogError, match=message), open_source("linear-probe", tmp_path, options):
        pass


def write_gguf(path, directions, architecture="controlvector"):
    """As repeng's ``ControlVector.export_gguf`` writes it."""
    gguf = pytest.importorskip("gguf", reason="GGUF files are written with the gguf library")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(directions))
    for layer, vector in directions.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_control_vectors_layer_is_the_output_of_that_decoder_layer(tmp_path, rng):
    vectors = {i: rng.normal(size=D).astype(np.float32) for i in (3, 1, 2)}
    path = write_gguf(tmp_path / "happy.gguf", vectors)
    with open_source("repeng", path, Options(layer=2)) as source:
        assert (source.kind, source.site, source.layer) == (
            FeatureKind.DIRECTION, Site.RESID_POST, 2,
        )  # fmt: skip
        np.testing.assert_array_equal(source.columns([0]).W_dec, vectors[2][None])
    assert source.provenance == {"model_hint": "llama"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(), "which layer"),
        (Options(layer=9), "no direction.9; there are layers 1"),
        (Options(layer=1, site=Site.RESID_PRE), "site is resid_post by the file"),
    ],
)
def test_a_layer_that_is_not_there_is_refused(tmp_path, options, message):
    path = write_gguf(tmp_path / "v.gguf", {1: np.ones(D, np.float32)})
    with pytest.raises(CatalogError, match=message), open_source("repeng", path, options):
        pass


def test_a_gguf_model_is_no_control_vector(tmp_path):
    path = write_gguf(tmp_path / "v.gguf", {1: np.ones(D, np.float32)}, architecture="llama")
    with (
        pytest.raises(CatalogError, match=r"general\.architecture is 'llama'"),
        open_source("repeng", path, Options(layer=1)),
    ):
        pass


def test_a_gguf_file_cut_anywhere_is_refused(tmp_path):
    content = write_gguf(tmp_path / "v.gguf", {1: np.ones(D, np.float32)}).read_bytes()
    for size in range(0, len(content) - 1, 7):
        (tmp_path / "cut.gguf").write_bytes(content[:size])
        try:
            with open_source("repeng", tmp_path / "cut.gguf", Options(layer=1)) as source:
                vector = source.columns([0]).W_dec
        except CatalogError:
            continue
        np.testing.assert_array_equal(vector, np.ones((1, D)))  # only padding was cut
