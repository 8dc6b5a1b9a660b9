from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import oracle
import pytest
from engine_process import EngineProcess
from hf_reference import Reference
from oracle import Solo, World

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


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A miniature with features at all six sites."""
    return oracle.world(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="session")
def triton() -> None:
    """Needed by the V2 runner; vLLM brings it on x86-64 Linux only."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: vLLM brings it on x86-64 Linux only")


@pytest.fixture(scope="session")
def solo(world: World) -> Iterator[Solo]:
    """Runs its requests alone."""
    made = Solo(world)
    yield made
    made.engine.stop()
