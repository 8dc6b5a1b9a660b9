"""Steering changed while a request runs: exact from one token on, and keyed apart from there."""

from __future__ import annotations

import json
from collections.abc import Iterator

import miniatures
import oracle
import pytest
import tiny
from oracle import Engine, World

pytestmark = pytest.mark.engine

FOREVER = 100_000
BLOCK_SIZE = 32
MAX_TOKENS = 90


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[Engine]:
    roomy = {**oracle.LIMITS, "num_gpu_blocks_override": 200}
    made = Engine(world, "changing", enforce_eager=True, **roomy)
    yield made
    made.stop()


def spec(*edits):
    return json.dumps({"interventions": edits})


def steered(prompt, edits, **more):
    flag = {"extra_args": {"steering": spec(*edits)}} if edits else {}
    return {"prompt": prompt, "max_tokens": MAX_TOKENS, **flag, **more}


def test_from_one_token_on_it_is_the_new_steering_and_before_it_the_old(world, solo, engine):
    named = miniatures.interventions(world.catalog)
    old, new = named["at_resid_mid"][0], named["transcoder"][0]
    cases = [([], [new]), ([old], [new]), ([old], [old, new]), ([new], [old])]
    requests = [
        steered(prompt, before, change_after=7 + 9 * i, change_to=spec(*after))
        for i, (prompt, (before, after)) in enumerate(
            zip(tiny.prompts(4, seed=3, low=20, high=70), cases, strict=True)
        )
    ]
    for request, result, (before, after) in zip(
        requests, engine.run(*requests), cases, strict=True
    ):
        at = result["changed_at"]
        assert at >= len(request["prompt"]) + request["change_after"] - 1
        edits = [{**e, "span": [0, at]} for e in before]
        edits += [{**e, "span": [at, FOREVER]} for e in after]
        expected, alone = solo(steered(request["prompt"], edits))
        assert result["tokens"][0] == expected
        assert expected != solo(steered(request["prompt"], before))[0], "nothing to see"
        (seen,) = engine.seen(result["request_id"])
        off = abs(seen.acts_NF - alone.acts_NF) > oracle.TOLERANCE * engine.spread_F
        assert not off.any()
        moved = abs(seen.deltas_NF - alone.deltas_NF) > oracle.TOLERANCE * engine.spread_F
        assert not moved.any()
        receipt = seen.completion
        assert not receipt.unobserved
        assert receipt.steering.changed_at == at
        # Nobody asked the hub for this change, so what was served is not what was asked.
        assert receipt.steering_digest != seen.asked_digest
        assert not receipt.complete


def test_blocks_from_the_change_on_are_keyed_apart(world, engine):
    edit = miniatures.interventions(world.catalog)["add"][0]
    (prompt,) = tiny.prompts(1, seed=9, low=70, high=71)
    changing = steered(prompt, [], change_after=10, change_to=spec(edit))
    (result,) = engine.run(changing)
    at = result["changed_at"]
    assert at > len(prompt)
    whole = prompt + result["tokens"][0][:-1]
    before = at // BLOCK_SIZE * BLOCK_SIZE
    everything = (len(whole) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert before < everything
    # Whoever is not steered from there on may share what was computed before, and no more.
    (plain,) = engine.run({"prompt": whole, "max_tokens": 2})
    assert plain["cached"] == before
    # Whoever is steered the same from the same token on may share it all.
    same = {"extra_args": {"steering": spec({**edit, "span": [at, FOREVER]})}}
    (shared,) = engine.run({"prompt": whole, "max_tokens": 2, **same})
    assert shared["cached"] == everything


def test_a_change_in_the_middle_of_the_prompt_rekeys_the_rest_of_it(world, solo, engine):
    edit = miniatures.interventions(world.catalog)["add"][0]
    first, second = tiny.prompts(2, seed=13, low=150, high=151)
    # The first token of another request is the moment: the long prompt is then half computed.
    crowd = [
        {"prompt": first[:3], "max_tokens": 30, "arrive_at": 0},
        {"prompt": second, "max_tokens": 8, "arrive_at": 2, "change_at_step": 4},
    ]
    crowd[1]["change_to"] = spec(edit)
    _, result = engine.run(*crowd)
    at = result["changed_at"]
    assert 0 < at < len(second)
    expected, _ = solo(steered(second, [{**edit, "span": [at, FOREVER]}]) | {"max_tokens": 8})
    assert result["tokens"][0] == expected
    (plain,) = engine.run({"prompt": second, "max_tokens": 2})
    assert plain["cached"] == at // BLOCK_SIZE * BLOCK_SIZE


def test_releasing_a_request_ends_its_steering(world, solo, engine):
    edit = miniatures.interventions(world.catalog)["add"][0]
    (prompt,) = tiny.prompts(1, seed=17, low=40, high=41)
    (result,) = engine.run(steered(prompt, [edit], change_after=12, change_to="release"))
    at = result["changed_at"]
    expected, _ = solo(steered(prompt, [{**edit, "span": [0, at]}]))
    assert result["tokens"][0] == expected
