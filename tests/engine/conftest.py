from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_process import EngineProcess
from hf_reference import Reference

LIMITS = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "enable_prefix_caching": True}
"""Small limits: prompts are chunked, requests queue, batches mix prefill and decode."""


@pytest.fixture(scope="session")
def engine(tiny_world, tmp_path_factory) -> Iterator[EngineProcess]:
    """The tiny model in compiled vLLM, with Steerscope."""
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    process = EngineProcess(tiny_world.model, tiny_world.config, log, **LIMITS)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def plain_engine(tiny_world, tmp_path_factory) -> Iterator[EngineProcess]:
    """The same without Steerscope."""
    log = tmp_path_factory.mktemp("engine") / "plain.log"
    process = EngineProcess(tiny_world.model, None, log, **LIMITS)
    yield process
    process.stop()


@pytest.fixture(scope="session")
def reference(tiny_world) -> Reference:
    return Reference(tiny_world.model, tiny_world.catalog)
