"""The Transformers reference by itself, on every miniature: is it what the tests take it for?"""

from __future__ import annotations

from typing import NamedTuple

import miniatures
import numpy as np
import pytest
import torch
from hf_reference import LAYER_NAMES, SITES, Reference, at_site
from tiny import LAYERS, prompts

LENGTHS = (3, 24, 40)
"""Of the prompts: some shorter, some longer than gemma3's sliding window."""


class World(NamedTuple):
    name: str
    reference: Reference
    interventions: dict
    prompts: list


@pytest.fixture(scope="module", params=list(miniatures.ARCHITECTURES))
def world(request, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp(request.param)
    model = miniatures.write_model(folder / "model", request.param)
    catalog = miniatures.write_catalog(folder / "catalog", model)
    asked = [prompts(1, seed=n, low=n, high=n + 1)[0] for n in LENGTHS]
    return World(request.param, Reference(model, catalog), miniatures.interventions(catalog), asked)


@torch.no_grad()
def streams(world, prompt, interventions=(), max_dose=None):
    """Every site of the tapped layers and the next, as left by the edits; and the logits."""
    seen = {}
    model = world.reference.model

    def keep(key):
        # No clone: the reference edits in place, after this hook.
        return lambda x_TD: seen.__setitem__(key, x_TD)

    places = [(layer, site) for layer in (*LAYERS, max(LAYERS) + 1) for site in SITES]
    handles = [at_site(model, layer, site, keep((layer, site))) for layer, site in places]
    handles.append(
        model.register_forward_hook(lambda m, a, o: seen.__setitem__("logits", o.logits[0]))
    )
    try:
        world.reference.generate(prompt, 1, interventions, max_dose)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def strong(world, name, op="add", times=1.0):
    size = world.reference.features[name]["evidence"]["written_norm"]
    return {"feature": name, op: times * size}


def as_direction_of(world, name, like):
    """Give ``name`` the decoder of ``like``, so that the two write the same vector."""
    tensors = world.reference.tensors
    return {**tensors, f"{name}.W_dec": tensors[f"{like}.W_dec"]}


def test_the_kv_cache_changes_neither_tokens_nor_activations(world):
    for prompt in world.prompts:
        for name in ("every_site", "transcoder_beside_its_sites", "generation_only"):
            spec = world.interventions[name]
            tokens, acts = world.reference.generate(prompt, 12, spec)
            again, slowly = world.reference.generate(prompt, 12, spec, use_cache=False)
            assert tokens == again
            for feature, values in acts.items():
                assert len(values) == len(prompt) + 11
                spread = world.reference.features[feature]["evidence"]["spread"]
                np.testing.assert_allclose(values, slowly[feature], rtol=1e-4, atol=1e-3 * spread)


def test_the_sites_are_the_parts_of_the_residual_stream(world):
    for prompt in world.prompts:
        seen = streams(world, prompt)
        for layer in LAYERS:
            at = {site: seen[layer, site] for site in SITES}
            close(at["resid_pre"] + at["attn_out"], at["resid_mid"])
            close(at["resid_mid"] + at["mlp_out"], at["resid_post"])
            close(at["resid_post"], seen[layer + 1, "resid_pre"])


def test_mlp_in_is_the_normed_resid_mid(world):
    seen = streams(world, world.prompts[1], world.interventions["at_resid_mid"])
    names = LAYER_NAMES[world.reference.model.config.model_type]
    for layer in LAYERS:
        block = world.reference.model.get_submodule(names.layers)[layer]
        with torch.no_grad():
            normed = block.get_submodule(names.mlp_norm)(seen[layer, "resid_mid"])
        close(seen[layer, "mlp_in"], normed)


def test_stream_sites_equal_transformers_own_hidden_states(world):
    (prompt, *_) = world.prompts
    seen = streams(world, prompt)
    with torch.no_grad():
        states = world.reference.model(
            torch.tensor([prompt]), output_hidden_states=True
        ).hidden_states
    for layer in LAYERS:
        close(seen[layer, "resid_pre"], states[layer][0])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("direction_resid_post_1", "direction_resid_pre_2"),
        ("direction_attn_out_1", "direction_resid_mid_1"),
        ("direction_mlp_out_2", "direction_resid_post_2"),
    ],
)
def test_the_same_vector_added_at_two_names_of_one_place_does_the_same(
    world, first, second, monkeypatch
):
    monkeypatch.setattr(world.reference, "tensors", as_direction_of(world, second, first))
    edit = strong(world, first)
    one = streams(world, world.prompts[1], [edit])
    other = streams(world, world.prompts[1], [{**edit, "feature": second}])
    plain = streams(world, world.prompts[1])
    close(one["logits"], other["logits"])
    assert (one["logits"] - plain["logits"]).abs().max() > 0.1


