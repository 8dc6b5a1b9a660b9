"""The engine part inside a real, compiled vLLM, against plain Transformers and against itself."""

from __future__ import annotations

import json

import pytest
import tiny
from engine_process import EngineProcess, steering
from steerscope.client import Client
from steerscope.demo.live.server import free_ports

pytestmark = pytest.mark.engine

SPECS = [
    None,
    [{"feature": "direction_1", "add": 4.0}],
    [{"feature": "latent_1", "clamp": 6.0}],
    [{"feature": "latent_2", "ablate": True}],
    [{"feature": "unit_1", "at_least": 3.0, "phase": "prompt"}],
    [
        {"feature": "unit_1", "at_most": 0.1},
        {"feature": "direction_1", "scale": -1.0, "phase": "generation"},
    ],
    [
        {"feature": "latent_1", "scale": 4.0, "only_if_active": True},
        {"feature": "direction_2", "ablate": True},
    ],
    [
        {
            "feature": "direction_2",
            "clamp": 5.0,
            "when": {"feature": "probe_2", "above": 0.0},
            "span": [2, 9],
        }
    ],
    [{"feature": "direction_2", "clamp": 9.0, "phase": "generation"}],
]
MAX_TOKENS = 12


def request(prompt, spec=None, **kwargs):
    extra = {"extra_args": steering(*spec)} if spec else {}
    return {"prompt": prompt, "max_tokens": MAX_TOKENS, **extra, **kwargs}


def tokens(results):
    return [result["tokens"][0] for result in results]


def test_vllm_itself_says_that_it_runs_compiled(engine, plain_engine):
    assert engine.info["enforce_eager"] is False
    assert engine.info["compilation_mode"] == plain_engine.info["compilation_mode"] != 0


def test_the_compile_cache_key_holds_the_catalog(engine, plain_engine):
    assert engine.info["additional_config"]["steerscope"]["catalog_digest"]
    assert engine.info["compile_hash"] != plain_engine.info["compile_hash"]


def test_unsteered_output_is_that_of_vllm_without_the_plugin(engine, plain_engine):
    requests = [request(prompt) for prompt in tiny.prompts(40, seed=11, high=120)]
    assert tokens(engine.run(*requests)) == tokens(plain_engine.run(*requests))


def test_steered_requests_in_a_mixed_batch_equal_plain_transformers(engine, reference):
    prompts = tiny.prompts(45, seed=3, high=100)
    specs = [SPECS[i % len(SPECS)] for i in range(len(prompts))]
    results = tokens(engine.run(*map(request, prompts, specs)))
    changed = 0
    for prompt, spec, got in zip(prompts, specs, results, strict=True):
        expected, _ = reference.generate(prompt, MAX_TOKENS, spec or [])
        assert got == expected, (spec, len(prompt))
        changed += spec is not None and got != reference.generate(prompt, MAX_TOKENS)[0]
    assert changed >= 10, "the edits are too weak to prove anything"


def test_neighbours_of_a_steered_request_get_what_they_get_alone(engine):
    prompts = tiny.prompts(10, seed=5)
    alone = [tokens(engine.run(request(p)))[0] for p in prompts]
    steered = [request(p, [{"feature": "direction_1", "add": 30.0}]) for p in prompts]
    mixed = engine.run(*(r for p, s in zip(prompts, steered, strict=True) for r in (request(p), s)))
    assert tokens(mixed[::2]) == alone
    assert tokens(mixed[1::2]) != alone


def test_the_prefix_cache_never_gives_steered_blocks_to_unsteered_requests_nor_back(engine):
    (prompt,) = tiny.prompts(1, seed=21, low=150, high=151)
    edit = [{"feature": "direction_1", "add": 300.0, "phase": "prompt"}]
    other = [{"feature": "direction_1", "add": -300.0, "phase": "prompt"}]
    cold = {}
    for name, spec in (("steered", edit), ("plain", None), ("other", other)):
        (result,) = engine.run(request(prompt, spec))
        cold[name] = result["tokens"]
        assert result["cached"] == 0, name
    assert cold["steered"] != cold["plain"] != cold["other"]
    for name, spec in (("steered", edit), ("plain", None), ("steered", edit), ("other", other)):
        (result,) = engine.run(request(prompt, spec))
        assert result["tokens"] == cold[name]
        assert result["cached"] == 128, "equal steering shares its blocks"


def test_generation_only_steering_shares_the_whole_prompt_with_unsteered_traffic(engine):
    (prompt,) = tiny.prompts(1, seed=22, low=150, high=151)
    engine.run(request(prompt))
    (result,) = engine.run(
        request(prompt, [{"feature": "direction_1", "add": 9.0, "phase": "generation"}])
    )
    assert result["cached"] == 128


def test_blocks_before_a_span_stay_shared_and_those_from_it_on_do_not(engine):
    (prompt,) = tiny.prompts(1, seed=23, low=150, high=151)
    engine.run(request(prompt))
    edit = [{"feature": "direction_1", "add": 9.0, "span": [70, 80]}]
    (result,) = engine.run(request(prompt, edit))
    assert result["cached"] == 64


@pytest.mark.parametrize(
    ("flag", "parameter"),
    [
        ("nope", "vllm_xargs.steering"),
        ("{", "vllm_xargs.steering"),
        (
            '{"interventions":[{"feature":"nope","add":1}]}',
            "vllm_xargs.steering.interventions[0].feature",
        ),
        (
            '{"interventions":[{"feature":"probe_1","add":1}]}',
            "vllm_xargs.steering.interventions[0].feature",
        ),
        ('{"interventions":[{"feature":"unit_1","add":NaN}]}', "vllm_xargs.steering"),
        (7, "vllm_xargs.steering"),
    ],
)
def test_a_bad_flag_is_refused_by_field_and_the_rest_of_the_batch_is_served(
    engine, flag, parameter
):
    prompts = tiny.prompts(2, seed=31)
    good, bad = engine.run(request(prompts[0]), request(prompts[1], extra_args={"steering": flag}))
    assert bad["parameter"] == parameter
    assert len(good["tokens"][0]) == MAX_TOKENS


