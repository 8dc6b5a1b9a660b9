"""The hub is killed: serving goes on, steering stays exact, nothing new is accepted unseen."""

from __future__ import annotations

import json
import time

import psutil
import pytest
import tiny
from engine_process import EngineProcess
from test_engine import MAX_TOKENS, request, tokens

pytestmark = pytest.mark.engine


def hub_of(engine: EngineProcess) -> psutil.Process:
    children = psutil.Process(engine.process.pid).children(recursive=True)
    (hub,) = [child for child in children if "steerscope.hub" in child.cmdline()]
    return hub


def test_serving_goes_on_and_known_policies_stay_in_force(tiny_world, tmp_path, reference):
    config = tiny.write_config(tmp_path / "steerscope.yaml", tiny_world.catalog)
    # Eager, since this is about processes: it starts in half the time.
    engine = EngineProcess(tiny_world.model, config, tmp_path / "log", enforce_eager=True)
    try:
        prompts = tiny.prompts(6, seed=51)
        push = [{"feature": "direction_1", "add": 8.0}]
        expected = [reference.generate(p, MAX_TOKENS, push)[0] for p in prompts]
        named = [{**request(p), "extra_args": {"steering": "push"}} for p in prompts]
        assert tokens(engine.run(*named)) == expected
        hub = hub_of(engine)
        hub.kill()
        while hub.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.05)
        for _ in range(3):
            assert tokens(engine.run(*named)) == expected
            time.sleep(0.5)
        assert (
            tokens(engine.run(request(prompts[0])))[0]
            == (reference.generate(prompts[0], MAX_TOKENS)[0])
        )
        (refused,) = engine.run({**request(prompts[0]), "extra_args": {"steering": "new-one"}})
        assert refused["parameter"] == "vllm_xargs.steering"
    finally:
        engine.stop()


def test_the_hub_ends_with_the_launch_and_leaves_no_sockets(tiny_world, tmp_path):
    config = tiny.write_config(tmp_path / "steerscope.yaml", tiny_world.catalog)
    engine = EngineProcess(tiny_world.model, config, tmp_path / "log", enforce_eager=True)
    hub = hub_of(engine)
    command = hub.cmdline()
    endpoint = command[command.index("--endpoint") + 1]
    engine.process.kill()  # no chance to clean up
    gone, alive = psutil.wait_procs([hub], timeout=10)
    engine.stop()
    assert not alive, json.dumps(command)
    assert gone
    assert not (tmp_path / endpoint).exists()