def test_all_edits_of_a_site_read_what_it_held_before_any(world):
    (prompt, *_) = world.prompts
    names = ["direction_resid_post_1", "latent_resid_post_1"]
    edits = [strong(world, names[0], "clamp"), strong(world, names[1], "clamp")]
    plain, both = streams(world, prompt), streams(world, prompt, edits)
    alone = [streams(world, prompt, [edit]) for edit in edits]
    changes = [each[2, "resid_pre"] - plain[2, "resid_pre"] for each in alone]
    close(both[2, "resid_pre"], plain[2, "resid_pre"] + changes[0] + changes[1])


def test_activations_are_those_before_the_edits_of_their_own_site_and_after_all_earlier(world):
    prompt = world.prompts[1]
    _, plain = world.reference.generate(prompt, 1)
    edit = strong(world, "direction_resid_mid_1", "clamp", 2.0)
    _, acts = world.reference.generate(prompt, 1, [edit])
    here = [f"{stem}_resid_mid_1" for stem in ("direction", "latent")]
    for name in here:
        assert acts[name] == plain[name]
    for name in ("direction_mlp_in_1", "direction_resid_post_1", "direction_resid_pre_2"):
        assert not np.allclose(acts[name], plain[name], rtol=1e-2)


def test_activations_are_those_of_their_nonlinearity(world):
    x_TD = streams(world, world.prompts[2])[1, "mlp_in"].numpy()
    tensors = {name: tensor.numpy() for name, tensor in world.reference.tensors.items()}
    for name, kind in (("direction", "identity"), ("latent", "jumprelu"), ("transcoder", "relu")):
        name = f"{name}_mlp_in_1"
        pre = x_TD @ tensors[f"{name}.W_enc"] + tensors[f"{name}.b_enc"]
        floor = {"identity": -np.inf, "relu": 0.0}
        threshold = floor[kind] if kind in floor else tensors[f"{name}.threshold"]
        wanted = np.where(pre > threshold, pre, 0.0)
        assert (wanted == 0).any() == (kind != "identity")
        got = world.reference.activations(name, torch.from_numpy(x_TD))
        np.testing.assert_allclose(got.numpy(), wanted, rtol=1e-4, atol=1e-4)
        assert world.reference.activation(name, torch.from_numpy(x_TD[3])) == pytest.approx(
            wanted[3], abs=1e-4
        )


def test_a_transcoder_latent_reads_mlp_in_and_writes_mlp_out_before_it_is_read(world):
    prompt = world.prompts[1]
    name = "transcoder_mlp_in_2"
    value = 2.0 * world.reference.features[name]["evidence"]["written_norm"]
    plain, edited = (
        streams(world, prompt, spec) for spec in ([], [{"feature": name, "clamp": value}])
    )
    close(plain[2, "mlp_in"], edited[2, "mlp_in"])
    read = world.reference.activations(name, plain[2, "mlp_in"])
    wanted = (value - read)[:, None] * world.reference.tensors[f"{name}.W_dec"]
    close(edited[2, "mlp_out"] - plain[2, "mlp_out"], wanted)
    _, acts = world.reference.generate(prompt, 1, [{"feature": name, "clamp": value}])
    seen_there = world.reference.activations("direction_mlp_out_2", edited[2, "mlp_out"])
    close(torch.tensor(acts["direction_mlp_out_2"]), seen_there)


def test_a_transcoder_latent_reads_what_mlp_in_held_before_its_neighbours_edits(world):
    prompt = world.prompts[1]
    both = [strong(world, "transcoder_mlp_in_1", "clamp"), strong(world, "direction_mlp_in_1")]
    _, plain = world.reference.generate(prompt, 1)
    _, acts = world.reference.generate(prompt, 1, both)
    assert acts["transcoder_mlp_in_1"] == plain["transcoder_mlp_in_1"]


