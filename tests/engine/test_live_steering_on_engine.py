"""Steered over gRPC while it generates: a real scheduler, its hub, and one token on."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import miniatures
import oracle
import pytest
import tiny
from oracle import Engine, World
from steerscope.api.v1 import steering_pb2
from steerscope.errors import HubError

pytestmark = pytest.mark.engine

FOREVER = 100_000
NUM_TOKENS = 120
PACE = 0.03


@pytest.fixture(scope="module")
def engine(world: World) -> Iterator[Engine]:
    made = Engine(world, "ordered", enforce_eager=True, **oracle.LIMITS)
    yield made
    made.stop()


class Generating:
    """A request that takes its time, run beside the test. Requests are counted by the engine."""

    num_asked = 0

    def __init__(self, engine: Engine, request: dict[str, Any]) -> None:
        self.name = f"req-{Generating.num_asked}"
        Generating.num_asked += 1
        self._client = engine.client
        self._results: list[Any] = []
        paced = {**request, "pace": PACE}
        self._thread = threading.Thread(target=lambda: self._results.extend(engine.run(paced)))
        self._thread.start()

    def after(self, num_tokens: int) -> str:
        """Its name, once so many of its tokens were seen."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with contextlib.suppress(HubError):
                (completion,) = self._client.get_request_report(self.name).completions
                if completion.num_observed_tokens >= num_tokens:
                    return self.name
            time.sleep(0.01)
        raise AssertionError("it was not seen")

    def result(self) -> Any:
        self._thread.join(60)
        return self._results[0]


def flag(*edits: dict[str, Any]) -> dict[str, Any]:
    return {"extra_args": {"steering": json.dumps({"interventions": edits})}}


def test_it_is_steered_from_the_token_that_the_answer_names_exactly(world, solo, engine):
    edit = miniatures.interventions(world.catalog)["at_resid_mid"][0]
    prompt = tiny.prompts(1, seed=11, low=8, high=12)[0]
    request = {"prompt": prompt, "max_tokens": NUM_TOKENS}
    generating = Generating(engine, request)
    name = generating.after(len(prompt) + 5)
    told = engine.client.steer_request(name, interventions=[edit])
    result = generating.result()
    assert told.state == steering_pb2.STEER_STATE_APPLIED
    first = told.sequences[0].first_position
    assert len(prompt) < first < len(prompt) + NUM_TOKENS - 5
    expected, _ = solo({**request, **flag({**edit, "span": [first, FOREVER]})})
    assert result["tokens"][0] == expected
    assert expected != solo(request)[0], "nothing to see"
    report = engine.client.get_request_report(name, wait=10.0)
    (completion,) = report.completions
    assert completion.steering.changed_at == first
    assert completion.steering_digest == told.steering_digest == report.asked_steering_digest
    assert not completion.unobserved
    assert completion.complete


def test_a_release_gives_the_model_back_to_itself(world, solo, engine):
    edit = miniatures.interventions(world.catalog)["at_resid_mid"][0]
    prompt = tiny.prompts(1, seed=12, low=8, high=12)[0]
    request = {"prompt": prompt, "max_tokens": NUM_TOKENS}
    generating = Generating(engine, {**request, **flag(edit)})
    name = generating.after(len(prompt) + 5)
    (released,) = engine.client.release_request(name)
    result = generating.result()
    first = released.first_position
    expected, _ = solo({**request, **flag({**edit, "span": [0, first]})})
    assert result["tokens"][0] == expected
    report = engine.client.get_request_report(name, wait=10.0)
    (completion,) = report.completions
    assert completion.steering_digest == report.asked_steering_digest == ""
    assert not completion.unobserved
    assert completion.complete


def test_a_request_that_will_come_is_steered_from_its_first_token(world, solo, engine):
    edit = miniatures.interventions(world.catalog)["at_resid_mid"][0]
    prompt = tiny.prompts(1, seed=13, low=20, high=30)[0]
    request = {"prompt": prompt, "max_tokens": 30}
    name = f"req-{Generating.num_asked}"
    told = engine.client.steer_request(name, interventions=[edit], ttl=30.0)
    assert told.state == steering_pb2.STEER_STATE_WAITING
    result = Generating(engine, request).result()
    assert result["request_id"] == name
    assert result["tokens"][0] == solo({**request, **flag(edit)})[0]
    (completion,) = engine.client.get_request_report(name, wait=10.0).completions
    assert completion.complete
    assert completion.steering_digest == told.steering_digest
