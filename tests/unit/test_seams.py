"""The contract with vLLM: a name that moved makes us refuse, never serve unsteered."""

import types

import pytest
from steerscope import config
from steerscope.engine import seams
from steerscope.errors import UnsupportedEngineError
from steerscope.steering import stamp
from steerscope.steering.stamp import Stamp


def test_every_seam_is_where_we_say_it_is():
    seams.verify()


def test_a_seam_that_is_gone_or_changed_is_refused_by_name():
    launch = next(s for s in seams.SEAMS if s.qualname == "EngineArgs.create_engine_config")
    with pytest.raises(UnsupportedEngineError, match=r"EngineArgs\.create_engine_config"):
        seams._patch(launch, None, types.SimpleNamespace(EngineArgs=object()))
    changed = types.SimpleNamespace(
        EngineArgs=types.SimpleNamespace(create_engine_config=lambda settings: None)
    )
    with pytest.raises(UnsupportedEngineError, match="no parameter 'self'"):
        seams._patch(launch, None, changed)


def test_patching_twice_wraps_once():
    def hash_keys(request, start_token_idx, end_token_idx, start_mm_idx):
        return None, 0

    module = types.SimpleNamespace(generate_block_hash_extra_keys=hash_keys)
    seam = next(s for s in seams.SEAMS if s.qualname == "generate_block_hash_extra_keys")
    seams._patch(seam, None, module)
    once = module.generate_block_hash_extra_keys
    seams._patch(seam, None, module)
    assert module.generate_block_hash_extra_keys is once


def test_a_name_that_is_only_read_must_be_there_too(monkeypatch):
    gone = seams.Read("vllm.v1.request", "Request.no_such_thing", "nothing")
    monkeypatch.setattr(seams, "READS", (gone,))
    with pytest.raises(UnsupportedEngineError, match=r"Request\.no_such_thing: it is not there"):
        seams.verify()


@pytest.mark.parametrize("version", ["0.27.0", "0.33.0", "1.0.0"])
def test_a_vllm_we_were_not_proven_with_is_refused(monkeypatch, version):
    monkeypatch.setattr(seams, "version", lambda: version)
    with pytest.raises(UnsupportedEngineError, match=f"vLLM {version} is not supported"):
        seams.check_version()


def test_a_step_that_lost_its_note_is_never_run_unsteered():
    stamped = stamp.encode(Stamp("x", "push"))
    sampling = types.SimpleNamespace(extra_args={stamp.STAMP_KEY: stamped})
    new = types.SimpleNamespace(sampling_params=sampling, prompt_token_ids=[1])
    with pytest.raises(UnsupportedEngineError, match="without the note"):
        seams._is_scheduled(types.SimpleNamespace(scheduled_new_reqs=[new]))
    sampling.extra_args = None
    assert not seams._is_scheduled(types.SimpleNamespace(scheduled_new_reqs=[new]))


def _hash(change):
    """vLLM's own key of compiled graphs, of an engine that has these settings."""
    from vllm.config import VllmConfig

    tree = {"catalog": "/a", "catalog_digest": "d", "hub": {"max_policies": 5}} | change
    hashed = next(s for s in seams.SEAMS if s.qualname == "VllmConfig.compute_hash").wrapper
    callbacks = types.SimpleNamespace(of_graph=config.of_graph)
    vllm_config = VllmConfig(additional_config={config.ADDITIONAL_CONFIG_KEY: tree, "other": 1})
    key = hashed(callbacks, VllmConfig.compute_hash, vllm_config)
    assert vllm_config.additional_config[config.ADDITIONAL_CONFIG_KEY] is tree
    return key


@pytest.mark.parametrize(
    "change",
    [
        {"hub": {"grpc_address": "127.0.0.1:1"}},
        {"policies": [{"name": "a"}], "rules": {"default": "a"}},
        {"catalog": "/moved"},
        {"security": {"tokens_file": "/t"}, "audit": {"path": "/p"}},
    ],
)
def test_a_port_or_a_policy_that_changes_costs_no_compilation(change):
    assert _hash(change) == _hash({})


@pytest.mark.parametrize(
    "change",
    [
        {"catalog_digest": "e"},
        {"steering": {"max_rows_per_request": 8}},
        {"telemetry": {"max_cache_bytes": 1}},
        {"something_new": 1},
    ],
)
def test_what_may_shape_the_graph_is_part_of_its_key(change):
    assert _hash(change) != _hash({})


def test_a_graph_compiled_without_us_is_another():
    from vllm.config import VllmConfig

    assert _hash({}) != VllmConfig(additional_config={"other": 1}).compute_hash()
    assert config.of_graph({"other": 1}) is None
    assert config.of_graph({}) is None