def test_every_sample_of_a_request_is_steered(engine, reference):
    (prompt,) = tiny.prompts(1, seed=33)
    spec = [{"feature": "direction_1", "add": 4.0}]
    # vLLM wants a temperature for n > 1; the one token left by top_k is the greedy one.
    (result,) = engine.run(request(prompt, spec, n=3, temperature=1.0, top_k=1))
    expected, _ = reference.generate(prompt, MAX_TOKENS, spec)
    assert result["tokens"] == [expected] * 3


@pytest.fixture
def client(tiny_world):
    hub = json.loads(tiny_world.config.read_text())["hub"]
    return Client(hub["grpc_address"])


def test_the_report_holds_the_activation_of_every_token(engine, reference, client):
    prompts = tiny.prompts(12, seed=41, high=100)
    specs = [SPECS[i % len(SPECS)] for i in range(len(prompts))]
    results = engine.run(*map(request, prompts, specs))
    for prompt, spec, result in zip(prompts, specs, results, strict=True):
        report = client.get_request_report(result["request_id"], wait=10.0)
        (completion,) = report.completions
        _, expected = reference.generate(prompt, MAX_TOKENS, spec or [])
        assert completion.num_observed_tokens == len(prompt) + MAX_TOKENS - 1
        for track in completion.features:
            assert list(track.activations) == pytest.approx(
                expected[track.feature], rel=1e-3, abs=1e-3
            ), (track.feature, spec)


@pytest.mark.parametrize("spec", [None, [{"feature": "direction_1", "add": 9.0}]])
def test_tokens_from_the_prefix_cache_are_observed_all_the_same(engine, client, spec):
    (prompt,) = tiny.prompts(1, seed=43, low=150, high=151)
    reports = []
    for num_cached in (0, 128):
        (result,) = engine.run(request(prompt, spec))
        report = client.get_request_report(result["request_id"], wait=10.0)
        (completion,) = report.completions
        assert result["cached"] == completion.num_cached_tokens == num_cached
        assert completion.num_observed_tokens == 150 + MAX_TOKENS - 1
        assert completion.complete
        assert completion.steering_digest == report.asked_steering_digest
        reports.append(completion)
    cold, hit = reports
    # To rounding: the recomputed tail of the prompt is another batch than the cold one.
    assert hit.steering.num_tokens == cold.steering.num_tokens
    assert hit.steering.dose_mean == pytest.approx(cold.steering.dose_mean, rel=1e-4)
    for seen, expected in zip(hit.features, cold.features, strict=True):
        assert list(seen.activations) == pytest.approx(list(expected.activations), abs=1e-3)
        assert list(seen.deltas) == pytest.approx(list(expected.deltas), abs=1e-3)


def test_a_policy_made_over_grpc_can_be_used_at_once_and_is_gone_when_deleted(
    engine, client, reference
):
    (prompt,) = tiny.prompts(1, seed=44)
    edit = {"feature": "direction_1", "add": 5.0}
    for round_ in range(5):
        name = f"made-{round_}"
        client.create_policy(name, [edit])
        (result,) = engine.run({**request(prompt), "extra_args": {"steering": name}})
        assert result["tokens"][0] == reference.generate(prompt, MAX_TOKENS, [edit])[0]
        client.delete_policy(name)
        (gone,) = engine.run({**request(prompt), "extra_args": {"steering": name}})
        assert gone["parameter"] == "vllm_xargs.steering"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"catalog": "/nowhere"}, "no folder '/nowhere'"),
        ({"catalogue": "x"}, "unknown field `catalogue`"),
        (
            {"policies": [{"name": "p", "interventions": []}]},
            "policy 'p': interventions: must not be empty",
        ),
    ],
)
def test_a_bad_config_stops_the_launch_and_names_the_fault(tiny_world, tmp_path, change, message):
    tree = {**json.loads(tiny_world.config.read_text()), **change}
    _refused(tiny_world.model, tree, tmp_path, message)


def test_a_catalog_for_another_model_stops_the_launch(tiny_world, tmp_path):
    other = tiny.write_model(tmp_path / "other", seed=9)
    tree = json.loads(tiny_world.config.read_text())
    _refused(other, tree, tmp_path, "catalog is for another model: weight lm_head.weight")


def test_a_port_in_use_stops_the_launch_and_names_it(tiny_world, tmp_path, engine):
    tree = json.loads(tiny_world.config.read_text())
    tree["hub"]["http_address"] = f"127.0.0.1:{free_ports(1)[0]}"
    _refused(tiny_world.model, tree, tmp_path, "address already in use")


def test_an_engine_mode_that_is_not_supported_stops_the_launch_and_names_the_flag(
    tiny_world, tmp_path
):
    tree = json.loads(tiny_world.config.read_text())
    _refused(
        tiny_world.model,
        tree,
        tmp_path,
        "does not support --distributed-executor-backend yet",
        distributed_executor_backend="external_launcher",
    )


def _refused(model, tree, folder, message, **engine_args):
    config = folder / "bad.yaml"
    config.write_text(json.dumps(tree))
    with pytest.raises(RuntimeError) as caught:
        EngineProcess(model, config, folder / "log", **engine_args).stop()
    assert message in str(caught.value)
