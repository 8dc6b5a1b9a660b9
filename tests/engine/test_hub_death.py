"""The hub is killed: serving goes on, steering stays exact, nothing new is accepted unseen."""

from __future__ import annotations

import json
import shutil
import time

import drill
import psutil
import pytest
import tiny
from drill import eventually
from engine_process import HEALTHY_ENV, EngineProcess
from steerscope.client import Client
from steerscope.errors import HubError
from steerscope.steering.rules import Override, OverrideMode
from test_engine import MAX_TOKENS, request, tokens

pytestmark = pytest.mark.engine

PUSH = [{"feature": "direction_1", "add": 8.0}]
BACK_SECONDS = 60


def hub_of(engine: EngineProcess) -> psutil.Process:
    children = psutil.Process(engine.process.pid).children(recursive=True)
    (hub,) = [child for child in children if "steerscope.hub" in child.cmdline()]
    return hub


class Launch:
    """An engine whose hub can be kept from coming back: its catalog is moved away."""

    def __init__(self, tiny_world, folder):
        self.catalog = shutil.copytree(tiny_world.catalog, folder / "catalog")
        config = tiny.write_config(folder / "steerscope.yaml", self.catalog)
        self.address = json.loads(config.read_text())["hub"]["grpc_address"]
        # Eager, since this is about processes: it starts in half the time.
        self.engine = EngineProcess(
            tiny_world.model,
            config,
            folder / "log",
            environment={HEALTHY_ENV: "0"},
            enforce_eager=True,
        )

    def kill_hub(self):
        self.catalog.rename(self.catalog.with_name("away"))
        hub_of(self.engine).kill()
        eventually(lambda: "could not be started again" in self.log, BACK_SECONDS)

    def let_it_return(self):
        self.catalog.with_name("away").rename(self.catalog)
        eventually(self._answers, BACK_SECONDS)

    @property
    def log(self):
        return self.engine.log.read_text(errors="replace")

    def run(self, prompts, policy):
        return self.engine.run(
            *[{**request(p), "extra_args": {"steering": policy}} for p in prompts]
        )

    def _answers(self):
        try:
            with Client(self.address, timeout=2.0) as client:
                return client.list_policies()
        except HubError:
            return None


def test_what_is_in_force_stays_so_while_the_hub_is_dead_and_after(tiny_world, tmp_path, reference):
    launch = Launch(tiny_world, tmp_path)
    prompts = tiny.prompts(6, seed=51)
    steered = [reference.generate(p, MAX_TOKENS, PUSH)[0] for p in prompts]
    plain = [reference.generate(p, MAX_TOKENS)[0] for p in prompts]
    assert steered != plain
    try:
        assert tokens(launch.run(prompts, "push")) == steered
        with Client(launch.address) as client:
            client.create_policy("lasting", PUSH)
            client.create_policy("brief", PUSH, ttl=8.0)
        created_at = time.time()
        for policy in ("brief", "lasting"):
            assert tokens(launch.run(prompts, policy)) == steered
        launch.kill_hub()
        for policy in ("push", "lasting"):
            assert tokens(launch.run(prompts, policy)) == steered
        assert tokens(launch.engine.run(*map(request, prompts))) == plain
        time.sleep(max(created_at + 8.0 - time.time(), 0.0))
        for policy in ("new-one", "brief"):
            (refused,) = launch.run(prompts[:1], policy)
            assert refused["parameter"] == "vllm_xargs.steering"
        launch.let_it_return()
        with Client(launch.address) as client:
            created = client.list_policies("origin=created")
            assert [policy.name for policy in created] == ["policies/lasting"]
            client.update_rules(override=Override(mode=OverrideMode.OFF, reason="drill"))
        launch.kill_hub()
        assert tokens(launch.run(prompts, "lasting")) == plain
        launch.let_it_return()
        assert tokens(launch.run(prompts, "lasting")) == plain
        with Client(launch.address) as client:
            assert client.get_rules().rules.override.mode is OverrideMode.OFF
            assert tokens(launch.run(prompts, "lasting")) == plain
            client.update_rules(override=None)
            assert tokens(launch.run(prompts, "lasting")) == steered
    finally:
        launch.engine.stop()


def test_nothing_gives_when_the_hub_is_killed_under_load(tmp_path):
    drilled = drill.Drill(tmp_path, seed=2)
    try:
        outcome = drilled.run(6, ("hub", "hub", "client"), enough=20)
    finally:
        drilled.close()
    assert outcome["violations"] == []
    assert outcome["policies acknowledged and kept"] > 0


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
