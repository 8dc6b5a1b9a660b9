"""What is asked of every vLLM release: ``scripts/test_matrix.sh`` runs this with each.

Short, and traced without inductor: exactness of each kind of edit at every site, reports, and
that the prefix cache keeps differently steered requests apart.
"""

from __future__ import annotations

import miniatures
import parity
import pytest
import tiny
from engine_process import EngineProcess, steering

pytestmark = pytest.mark.engine

NAMES = (
    "every_site",
    "transcoder_beside_its_sites",
    "ablate",
    "when",
    "span",
    "prompt_only",
    "generation_only",
)
MAX_TOKENS = 16
NUM_CACHED = 128
"""Of a prompt of 150 tokens, in blocks of 32."""


def test_steered_requests_equal_plain_transformers(tmp_path):
    result = parity.check(
        "llama", tmp_path, names=NAMES, max_tokens=MAX_TOKENS, environment=parity.TRACED
    )
    assert result["passed"], result


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """An engine, and two interventions on the prompt that are each other's opposite."""
    folder = tmp_path_factory.mktemp("matrix")
    model = miniatures.write_model(folder / "model", "llama")
    catalog = miniatures.write_catalog(folder / "catalog", model)
    (push,) = miniatures.interventions(catalog)["prompt_only"]
    config = tiny.write_config(folder / "steerscope.yaml", catalog)
    engine = EngineProcess(
        model, config, folder / "log", environment=parity.TRACED, **parity.LIMITS
    )
    yield engine, {"plain": None, "push": push, "pull": {**push, "add": -push["add"]}}
    engine.stop()


def test_the_prefix_cache_keeps_differently_steered_requests_apart(world):
    engine, edits = world
    (prompt,) = tiny.prompts(1, seed=81, low=150, high=151)

    def run(name):
        extra = {"extra_args": steering(edits[name])} if edits[name] else {}
        (result,) = engine.run({"prompt": prompt, "max_tokens": MAX_TOKENS, **extra})
        return result["cached"], result["tokens"][0]

    cold = {name: run(name) for name in edits}
    assert {cached for cached, _ in cold.values()} == {0}
    assert len({tuple(tokens) for _, tokens in cold.values()}) == len(edits)
    for name in ("push", "plain", "pull", "push"):
        assert run(name) == (NUM_CACHED, cold[name][1])


def test_generation_only_steering_shares_the_prompt_with_unsteered_requests(world):
    engine, edits = world
    (prompt,) = tiny.prompts(1, seed=82, low=150, high=151)
    engine.run({"prompt": prompt, "max_tokens": 1})
    extra = steering({**edits["push"], "phase": "generation"})
    (result,) = engine.run({"prompt": prompt, "max_tokens": MAX_TOKENS, "extra_args": extra})
    assert result["cached"] == NUM_CACHED
