"""The contract with vLLM: a name that moved makes us refuse, never serve unsteered."""

import types

import pytest
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
