"""``steerscope catalog``, as people call it: what it prints, how it ends, what it leaves.

Shapes: D width, K latents.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file
from steerscope.catalog import store
from steerscope.catalog.model import Activation, LabelSource
from steerscope.cli.main import main

D, K, LAYERS = 16, 50, 4

MB = 1_000_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("world") / "model", D)


def write_model(folder, width, architecture="LlamaForCausalLM"):
    rng = np.random.default_rng(1)
    folder.mkdir()
    names = [
        f"model.layers.{i}.{name}"
        for i in range(LAYERS)
        for name in ("input_layernorm.weight", "self_attn.q_proj.weight")
    ]
    tensors = {
        name: rng.normal(size=(4, width) if "proj" in name else width).astype(np.float32)
        for name in [*names, "model.norm.weight"]
    }
    save_file(tensors, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    config = {"architectures": [architecture], "hidden_size": width, "vocab_size": 32,
              "num_hidden_layers": LAYERS}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sae(folder, seed=0, d_in=D, **config):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (d_in, K), "W_dec": (K, d_in), "b_enc": (K,), "b_dec": (d_in,),
              "threshold": (K,)}  # fmt: skip
    tensors = {name: np.abs(rng.normal(size=s)).astype(np.float32) for name, s in shapes.items()}
    folder.mkdir(exist_ok=True)
    tree = {"d_in": d_in, "d_sae": K, "architecture": "jumprelu",
            "metadata": {"hook_name": "blocks.2.hook_resid_post", "model_name": "tiny",
                         "model_from_pretrained_kwargs": {"center_writing_weights": False}},
            **config}  # fmt: skip
    if tree["architecture"] == "topk":
        del tensors["threshold"]
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture
def sae(tmp_path):
    return write_sae(tmp_path / "sae")


@pytest.fixture
def bring(model, tmp_path):
    """Import from a path; the exit code."""

    def run(format, path, *features, out=tmp_path / "out", options=()):
        told = [f"--feature={feature}" for feature in features]
        where = ["--model", str(model), "--out", str(out)]
        return main(["catalog", "import", format, str(path), *told, *where, *map(str, options)])

    return run


def test_features_come_in_with_their_vectors_their_labels_and_where_they_are_from(
    bring, sae, tmp_path, capsys
):
    labels = ["--label", "known=a known name = yes", "--name", "names"]
    assert bring("saelens", sae, "known=7", "other=49", options=labels) == 0
    catalog = store.load(tmp_path / "out")
    told = capsys.readouterr().out
    assert catalog.digest in told
    assert "known  resid_post.2  sae_latent  jumprelu  read, steer" in told
    known, other = catalog.document.features
    assert (catalog.document.name, catalog.document.version) == ("names", "1")
    assert (known.label, known.label_source) == ("a known name = yes", LabelSource.HUMAN)
    assert known.source == {
        "format": "saelens", "from": "sae", "architecture": "jumprelu", "model_name": "tiny",
        "hook_name": "blocks.2.hook_resid_post", "latent": "7",
    }  # fmt: skip
    assert other.label == ""
    weights = load_file(sae / "sae_weights.safetensors")
    np.testing.assert_array_equal(catalog.vectors["known"].W_dec, weights["W_dec"][7])
    np.testing.assert_array_equal(catalog.vectors["known"].W_enc, weights["W_enc"][:, 7])


def test_a_second_import_appends_and_leaves_the_rest_as_it_was(bring, sae, tmp_path):
    bring("saelens", sae, "a=1")
    path = tmp_path / "out" / store.CATALOG_FILE
    tree = yaml.safe_load(path.read_text())
    terms = [{"feature": "a", "reduce": "max_prompt", "weight": 1.0}]
    tree["signals"] = [{"name": "s", "bias": 0.5, "labels": [{"label": "any"}], "terms": terms}]
    path.write_text(yaml.safe_dump(tree))
    before = store.load(tmp_path / "out")
    assert bring("saelens", sae, "b=2", options=["--append"]) == 0
    after = store.load(tmp_path / "out")
    assert [f.name for f in after.document.features] == ["a", "b"]
    assert after.signals == before.signals
    np.testing.assert_array_equal(after.vectors["a"].W_enc, before.vectors["a"].W_enc)


def refused(capsys, code, message):
    assert code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, "one line"
    assert message in error


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ((), [], "no feature was named"),
        (("a=1", "a=2"), [], "'a' is named twice"),
        (("a=50",), [], "no latent '50' there, only 0 to 49"),
        (("a=-1",), [], "no latent '-1' there"),
        (("a",), [], "expected NAME=INDEX"),
        (("Bad Name=1",), [], "feature 'Bad Name'"),
        (("a=1",), ["--layer", 3], "layer is 2 by the file, 3 was asked for"),
        (("a=1",), ["--site", "resid_pre"], "site is resid_post by the file"),
        (("a=1",), ["--site", "nowhere"], "--site 'nowhere': expected one of resid_pre"),
        (("a=1",), ["--label", "b=x"], "--label 'b': no such feature"),
        (("a=1",), ["--label", "a"], "expected NAME=TEXT"),
        (("a=1",), ["--append"], "catalog.yaml: No such file"),
        (("a=3/1",), [], "layer is 2 by the file, 3 was asked for"),
        (("a=3/1",), ["--layer", 2], "contradicts --layer 2"),
        (("a=1",), ["--graph", "g.json"], "only with the format circuit-tracer"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_one_line_and_nothing_is_written(
    bring, sae, tmp_path, capsys, features, options, message
):
    refused(capsys, bring("saelens", sae, *features, options=options), message)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sae"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "hypernet"}, "architecture 'hypernet'"),
        ({"d_in": D + 4}, f"is of width {D + 4}, the model of {D}"),
        ({"metadata": {"hook_name": "blocks.9.hook_resid_post"}}, "layer 9 does not exist"),
    ],
)
def test_a_dictionary_that_is_not_for_the_model_is_refused(
    bring, tmp_path, capsys, config, message
):
    sae = write_sae(tmp_path / "sae", **config)
    refused(capsys, bring("saelens", sae, "a=1"), message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_and_nothing_is_written(
    bring, sae, tmp_path, capsys, spoilt
):
    path = sae / "sae_weights.safetensors"
    weights = load_file(path)
    weights["W_dec"][7, 3] = spoilt
    save_file(weights, path)
    refused(capsys, bring("saelens", sae, "a=7"), "'a.W_dec' holds NaN or infinity")
    assert not (tmp_path / "out").exists()
    assert bring("saelens", sae, "a=8") == 0, "another latent of the same file is well"


def test_a_name_that_the_catalog_has_and_a_folder_that_exists_are_refused(
    bring, sae, tmp_path, capsys
):
    bring("saelens", sae, "a=1")
    before = store.load(tmp_path / "out").digest
    refused(capsys, bring("saelens", sae, "b=1"), "exists already; --append adds to it")
    refused(capsys, bring("saelens", sae, "a=2", options=["--append"]), "in the catalog already")
    assert store.load(tmp_path / "out").digest == before


def test_a_catalog_of_another_model_is_not_added_to(bring, sae, tmp_path, capsys):
    bring("saelens", sae, "a=1")
    other = write_model(tmp_path / "other", D, "QwenForCausalLM")
    code = bring("saelens", sae, "b=1", options=["--append", "--model", other])
    refused(capsys, code, "architecture is QwenForCausalLM")


def test_an_unknown_format_names_those_there_are(bring, sae, capsys):
    refused(capsys, bring("pickle", sae, "a=1"), "no format 'pickle'; there are saelens, gemma")


def test_a_topk_dictionary_comes_whole_with_its_cost_beside_the_models(bring, tmp_path, capsys):
    sae = write_sae(tmp_path / "sae", architecture="topk", k=3)
    assert bring("saelens", sae, "a=7", "b=9") == 0
    told = capsys.readouterr().out
    assert f"dictionary resid_post_2_topk: {K * D:,} multiply-adds a token, 3.2 kB" in told
    assert f"the model itself: about {LAYERS * 4 * D + 32 * D:,} multiply-adds a token" in told
    catalog = store.load(tmp_path / "out")
    (dictionary,) = catalog.document.dictionaries
    assert (dictionary.d_sae, dictionary.k) == (K, 3)
    assert catalog.feature("a").activation is Activation.TOPK
    weights = load_file(sae / "sae_weights.safetensors")
    whole = catalog.dictionary_vectors("resid_post_2_topk")
    np.testing.assert_array_equal(whole.W_enc, weights["W_enc"].T)
    folded = weights["b_enc"] - weights["b_dec"] @ weights["W_enc"]
    np.testing.assert_allclose(whole.b_enc, folded, rtol=1e-5)
    assert not (tmp_path / "out" / "sae").exists()


def test_a_topk_dictionary_is_stored_once_and_another_beside_it(bring, tmp_path, capsys):
    sae = write_sae(tmp_path / "sae", architecture="topk", k=3)
    other = write_sae(tmp_path / "other", seed=1, architecture="topk", k=3)
    bring("saelens", sae, "a=7")
    bring("saelens", sae, "b=8", options=["--append"])
    bring("saelens", other, "c=8", options=["--append"])
    catalog = store.load(tmp_path / "out")
    assert [f.dictionary for f in catalog.document.features] == [
        "resid_post_2_topk", "resid_post_2_topk", "resid_post_2_topk_2",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        catalog.dictionary_vectors("resid_post_2_topk_2").W_enc,
        load_file(other / "sae_weights.safetensors")["W_enc"].T,
    )


def write_transcoders(folder):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for layer in range(LAYERS):
        shapes = {"W_enc": (K, D), "W_dec": (K, D), "b_enc": (K,), "b_dec": (D,)}
        tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    config = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
              "feature_output_hook": "mlp.hook_out", "scan": "tiny"}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def write_graph(path):
    def node(layer, index, position, clerp):
        paired = (layer + index) * (layer + index + 1) // 2 + index
        return {"node_id": f"{layer}_{index}_{position}", "feature": paired, "layer": str(layer),
                "feature_type": "cross layer transcoder", "clerp": clerp}  # fmt: skip

    nodes = [node(1, 8, 4, "names"), node(3, 11, 4, "cities"), node(0, 2, 4, "")]
    path.write_text(json.dumps({"nodes": nodes, "qParams": {"pinnedIds": ["1_8_4", "3_11_4"]}}))
    return path


def test_the_features_pinned_in_a_graph_come_in_from_their_layers(bring, tmp_path):
    folder, graph = write_transcoders(tmp_path / "plt"), write_graph(tmp_path / "g.json")
    options = ["--graph", graph]
    assert bring("circuit-tracer", folder, options=options) == 0
    catalog = store.load(tmp_path / "out")
    assert [(f.name, f.layer, f.label, f.label_source) for f in catalog.document.features] == [
        ("layer1_8", 1, "names", LabelSource.AUTOMATIC),
        ("layer3_11", 3, "cities", LabelSource.AUTOMATIC),
    ]
    weights = load_file(folder / "layer_3.safetensors")
    np.testing.assert_array_equal(catalog.vectors["layer3_11"].W_enc, weights["W_enc"][11])


def test_features_of_a_graph_can_be_named_by_node_and_labelled_by_a_human(bring, tmp_path):
    folder, graph = write_transcoders(tmp_path / "plt"), write_graph(tmp_path / "g.json")
    options = ["--graph", graph, "--label", "first=opens a sentence"]
    assert bring("circuit-tracer", folder, "first=0_2_4", "city=3_11_4", options=options) == 0
    first, city = store.load(tmp_path / "out").document.features
    assert (first.layer, first.source["latent"]) == (0, "2")
    assert (first.label, first.label_source) == ("opens a sentence", LabelSource.HUMAN)
    assert (city.label, city.label_source) == ("cities", LabelSource.AUTOMATIC)


def test_several_layers_are_named_layer_slash_index(bring, tmp_path):
    folder = write_transcoders(tmp_path / "plt")
    assert bring("circuit-tracer", folder, "a=1/5", "b=3/5", "c=1/6") == 0
    found = [(f.name, f.layer) for f in store.load(tmp_path / "out").document.features]
    assert sorted(found) == [("a", 1), ("b", 3), ("c", 1)]


def test_directions_are_named_by_their_tensors(bring, tmp_path):
    save_file({"up": np.ones(D, np.float32), "down": -np.ones(D, np.float32)},
              tmp_path / "v.safetensors")  # fmt: skip
    options = ["--site", "resid_pre", "--layer", 1]
    assert bring("directions", tmp_path / "v.safetensors", "rise=up", options=options) == 0
    (rise,) = store.load(tmp_path / "out").document.features
    assert (rise.site, rise.layer, rise.source["latent"]) == ("resid_pre", 1, "up")


def test_inspect_tells_features_signals_policies_sizes_and_cost(tiny_world, capsys):
    assert main(["catalog", "inspect", str(tiny_world.catalog)]) == 0
    told = capsys.readouterr().out
    catalog = store.load(tiny_world.catalog)
    assert catalog.digest in told
    for name in [*catalog.vectors, *(s.name for s in catalog.signals)]:
        assert name in told
    lines = told.splitlines()
    header = next(line for line in lines if line.startswith("FEATURE"))
    rows = [line for line in lines if "resid_post." in line]
    assert len(rows) == len(catalog.vectors)
    assert {row.index("resid_post.") for row in rows} == {header.index("SITE")}, "columns align"
    width = catalog.document.model.hidden_size
    steerable = sum(v.W_dec is not None for v in catalog.vectors.values())
    assert f"{(len(catalog.vectors) + steerable) * width:,} multiply-adds a token" in told


def test_inspect_tells_what_topk_costs(bring, tmp_path, capsys):
    bring("saelens", write_sae(tmp_path / "sae", architecture="topk", k=3), "a=7")
    capsys.readouterr()
    assert main(["catalog", "inspect", str(tmp_path / "out")]) == 0
    assert f"resid_post_2_topk, k=3: {K * D:,} multiply-adds a token" in capsys.readouterr().out


def test_verify_ends_with_0_for_a_catalog_of_the_model_and_2_for_any_other(
    bring, sae, model, tmp_path, capsys
):
    bring("saelens", sae, "a=1")
    out = str(tmp_path / "out")
    assert main(["catalog", "verify", out]) == 0
    assert main(["catalog", "verify", out, "--model", str(model)]) == 0
    other = write_model(tmp_path / "other", D + 1)
    capsys.readouterr()
    refused(capsys, main(["catalog", "verify", out, "--model", str(other)]), "hidden_size is 17")
    path = tmp_path / "out" / store.TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    refused(capsys, main(["catalog", "verify", out]), "truncated")


def test_catalogs_merge_unless_they_share_a_name(bring, sae, tmp_path, capsys):
    topk = write_sae(tmp_path / "topk", architecture="topk", k=3)
    paths = [str(tmp_path / name) for name in ("one", "two", "both", "again")]
    bring("saelens", sae, "a=1", out=tmp_path / "one")
    bring("saelens", topk, "b=1", out=tmp_path / "two")
    assert main(["catalog", "merge", *paths[:2], "--out", paths[2]]) == 0
    both = store.load(tmp_path / "both")
    assert (both.document.name, sorted(both.vectors)) == ("one+two", ["a", "b"])
    assert main(["catalog", "diff", paths[2], paths[2]]) == 0
    capsys.readouterr()
    code = main(["catalog", "merge", paths[0], paths[2], "--out", paths[3]])
    refused(capsys, code, "features: 'a' is in both catalogs")
    assert not (tmp_path / "again").exists()


def test_diff_ends_with_0_if_nothing_differs_and_1_with_what_does(bring, sae, tmp_path, capsys):
    bring("saelens", sae, "a=1", "b=2", "gone=3", out=tmp_path / "one", options=["--name", "n"])
    moved = load_file(sae / "sae_weights.safetensors")
    moved["W_dec"][2] *= -2
    moved["threshold"][2] += 1
    save_file(moved, sae / "sae_weights.safetensors")
    options = ["--name", "n", "--label", "a=new"]
    bring("saelens", sae, "a=1", "b=2", "came=4", out=tmp_path / "two", options=options)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    capsys.readouterr()
    assert main(["catalog", "diff", one, one]) == 0
    assert capsys.readouterr().out == ""
    assert main(["catalog", "diff", one, two]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["- feature gone", "+ feature came", "~ feature a: label '' -> 'new'"]
    assert lines[3].startswith("~ feature b: threshold")
    assert "W_dec cosine -1.000000" in lines[3]
    assert "W_enc" not in lines[3]
    assert len(lines) == 4


def test_diff_tells_a_changed_topk_encoder(bring, tmp_path, capsys):
    for name, seed in (("one", 0), ("two", 1)):
        sae = write_sae(tmp_path / "sae", seed=seed, architecture="topk", k=3)
        bring("saelens", sae, "a=1", out=tmp_path / name, options=["--name", "n"])
    capsys.readouterr()
    assert main(["catalog", "diff", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert "~ dictionary resid_post_2_topk: its encoder" in capsys.readouterr().out


BIG_D, BIG_K = 2304, 65536
MAX_SECONDS = 2.0
MAX_BYTES = 500 * MB
MIN_FREE_BYTES = 4000 * MB


def write_big_sae(folder: Path, architecture: str) -> Path:
    """As large as a real one: 604 MB each of W_enc and W_dec, the same numbers over and over."""
    folder.mkdir()
    shapes = {"W_enc": [BIG_D, BIG_K], "W_dec": [BIG_K, BIG_D], "b_enc": [BIG_K],
              "b_dec": [BIG_D], "threshold": [BIG_K]}  # fmt: skip
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    block = np.random.default_rng(0).normal(size=BIG_D * BIG_K // 64).astype("<f4")
    with (folder / "sae_weights.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(2 * 64):
            file.write(block.data)
        file.write(bytes(4 * (2 * BIG_K + BIG_D)))
        file.flush()
        os.fsync(file.fileno())
    config = {"d_in": BIG_D, "d_sae": BIG_K, "architecture": architecture, "k": 64,
              "metadata": {"hook_name": "blocks.2.hook_resid_post"}}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def big_sae(tmp_path):
    """Makes one, deleted at the end."""
    if shutil.disk_usage(tmp_path).free < MIN_FREE_BYTES:
        pytest.skip("needs 4 GB of free disk")
    yield lambda architecture: write_big_sae(tmp_path / "big", architecture)
    shutil.rmtree(tmp_path)


MEASURE = """
import json, resource, subprocess, sys, time
started = time.monotonic()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
seconds = time.monotonic() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024]))
"""
"""Run a command. In a small process: what its parent had in memory counts as the command's."""


