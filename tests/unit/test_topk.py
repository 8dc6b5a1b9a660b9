"""TopK features: which latents are active is what the libraries say, and they steer as any do.

Shapes: T tokens, D model width, K latents of a dictionary, N features in it.
"""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file
from steerscope.catalog import store
from steerscope.engine import canary as canaries
from steerscope.engine import ops, reference
from steerscope.engine.canary import Canary
from steerscope.engine.reference import TopK
from steerscope.engine.taps import SiteTap, StepRows
from steerscope.errors import UnsupportedEngineError
from steerscope.steering.interventions import parse_spec
from torch.utils._python_dispatch import TorchDispatchMode

D_MODEL = 32
CPU = torch.device("cpu")


def dictionary(W_enc_KD, b_enc_K, k, latents):
    columns_N = torch.arange(len(latents))
    return TopK(W_enc_KD, b_enc_K, k, torch.tensor(latents), columns_N)


def random_dictionary(k, d_sae=300, seed=0, latents=None):
    generator = torch.Generator().manual_seed(seed)
    W_enc_KD = torch.randn(d_sae, D_MODEL, generator=generator) / D_MODEL**0.5
    b_enc_K = 0.2 * torch.randn(d_sae, generator=generator)
    return dictionary(W_enc_KD, b_enc_K, k, list(range(d_sae)) if latents is None else latents)


def stream(num_tokens, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(num_tokens, D_MODEL, generator=generator)).to(dtype)


def kept_by_torch(pre_TK, k):
    """As SAELens writes it: the k largest where they were, relu, zero elsewhere."""
    top = torch.topk(pre_TK, k, dim=-1)
    return torch.zeros_like(pre_TK).scatter_(-1, top.indices, top.values.relu())


@pytest.mark.parametrize("k", [1, 16, 150, 299, 300])
def test_activations_are_those_of_topk_and_scatter(k):
    whole = random_dictionary(k)
    x_TD = stream(50)
    pre_TK = x_TD @ whole.W_enc_KD.T + whole.b_enc_K
    acts_TK = reference.encode_topk(x_TD, whole)
    torch.testing.assert_close(acts_TK, kept_by_torch(pre_TK, k), rtol=1e-5, atol=1e-5)
    num_active_T = (acts_TK > 0).sum(1)
    assert torch.equal(num_active_T, (pre_TK > 0).sum(1).clamp_max(k))


def test_relu_before_the_selection_makes_no_difference():
    whole = random_dictionary(16)
    x_TD = stream(50)
    pre_TK = x_TD @ whole.W_enc_KD.T + whole.b_enc_K
    top = torch.topk(pre_TK.relu(), 16, dim=-1, sorted=False)  # as sparsify writes it
    before = torch.zeros_like(pre_TK).scatter_(-1, top.indices, top.values)
    torch.testing.assert_close(reference.encode_topk(x_TD, whole), before, rtol=1e-5, atol=1e-5)


def test_with_fewer_than_k_above_zero_the_others_are_zero():
    b_enc_K = torch.full((300,), -100.0)
    b_enc_K[[3, 7]] = 100.0
    whole = random_dictionary(16)._replace(b_enc_K=b_enc_K)
    acts_TK = reference.encode_topk(stream(5), whole)
    assert (acts_TK > 0).nonzero()[:, 1].tolist() == [3, 7] * 5
    assert acts_TK.sum(1).min() > 0


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
def test_the_kth_latent_is_never_below_itself(num_tokens):
    """Nor would it be by a product of its own, whose last bit may differ."""
    x_TD = stream(num_tokens, seed=5)
    pre_TK = torch.addmm(random_dictionary(16).b_enc_K, x_TD, random_dictionary(16).W_enc_KD.T)
    for token, kth in enumerate(pre_TK.topk(16).indices[:, -1].tolist()):
        acts_T1 = reference.encode_topk(x_TD, random_dictionary(16, latents=[kth]))
        assert acts_T1[token, 0] == pre_TK[token, kth] > 0


