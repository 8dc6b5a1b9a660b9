"""KV from elsewhere: served as ever, told to be unobserved, and never mixed with steering."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import tiny
from engine_process import EngineProcess, steering
from steerscope.api.v1 import telemetry_pb2 as pb
from steerscope.client import Client

pytestmark = pytest.mark.engine

NUM_STORED = 128
"""Whole blocks of a prompt of 150 tokens."""


class Served:
    """An engine that shares a store on disk with those before it."""

    def __init__(self, world, folder, name: str) -> None:
        config = tiny.write_config(folder / f"{name}.yaml", world.catalog)
        connector = {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(folder / "kv")},
        }
        self.process = EngineProcess(
            world.model,
            config,
            folder / f"{name}.log",
            enforce_eager=True,
            max_num_seqs=8,
            max_num_batched_tokens=256,
            enable_prefix_caching=True,
            kv_transfer_config=connector,
        )
        self.client = Client(json.loads(config.read_text())["hub"]["grpc_address"])

    def ask(self, prompt: list[int], **more: object) -> tuple[dict, pb.Completion]:
        (result,) = self.process.run({"prompt": prompt, "max_tokens": 6, **more})
        report = self.client.get_request_report(result["request_id"], wait=10.0)
        (completion,) = report.completions
        return result, completion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("external")


@pytest.fixture(scope="module")
def engine(tiny_world, folder) -> Iterator[Served]:
    first = Served(tiny_world, folder, "first")
    try:
        (prompt,) = tiny.prompts(1, seed=71, low=150, high=151)
        result, completion = first.ask(prompt)
        assert completion.complete
    finally:
        first.process.stop()
    second = Served(tiny_world, folder, "second")
    second.told = result["tokens"]
    yield second
    second.process.stop()


def test_tokens_that_were_brought_are_unobserved_with_the_reason(engine, client_prompt):
    for _ in range(2):  # brought at first, then found in the prefix cache: still nobody saw them
        result, completion = engine.ask(client_prompt)
        assert result["tokens"] == engine.told
        assert result["cached"] == NUM_STORED
        assert completion.num_cached_tokens == 0
        assert completion.num_observed_tokens == 150 - NUM_STORED + 5
        assert [(u.reason, u.num_tokens) for u in completion.unobserved] == [
            (pb.UNOBSERVED_REASON_EXTERNAL_KV, NUM_STORED)
        ]
        assert not completion.complete


@pytest.fixture
def client_prompt():
    return tiny.prompts(1, seed=71, low=150, high=151)[0]


def test_what_this_engine_computed_is_observed_also_from_the_cache(engine):
    (prompt,) = tiny.prompts(1, seed=72, low=20, high=21)
    assert engine.ask(prompt)[1].complete


def test_steering_is_refused_by_field_where_kv_comes_and_goes(engine, client_prompt):
    edit = steering({"feature": "direction_1", "add": 4.0})
    (refused,) = engine.process.run({"prompt": client_prompt, "max_tokens": 2, "extra_args": edit})
    assert refused["parameter"] == "vllm_xargs.steering"
    assert "--kv-transfer-config" in refused["error"]