def import_sixteen(sae: Path, model: Path, out: Path) -> tuple[float, int]:
    """Seconds and peak bytes of the command in a process of its own."""
    features = [f"--feature=f{i}={i * 4099 % BIG_K}" for i in range(16)]
    command = [sys.executable, "-m", "steerscope.cli.main", "catalog", "import", "saelens"]
    command += [str(sae), *features, "--model", str(model), "--out", str(out), "--name=big"]
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, *command], check=True, capture_output=True, text=True
    )
    seconds, peak = json.loads(measured.stdout)
    return seconds, peak


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def test_sixteen_of_65536_latents_are_imported_in_2_seconds_and_500_mb(big_sae, tmp_path):
    sae, model = big_sae("jumprelu"), write_model(tmp_path / "model", BIG_D)
    warm_s, warm_bytes = import_sixteen(sae, model, tmp_path / "warm")
    forget(sae / "sae_weights.safetensors")
    cold_s, cold_bytes = import_sixteen(sae, model, tmp_path / "cold")
    print(f"warm {warm_s:.2f} s, {warm_bytes / MB:.0f} MB")
    print(f"cold {cold_s:.2f} s, {cold_bytes / MB:.0f} MB")
    assert warm_s <= MAX_SECONDS
    assert max(warm_bytes, cold_bytes) <= MAX_BYTES
    assert store.load(tmp_path / "warm").digest == store.load(tmp_path / "cold").digest


def test_a_topk_dictionary_of_65536_latents_is_copied_in_500_mb(big_sae, tmp_path):
    sae, model = big_sae("topk"), write_model(tmp_path / "model", BIG_D)
    seconds, peak = import_sixteen(sae, model, tmp_path / "out")
    print(f"{seconds:.2f} s, {peak / MB:.0f} MB")
    assert peak <= MAX_BYTES
    assert (tmp_path / "out" / store.TENSORS_FILE).stat().st_size > 4 * BIG_D * BIG_K
