"""The contract with vLLM: a name that moved makes us refuse, never serve unsteered."""

import types

import pytest
from steerscope.engine import seams
from steerscope.errors import UnsupportedEngineError


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
