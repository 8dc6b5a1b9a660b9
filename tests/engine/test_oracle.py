"""The oracle in every engine mode, and its power: planted bugs must not get past it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import miniatures
import mutations
import oracle
import pytest
import suites
import tiny
from oracle import World

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("mode", "count", "least_tokens"),
    [
        ("v1 compiled", 180, 19_000),
        ("tensor parallel 2", 60, 5_500),
        ("pipeline parallel 2", 60, 5_500),
        ("speculative decoding (ngram)", 60, 5_800),
    ],
)
def test_a_crowd_gets_what_each_gets_alone(world, solo, mode, count, least_tokens):
    verdict = suites.crowd(world, solo, mode, count)
    assert verdict["passed"], verdict
    assert verdict["observed_tokens"] >= least_tokens
    assert verdict["preemptions"] > 0
    assert verdict["cached_tokens"] > 0
    assert verdict["aborted"] > 0


@pytest.mark.usefixtures("triton")
def test_a_crowd_gets_what_each_gets_alone_on_the_v2_runner(world, solo):
    verdict = suites.crowd(world, solo, "v2 eager", 30, max_tokens=24)
    assert verdict["passed"], verdict
    assert verdict["preemptions"] > 0


def test_observing_changes_no_bit_of_what_unsteered_requests_get(world):
    line = suites.unsteered(world, 20)
    assert line["passed"], line
    assert line["logits"] == 20 * 8 * tiny.VOCAB_SIZE


@pytest.mark.parametrize("name", mutations.MUTATIONS)
def test_a_planted_bug_is_noticed(world, solo, name):
    line = suites.mutation(world, solo, name)
    assert line["passed"], line


def test_where_no_bug_is_planted_the_same_requests_show_nothing(world, solo):
    assert suites.mutation(world, solo, "")["noticed"] == {}


@pytest.fixture(scope="module")
def eager(world: World) -> Iterator[oracle.Engine]:
    """Few rows for steering, and more interventions in rotation than it has."""
    engine = oracle.Engine(world, "eager", enforce_eager=True, **oracle.LIMITS)
    yield engine
    engine.stop()


def test_a_thousand_policies_in_rotation_neither_leak_nor_wait(world, solo, eager):
    size = miniatures.interventions(world.catalog)["add"][0]
    requests = [
        {
            "prompt": prompt,
            "max_tokens": 3,
            "extra_args": {"steering": json.dumps({"interventions": [size], "max_dose": 1 + i})},
        }
        for i, prompt in enumerate(tiny.prompts(1000, seed=5, high=12))
    ]
    verdict = oracle.judge(eager, solo, requests[:990:30])
    assert verdict["passed"], verdict
    results = eager.run(*requests)
    assert [len(result["tokens"][0]) for result in results] == [3] * 1000
    verdict = oracle.judge(eager, solo, requests[:990:30])
    assert verdict["passed"], verdict