def test_all_that_tie_with_the_kth_are_active_whatever_torch_would_pick():
    """Small integers: products are exact, so that equal means equal."""
    pre_K = torch.tensor([5.0, 3.0, 3.0, 1.0, 3.0, 0.0, -2.0, 0.0])
    W_enc_KD = torch.zeros(8, D_MODEL)
    W_enc_KD[:, 0] = pre_K
    x_TD = torch.eye(D_MODEL)[:1]

    def active(k):
        whole = dictionary(W_enc_KD, torch.zeros(8), k, list(range(8)))
        return reference.encode_topk(x_TD, whole)[0]

    tied = torch.tensor([5.0, 3.0, 3.0, 0.0, 3.0, 0.0, 0.0, 0.0])
    assert torch.equal(active(1), torch.tensor([5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    for k in (2, 3, 4):
        assert torch.equal(active(k), tied)
    for k in (5, 6, 8):  # zeros tie here, and stay zeros
        assert torch.equal(active(k), pre_K.relu())


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any op makes."""

    num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            is_view = function.is_view or not isinstance(each, torch.Tensor)
            self.num_bytes = max(self.num_bytes, 0 if is_view else each.nbytes)
        return made


def test_a_long_step_is_read_in_blocks_of_bounded_size(monkeypatch):
    whole = random_dictionary(16, latents=[3, 200, 7])
    x_TD = stream(100)
    expected = reference.encode_topk(x_TD, whole)
    monkeypatch.setattr(reference, "MAX_WIDE_BYTES", 7 * 300 * 4 + 5)
    with Largest() as largest:
        blocks = reference.encode_topk(x_TD, whole)
    assert largest.num_bytes == 7 * 300 * 4
    torch.testing.assert_close(blocks, expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(reference, "MAX_WIDE_BYTES", 1)
    torch.testing.assert_close(reference.encode_topk(x_TD, whole), expected, rtol=1e-5, atol=1e-6)


def test_no_shape_depends_on_data_and_no_value_is_waited_for():
    """On the meta device there are no values: what needs one raises."""
    whole = random_dictionary(16, latents=[3, 200, 7])
    tensors = [part.to("meta") if isinstance(part, torch.Tensor) else part for part in whole]
    assert reference.encode_topk(stream(9).to("meta"), TopK(*tensors)).shape == (9, 3)


FEATURES = [  # in another order than the dictionaries' latents
    ("wide_9", "topk", "wide", 9),
    ("plain", "identity", None, None),
    ("narrow_2", "topk", "narrow", 2),
    ("wide_4", "topk", "wide", 4),
    ("jump", "jumprelu", None, None),
    ("read_only", "topk", "wide", 30),
]
DICTIONARIES = {"wide": (200, 60), "narrow": (40, 10)}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Two dictionaries at a site, with ordinary features beside them."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return (rng.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32)

    tensors, features = {}, []
    for name, activation, owner, latent in FEATURES:
        feature = {"name": name, "kind": "sae_latent", "site": "resid_post", "layer": 1}
        feature["activation"] = activation
        if owner is None:
            tensors[f"{name}.W_enc"], tensors[f"{name}.b_enc"] = normal(D_MODEL), normal(1)
        else:
            feature |= {"dictionary": owner, "latent": latent}
        if activation == "jumprelu":
            tensors[f"{name}.threshold"] = np.array([0.2], np.float32)
        if name != "read_only":
            tensors[f"{name}.W_dec"] = normal(D_MODEL)
        features.append(feature)
    for name, (d_sae, _) in DICTIONARIES.items():
        tensors[f"{name}.W_enc"], tensors[f"{name}.b_enc"] = normal(d_sae, D_MODEL), normal(d_sae)
    document = {
        "schema": "steerscope.catalog/v1",
        "name": "topk",
        "version": "1",
        "model": {
            "architecture": "LlamaForCausalLM",
            "hidden_size": D_MODEL,
            "num_hidden_layers": 2,
            "vocab_size": 8,
        },
        "features": features,
        "dictionaries": [
            {"name": name, "site": "resid_post", "layer": 1, "d_sae": d_sae, "k": k}
            for name, (d_sae, k) in DICTIONARIES.items()
        ],
    }
    folder = tmp_path_factory.mktemp("topk")
    (folder / store.CATALOG_FILE).write_text(yaml.safe_dump(document))
    save_file(tensors, folder / store.TENSORS_FILE)
    return store.load(folder)


class Site:
    def __init__(self, catalog, is_native=True):
        self.step = StepRows(64, CPU, is_native)
        (key,) = catalog.sites
        self.tap = SiteTap(catalog, key, self.step, 4, CPU)
        self.tensors = load_file(catalog.folder / store.TENSORS_FILE)
        self.op = ops.register("topk", self.tap).tap

    def steer(self, *edits):
        spec = parse_spec(json.dumps({"interventions": edits}))
        self.tap.write_row(1, list(spec.interventions))

    def run(self, hidden_TD, residual_TD, rows):
        self.step.stage(np.array(rows, np.int64))
        edited_TD = hidden_TD.clone()
        self.op(edited_TD, residual_TD, "topk")
        return edited_TD

    def expected(self, x_TD):
        """Each feature by itself, from the file."""
        acts = {}
        for name, activation, owner, latent in FEATURES:
            stem = owner or name
            W_enc = torch.from_numpy(self.tensors[f"{stem}.W_enc"])
            b_enc = torch.from_numpy(self.tensors[f"{stem}.b_enc"])
            pre = (x_TD @ W_enc.mT if owner else x_TD @ W_enc) + b_enc
            if activation == "topk":
                pre = kept_by_torch(pre, DICTIONARIES[owner][1])[:, latent]
            elif activation == "jumprelu":
                pre = torch.where(pre > 0.2, pre, 0.0)
            acts[name] = pre
        return acts


@pytest.fixture
def site(catalog):
    return Site(catalog)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_dictionaries_and_ordinary_features_are_read_at_one_site(site, dtype):
    hidden, residual = stream(60, dtype), stream(60, dtype, seed=2)
    edited = site.run(hidden, residual, [0] * 60)
    assert torch.equal(edited, hidden)
    expected = site.expected(hidden.float() + residual.float())
    torch.testing.assert_close(
        site.tap.acts_TF[:60], torch.stack(list(expected.values()), 1), rtol=1e-5, atol=1e-5
    )
    for name, activation, _, _ in FEATURES:
        if activation == "topk":
            share = float((expected[name] > 0).float().mean())
            assert 0.05 < share < 0.95, "a feature that never changes proves nothing"


def test_a_site_without_a_dictionary_computes_nothing_wide(tiny_world):
    plain = store.load(tiny_world.catalog)
    tap = SiteTap(plain, next(iter(plain.sites)), StepRows(8, CPU), 4, CPU)
    assert tap.encoder.dictionaries == ()


EDITS = [
    [{"feature": "wide_9", "clamp": 3.0}],
    [{"feature": "wide_9", "ablate": True}],
    [{"feature": "narrow_2", "scale": 4.0, "only_if_active": True}],
    [{"feature": "wide_4", "at_least": 1.5}, {"feature": "plain", "add": 2.0}],
    [{"feature": "plain", "add": 2.0, "when": {"feature": "wide_9", "above": 0.0}}],
    [{"feature": "wide_9", "add": 1.0, "when": {"feature": "read_only", "below": 0.1}}],
]


def edited(edit, f):
    """``f'`` of one feature, by its operation."""
    made = {
        "clamp": lambda v: torch.full_like(f, v),
        "ablate": lambda v: torch.zeros_like(f),
        "at_least": lambda v: f.clamp_min(v),
        "scale": lambda v: f * v,
        "add": lambda v: f + v,
    }
    (op,) = edit.keys() & made.keys()
    return made[op](edit[op])


def delta_of(site, edits, acts):
    total_TD = 0.0
    for edit in edits:
        f = acts[edit["feature"]]
        holds = (f > 0) if edit.get("only_if_active") else torch.ones_like(f, dtype=torch.bool)
        if when := edit.get("when"):
            gate = acts[when["feature"]]
            holds &= (gate > when.get("above", -1e30)) & (gate < when.get("below", 1e30))
        change = torch.where(holds, edited(edit, f) - f, 0.0)
        total_TD = total_TD + change[:, None] * torch.from_numpy(
            site.tensors[f"{edit['feature']}.W_dec"]
        )
    return total_TD


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("is_native", [True, False])
def test_a_topk_feature_steers_and_gates_as_any_other(catalog, edits, is_native):
    site = Site(catalog, is_native)
    hidden, residual = stream(40), stream(40, seed=2)
    site.steer(*edits)
    changed = site.run(hidden, residual, [0, 1] * 20)
    delta_TD = delta_of(site, edits, site.expected(hidden + residual))
    assert torch.equal(changed[::2], hidden[::2])
    assert bool(delta_TD[1::2].any())
    torch.testing.assert_close(changed[1::2], (hidden + delta_TD)[1::2], rtol=1e-4, atol=1e-5)


def test_the_op_is_well_formed_for_the_compiler(site):
    torch.library.opcheck(
        site.op.default,
        (stream(6), stream(6, seed=2), "topk"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_the_op_compiles_without_a_graph_break_and_still_edits(site):
    hidden, residual = stream(6), stream(6, seed=2)
    site.steer(*EDITS[0])
    expected = site.run(hidden, residual, [1] * 6) * 2 + residual

    @torch.compile(fullgraph=True, backend="inductor")
    def layer(hidden, residual):
        hidden = hidden * 1.0
        site.op(hidden, residual, "topk")
        return hidden * 2 + residual

    torch.testing.assert_close(layer(hidden, residual), expected)


class TestCanary:
    def after(self, site, x_TD, plant=lambda tap: None):
        canary = Canary([site.tap])
        canary.before(len(x_TD))
        site.tap(x_TD, None)
        plant(site.tap)
        canary.after(np.arange(len(x_TD)), None)

    def test_it_finds_nothing_wrong_at_any_token(self, site):
        for seed in range(30):
            self.after(site, stream(2, seed=seed))

    def test_it_recomputes_a_dictionary_in_blocks(self, site, monkeypatch):
        monkeypatch.setattr(canaries, "BLOCK", 7)
        self.after(site, stream(2))

    @pytest.mark.parametrize("k", [1, 199])
    def test_a_selection_of_another_size_is_noticed(self, site, k):
        wide, narrow = site.tap.encoder.dictionaries
        other = site.tap.encoder._replace(dictionaries=(wide._replace(k=k), narrow))

        def plant(tap):
            tap.acts_TF[:1] = reference.encode(tap.probe_D[None], other)

        num_noticed = 0
        for seed in range(10):
            try:
                self.after(site, stream(2, seed=seed), plant)
            except UnsupportedEngineError:
                num_noticed += 1
        assert num_noticed >= 3, "where the selection is the same, so is what it makes"

    def test_another_latent_of_the_same_dictionary_is_noticed(self, site):
        x_TD = self.with_both_active(site)

        def plant(tap):
            tap.acts_TF[0, 0] = tap.acts_TF[0, 3]

        with pytest.raises(UnsupportedEngineError, match=r"wide_9 at resid_post\.1"):
            self.after(site, x_TD, plant)

    def with_both_active(self, site):
        for seed in range(100):
            x_TD = stream(2, seed=seed)
            acts = site.expected(x_TD)
            if acts["wide_9"][0] > 0.1 and acts["wide_4"][0] > acts["wide_9"][0] + 0.1:
                return x_TD
        raise AssertionError("no such token")
