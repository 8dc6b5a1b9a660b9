"""circuit-tracer's transcoders in plain numpy, and features pinned in its graphs.

Shapes: T tokens, D width, K latents.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from steerscope.catalog.formats import Options, attribution_graph, open_source
from steerscope.catalog.model import Activation, LabelSource, Site
from steerscope.errors import CatalogError

T, D, K = 32, 12, 40
THRESHOLD = "activation_function.threshold"
CONFIG = {
    "model_kind": "transcoder_set",
    "model_name": "meta-llama/Llama-3.2-1B",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "mlp.hook_out",
    "scan": "llama-plt",
}


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (K, D), "W_dec": (K, D), "b_enc": (K,), "b_dec": (D,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def save(folder, weights, layer=1, config=CONFIG):
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / f"layer_{layer}.safetensors")
    if config is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def save_cross_layer(folder, weights, layer=1, config=None):
    folder.mkdir(exist_ok=True)
    named = {f"{name}_{layer}": w for name, w in weights.items() if name != "W_dec"}
    save_file(named, folder / f"W_enc_{layer}.safetensors")
    config = CONFIG | {"model_kind": "cross_layer_transcoder"} | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def pre(columns, x_TD):
    return x_TD @ columns.W_enc.T + columns.b_enc


def test_a_layers_transcoder_is_relu_and_does_not_subtract_b_dec(tmp_path, weights):
    x_TD = np.random.default_rng(1).normal(size=(T, D))
    with open_source("circuit-tracer", save(tmp_path, weights), Options(layer=1)) as source:
        assert (source.site, source.layer, source.activation) == (
            Site.MLP_IN, 1, Activation.RELU,
        )  # fmt: skip
        columns = source.columns([8, 3])
    expected = x_TD @ weights["W_enc"].T + weights["b_enc"]
    np.testing.assert_allclose(pre(columns, x_TD), expected[:, [8, 3]], atol=1e-5)
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"][[8, 3]])


def test_its_jump_keeps_what_is_above_a_threshold_below_zero(tmp_path, weights):
    """x * (x > threshold), without a relu: as the library has it."""
    weights[THRESHOLD] = np.linspace(-1, 1, K, dtype=np.float32)
    with open_source("circuit-tracer", save(tmp_path, weights), Options(layer=1)) as source:
        assert source.activation is Activation.JUMPRELU
        np.testing.assert_array_equal(source.columns([0, 39]).threshold, [-1, 1])


def test_from_resid_mid_it_can_be_read_only(tmp_path, weights):
    config = CONFIG | {"feature_input_hook": "hook_resid_mid",
                       "feature_output_hook": "hook_mlp_out"}  # fmt: skip
    folder = save(tmp_path, weights, config=config)
    with open_source("circuit-tracer", folder, Options(layer=1)) as source:
        assert source.site is Site.RESID_MID
        assert source.columns([0]).W_dec is None
        assert "read-only" in source.notes[0]


def test_a_cross_layer_transcoder_can_be_read_only(tmp_path, weights):
    weights["threshold"] = np.ones(K, np.float32)
    folder = save_cross_layer(tmp_path, weights)
    with open_source("circuit-tracer", folder, Options(layer=1)) as source:
        assert source.activation is Activation.JUMPRELU
        columns = source.columns([2])
    assert columns.W_dec is None
    assert "every later layer" in source.notes[0]
    np.testing.assert_array_equal(columns.W_enc, weights["W_enc"][[2]])


def test_without_a_config_the_site_must_be_said_and_it_is_read_only(tmp_path, weights):
    folder = save(tmp_path, weights, config=None)
    with (
        pytest.raises(CatalogError, match="which site"),
        open_source("circuit-tracer", folder, Options(layer=1)),
    ):
        pass
    options = Options(layer=1, site=Site.MLP_IN)
    with open_source("circuit-tracer", folder, options) as source:
        assert source.columns([0]).W_dec is None


def test_one_made_for_the_norm_before_its_weight_reads_what_gemmas_mlp_reads(tmp_path, weights):
    """Against the model's own norm: its output is ours to read, its input to the weight theirs."""
    torch = pytest.importorskip("torch")
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    norm = gemma.Gemma2RMSNorm(D)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    x_TD = 9 * torch.randn(T, D, generator=torch.Generator().manual_seed(1))
    theirs_TD, ours_TD = norm._norm(x_TD).numpy(), norm(x_TD).detach().numpy()
    config = CONFIG | {"feature_input_hook": "ln2.hook_normalized",
                       "feature_output_hook": "hook_mlp_out"}  # fmt: skip
    options = Options(
        layer=1,
        architecture="Gemma2ForCausalLM",
        mlp_norm=lambda layer: 1 + norm.weight.detach().numpy() if layer == 1 else None,
    )
    with open_source("circuit-tracer", save(tmp_path, weights, config=config), options) as source:
        assert source.site is Site.MLP_IN
        columns = source.columns([8, 3])
    expected = theirs_TD @ weights["W_enc"].T + weights["b_enc"]
    np.testing.assert_allclose(pre(columns, ours_TD), expected[:, [8, 3]], atol=1e-4)
    np.testing.assert_array_equal(columns.W_dec, weights["W_dec"][[8, 3]])


