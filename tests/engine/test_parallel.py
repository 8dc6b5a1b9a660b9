"""Tensor and pipeline parallel: the same answers and the same activations, each told once."""

from __future__ import annotations

import json

import pytest
import tiny
from engine_process import EngineProcess
from steerscope.client import Client
from test_engine import MAX_TOKENS, SPECS, request

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "parallel", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp2", "pp2"]
)
def test_steered_batches_equal_plain_transformers_and_are_observed_once(
    tiny_world, tmp_path, reference, monkeypatch, parallel
):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    config = tiny.write_config(tmp_path / "steerscope.yaml", tiny_world.catalog)
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    engine = EngineProcess(tiny_world.model, config, tmp_path / "log", **limits, **parallel)
    try:
        prompts = tiny.prompts(27, seed=61, high=100)
        specs = [SPECS[i % len(SPECS)] for i in range(len(prompts))]
        results = engine.run(*map(request, prompts, specs))
        client = Client(json.loads(config.read_text())["hub"]["grpc_address"])
        for prompt, spec, result in zip(prompts, specs, results, strict=True):
            expected, acts = reference.generate(prompt, MAX_TOKENS, spec or [])
            assert result["tokens"][0] == expected, (spec, len(prompt))
            report = client.get_request_report(result["request_id"], wait=10.0)
            (completion,) = report.completions
            assert completion.complete
            assert completion.num_observed_tokens == len(prompt) + MAX_TOKENS - 1
            for track in completion.features:
                assert list(track.activations) == pytest.approx(
                    acts[track.feature], rel=1e-3, abs=1e-3
                )
    finally:
        engine.stop()