@pytest.mark.parametrize(
    ("name", "written", "seen_at"),
    [
        ("direction_resid_post_1", (1, "resid_post"), (2, "resid_pre")),
        ("transcoder_mlp_in_2", (2, "mlp_out"), (2, "mlp_out")),
        ("latent_attn_out_1", (1, "attn_out"), (1, "attn_out")),
    ],
)
def test_max_dose_shrinks_what_is_larger_and_leaves_what_is_smaller(world, name, written, seen_at):
    prompt = world.prompts[1]
    edit = strong(world, name, "clamp", 0.6)
    plain = streams(world, prompt)
    free = streams(world, prompt, [edit])[seen_at] - plain[seen_at]
    doses = free.norm(dim=-1) / plain[written].norm(dim=-1)
    cap = float(doses.median())
    capped = streams(world, prompt, [edit], max_dose=cap)[seen_at] - plain[seen_at]
    wanted = torch.where((doses > cap)[:, None], free * (cap / doses)[:, None], free)
    assert (doses > cap).any()
    assert (doses < cap).any()
    close(capped, wanted)


def test_max_dose_bounds_the_sum_of_all_edits_of_a_site(world):
    prompt = world.prompts[1]
    edits = [strong(world, f"{stem}_resid_post_1", "add", 0.5) for stem in ("direction", "latent")]
    plain = streams(world, prompt)[2, "resid_pre"]
    capped = streams(world, prompt, edits, max_dose=0.25)[2, "resid_pre"]
    doses = (capped - plain).norm(dim=-1) / plain.norm(dim=-1)
    close(doses, torch.full_like(doses, 0.25))


@pytest.mark.parametrize(
    ("narrowed", "covered"),
    [
        ({}, range(100)),
        ({"phase": "prompt"}, range(24)),
        ({"phase": "generation"}, range(24, 100)),
        ({"span": [5, 26]}, range(5, 26)),
        ({"span": [5, 26], "phase": "generation"}, range(24, 26)),
    ],
)
def test_phase_and_span_choose_tokens_by_their_place_in_the_request(world, narrowed, covered):
    prompt = world.prompts[1]
    edit = {**strong(world, "direction_mlp_out_1", "add"), **narrowed}
    # What was added at mlp_out is in resid_post, less resid_mid.
    added = []
    stream = {}
    model = world.reference.model
    handles = [
        at_site(model, 1, "resid_mid", lambda x: stream.__setitem__("mid", x.clone())),
        at_site(model, 1, "mlp_out", lambda x: stream.__setitem__("out", x.clone())),
        at_site(
            model,
            1,
            "resid_post",
            lambda x: added.extend((x - stream["mid"] - stream["out"]).norm(dim=-1).tolist()),
        ),
    ]
    world.reference.generate(prompt, 6, [edit])
    for handle in handles:
        handle.remove()
    size = edit["add"]
    assert len(added) == 24 + 5
    for position, norm in enumerate(added):
        assert norm == pytest.approx(size if position in covered else 0.0, abs=1e-3 * size)


def test_gates_hold_only_where_the_gating_feature_is_in_range(world):
    prompt = world.prompts[2]
    plain = streams(world, prompt)
    gate = world.reference.activations("probe_resid_post_1", plain[1, "resid_post"])
    own = world.reference.activations("latent_resid_post_1", plain[1, "resid_post"])
    add = strong(world, "latent_resid_post_1")
    middle = float(gate.median())
    for narrowed, holds in (
        ({"when": {"feature": "probe_resid_post_1", "above": middle}}, gate > middle),
        ({"when": {"feature": "probe_resid_post_1", "below": middle}}, gate < middle),
        ({"only_if_active": True}, own > 0),
    ):
        edited = streams(world, prompt, [{**add, **narrowed}])
        changed = (edited[2, "resid_pre"] - plain[2, "resid_pre"]).norm(dim=-1)
        assert ((changed > 0.5 * add["add"]) == holds).all()
        assert holds.any()
        assert not holds.all()


def test_every_named_intervention_changes_the_output_and_keeps_it_finite(world):
    plain = [world.reference.generate(prompt, 8) for prompt in world.prompts]
    for name, spec in world.interventions.items():
        results = [world.reference.generate(prompt, 8, spec) for prompt in world.prompts]
        assert [r[0] for r in results] != [p[0] for p in plain], name
        assert all(np.isfinite(v).all() for _, acts in results for v in acts.values()), name


def test_latents_are_active_on_some_tokens_and_silent_on_others(world):
    runs = [world.reference.generate(p, 16)[1] for p in prompts(6, seed=7, high=100)]
    for name, feature in world.reference.features.items():
        if feature["activation"] != "identity":
            share = np.mean([value > 0 for acts in runs for value in acts[name]])
            assert 0.15 < share < 0.85, name


def test_greedy_output_varies_with_its_input(world):
    outputs = [world.reference.generate(p, 32)[0] for p in prompts(4, seed=8, high=60)]
    assert len({tuple(output) for output in outputs}) == 4
    assert min(len(set(output)) for output in outputs) > 10


def close(actual, expected):
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-5 * scale)