def test_a_norm_that_hides_a_dimension_cannot_be_divided_out(tmp_path, weights):
    config = CONFIG | {"feature_input_hook": "ln2.hook_normalized"}
    norm_D = np.ones(D, np.float32)
    norm_D[4] = 0
    options = Options(layer=1, mlp_norm=lambda _: norm_D)
    with (
        pytest.raises(CatalogError, match="weight of 0"),
        open_source("circuit-tracer", save(tmp_path, weights, config=config), options),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (CONFIG, Options(), "which layer"),
        (CONFIG, Options(layer=4), "layer_4.safetensors: No such file"),
        (CONFIG | {"feature_input_hook": "ln2.hook_normalized"}, Options(layer=1), "norm before"),
        (CONFIG, Options(layer=1, architecture="Gemma3ForCausalLM"), "before the norm"),
        (CONFIG | {"model_kind": "cross_layer_transcoder"}, Options(layer=1), "model_kind"),
        (CONFIG | {"model_kind": "lorsa"}, Options(layer=1), "lorsa"),
        (CONFIG | {"transcoders": ["hf://a/b/c.npz"]}, Options(layer=1), "names files elsewhere"),
        ({"model_kind": "transcoder_set"}, Options(layer=1), "feature_input_hook"),
    ],
)
def test_what_is_not_exact_is_refused_with_its_reason(tmp_path, weights, config, options, message):
    folder = save(tmp_path, weights, config=config)
    with pytest.raises(CatalogError, match=message), open_source("circuit-tracer", folder, options):
        pass


def test_the_logarithm_of_a_threshold_is_refused_as_the_library_does(tmp_path, weights):
    weights["log_thresholds"] = np.zeros(K, np.float32)
    with (
        pytest.raises(CatalogError, match="log_thresholds"),
        open_source("circuit-tracer", save(tmp_path, weights), Options(layer=1)),
    ):
        pass


def node(layer, index, position, **keys):
    """As circuit-tracer's ``Node.feature_node`` writes it."""
    paired = (layer + index) * (layer + index + 1) // 2 + index
    return {"node_id": f"{layer}_{index}_{position}", "feature": paired, "layer": str(layer),
            "ctx_idx": position, "feature_type": "cross layer transcoder", "clerp": "",
            "jsNodeId": f"{layer}_{index}-0", "influence": 0.5, **keys}  # fmt: skip


def write_graph(path, nodes, pinned=(), **shown):
    tree = {
        "metadata": {"slug": "a-graph", "scan": "llama-plt", "prompt": "Who is", "extra": 1},
        "qParams": {"pinnedIds": list(pinned), "supernodes": [], "linkType": "both",
                    "clickedId": "", "sg_pos": "", **shown},
        "nodes": nodes,
        "links": [],
    }  # fmt: skip
    path.write_text(json.dumps(tree))
    return attribution_graph.read(path)


NODES = [
    node(1, 8, 4, clerp="names of people"),
    node(1, 8, 5, clerp="names of people"),
    node(0, 3, 4, clerp="the word Who"),
    {"node_id": "E_17_0", "feature": 0, "layer": "E", "feature_type": "embedding"},
    {"node_id": "0_1_4", "feature": -1, "layer": "1", "feature_type": "mlp reconstruction error"},
]


def test_each_pinned_feature_is_found_once_and_what_is_no_feature_is_passed_over(tmp_path):
    pinned = ["1_8_4", "1_8_5", "E_17_0", "0_1_4", "0_3_4"]
    graph = write_graph(tmp_path / "g.json", NODES, pinned)
    found = list(attribution_graph.pinned(graph))
    assert [(p.layer, p.index, p.label) for p in found] == [
        (1, 8, "names of people"), (0, 3, "the word Who"),
    ]  # fmt: skip
    assert {p.label_source for p in found} == {LabelSource.AUTOMATIC}
    assert [p.name for p in found] == ["layer1_8", "layer0_3"]


def test_a_label_given_in_the_graph_is_a_humans(tmp_path):
    shown = {"clerps": [["0_3_4", "asks who"]], "supernodes": [["people", "1_8_4", "1_8_5"]]}
    graph = write_graph(tmp_path / "g.json", NODES, ["1_8_4", "0_3_4"], **shown)
    assert [(p.label, p.label_source) for p in attribution_graph.pinned(graph)] == [
        ("people", LabelSource.HUMAN), ("asks who", LabelSource.HUMAN),
    ]  # fmt: skip


@given(layer=st.integers(0, 200), index=st.integers(0, 10**6))
def test_layer_and_index_are_paired_as_cantor_did(layer, index):
    paired = attribution_graph.paired(layer, index)
    w = int(((8 * paired + 1) ** 0.5 - 1) // 2)  # as the frontend's cantorUnpair undoes it
    w = next(v for v in (w - 1, w, w + 1) if 0 <= paired - v * (v + 1) // 2 <= v)
    assert (w - (paired - w * (w + 1) // 2), paired - w * (w + 1) // 2) == (layer, index)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"feature": 5}, "contradicts itself"),
        ({"layer": "2"}, "contradicts itself"),
        ({"node_id": "1_8"}, "LAYER_INDEX_POSITION"),
        ({"node_id": "1_x_4"}, "LAYER_INDEX_POSITION"),
        ({"feature_type": "logit"}, "no feature but 'logit'"),
    ],
)
def test_a_node_that_names_no_feature_clearly_is_refused(tmp_path, changed, message):
    nodes = [NODES[0] | changed]
    graph = write_graph(tmp_path / "g.json", nodes)
    with pytest.raises(CatalogError, match=message):
        attribution_graph.find(graph, nodes[0]["node_id"])


def test_an_unknown_node_is_refused_by_name(tmp_path):
    graph = write_graph(tmp_path / "g.json", NODES)
    with pytest.raises(CatalogError, match="no node '9_9_9'"):
        attribution_graph.find(graph, "9_9_9")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"nodes": 3}', '{"nodes": [{}]}', "[" * 5000])
def test_a_file_that_is_no_graph_is_refused(tmp_path, text):
    (tmp_path / "g.json").write_text(text)
    with pytest.raises(CatalogError, match=r"g\.json"):
        attribution_graph.read(tmp_path / "g.json")
