"""The default policy and the kill switch on a real engine, exact from the token they name."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import miniatures
import oracle
import pytest
import tiny
from google.protobuf import field_mask_pb2
from oracle import Engine, World
from steerscope.api.v1 import steering_pb2, steering_pb2_grpc

pytestmark = pytest.mark.engine

FOREVER = 100_000
NUM_TOKENS = 60
PACE = 0.03
OFF, FORCE = steering_pb2.OVERRIDE_MODE_OFF, steering_pb2.OVERRIDE_MODE_FORCE


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[Engine]:
    made = Engine(world, "ruled", enforce_eager=True, **oracle.LIMITS)
    yield made
    made.stop()


@pytest.fixture
def rules(engine: Engine) -> Iterator[Any]:
    """Sets fields of the rules; at the end there are none."""
    with grpc.insecure_channel(engine.grpc_address) as channel:
        stub = steering_pb2_grpc.SteeringServiceStub(channel)

        def update(*mask: str, **fields: Any) -> steering_pb2.UpdateRulesResponse:
            request = steering_pb2.UpdateRulesRequest(rules=steering_pb2.Rules(**fields))
            if mask:
                request.update_mask.CopyFrom(field_mask_pb2.FieldMask(paths=mask))
            return stub.UpdateRules(request, timeout=10)

        yield update
        update("*")


def flag(*edits: dict[str, Any]) -> dict[str, Any]:
    return {"extra_args": {"steering": json.dumps({"interventions": edits})}}


def policy(engine: Engine, name: str, edit: dict[str, Any]) -> str:
    engine.client.create_policy(name, [edit])
    return f"policies/{name}"


def completion(engine: Engine, result: dict[str, Any]) -> Any:
    report = engine.client.get_request_report(result["request_id"], wait=10.0)
    (found,) = report.completions
    return found


def test_the_default_governs_who_asks_for_nothing_and_no_one_else(world, solo, engine, rules):
    named = miniatures.interventions(world.catalog)
    usual, other = named["at_resid_mid"][0], named["transcoder"][0]
    rules(default_policy=policy(engine, "usual", usual))
    (prompt,) = tiny.prompts(1, seed=5, low=20, high=30)
    plain = {"prompt": prompt, "max_tokens": 30}
    governed, asked = engine.run(plain, {**plain, **flag(other)})
    assert governed["tokens"][0] == solo({**plain, **flag(usual)})[0]
    assert asked["tokens"][0] == solo({**plain, **flag(other)})[0]
    told = completion(engine, governed)
    assert (told.policy, told.steering_source) == ("usual", steering_pb2.STEERING_SOURCE_DEFAULT)
    assert told.complete
    assert completion(engine, asked).steering_source == steering_pb2.STEERING_SOURCE_INLINE


def test_the_kill_switch_holds_for_all_that_runs_from_a_token_that_is_named(
    world, solo, engine, rules
):
    named = miniatures.interventions(world.catalog)
    mine, forced = named["at_resid_mid"][0], named["transcoder"][0]
    forced_policy = policy(engine, "forced", forced)
    prompts = tiny.prompts(3, seed=7, low=10, high=20)
    requests = [
        {"prompt": prompts[0], "max_tokens": NUM_TOKENS, "pace": PACE, **flag(mine)},
        {"prompt": prompts[1], "max_tokens": NUM_TOKENS, "pace": PACE},
        {"prompt": prompts[2], "max_tokens": 20, "arrive_at": NUM_TOKENS - 20, **flag(mine)},
    ]
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.extend(engine.run(*requests)))
    thread.start()
    time.sleep(NUM_TOKENS * PACE / 4)
    forcing = rules(override={"mode": FORCE, "policy": forced_policy, "reason": "drill"})
    time.sleep(NUM_TOKENS * PACE / 4)
    stopping = rules("override", override={"mode": OFF})
    thread.join(60)
    first = {s.request_id.rpartition("-")[0]: s.first_position for s in forcing.sequences}
    last = {s.request_id.rpartition("-")[0]: s.first_position for s in stopping.sequences}
    for request, result, before in zip(requests[:2], results[:2], ([mine], []), strict=True):
        start, end = first[result["request_id"]], last[result["request_id"]]
        assert len(request["prompt"]) < start < end < len(request["prompt"]) + NUM_TOKENS
        edits = [{**e, "span": [0, start]} for e in before]
        edits.append({**forced, "span": [start, end]})
        alone = {"prompt": request["prompt"], "max_tokens": NUM_TOKENS}
        assert result["tokens"][0] == solo({**alone, **flag(*edits)})[0]
        told = completion(engine, result)
        assert told.steering_source == steering_pb2.STEERING_SOURCE_OVERRIDE
        assert told.steering.changed_at == end
        assert (told.policy, told.steering_digest) == ("", "")
        assert told.asked_policy == ("inline" if before else "")
        assert told.complete
    # Whoever comes while it is off is not steered at all, and is told so.
    plain = {"prompt": prompts[2], "max_tokens": 20}
    assert results[2]["tokens"][0] == solo(plain)[0]
    told = completion(engine, results[2])
    assert (told.steering_source, told.asked_policy) == (
        steering_pb2.STEERING_SOURCE_OVERRIDE,
        "inline",
    )
    rules("override")
    (after,) = engine.run({**plain, **flag(mine)})
    assert after["tokens"][0] == solo({**plain, **flag(mine)})[0]
