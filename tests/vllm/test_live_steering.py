"""Orders for requests that come over HTTP; those that are met mid-generation: tests/engine."""

import json
import urllib.request

import pytest
from steerscope.api.v1 import steering_pb2
from steerscope.demo import world
from steerscope.demo.live.server import MODEL_NAME
from steerscope.errors import SpecError, SteerscopeError

pytestmark = pytest.mark.server

EDIT = {"feature": "unknown_entity", "add": 60.0, "phase": "generation"}


def asked(seed):
    return world.questions("known", "en", 1, seed)[0].question


class Stream:
    """A streamed chat; its token ids."""

    def __init__(self, server, question, name, policy=None, num_tokens=16):
        body = {
            "model": MODEL_NAME,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": num_tokens,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
        if policy is not None:
            body["vllm_xargs"] = {"steering": policy}
        request = urllib.request.Request(
            server.base_url + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "X-Request-Id": name},
        )
        self.name = f"chatcmpl-{name}"
        self.tokens = []
        self._response = urllib.request.urlopen(request, timeout=60)

    def read(self):
        for line in self._response:
            if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                continue
            for choice in json.loads(line[6:])["choices"]:
                self.tokens += choice.get("token_ids") or []
        self._response.close()
        return self


def the_completion(client, name):
    (completion,) = client.get_request_report(name, wait=10.0).completions
    return completion


def test_an_order_waits_for_a_request_that_will_come(demo_server, client):
    question = asked(73)
    told = client.steer_request("chatcmpl-live-3", policy="force-unknown", ttl=30.0)
    assert told.state == steering_pb2.STEER_STATE_WAITING
    assert told.expire_time.seconds > 0
    stream = Stream(demo_server, question, "live-3").read()
    completion = the_completion(client, stream.name)
    assert completion.policy == "force-unknown"
    assert completion.steering_digest == told.steering_digest
    assert completion.complete
    assert completion.steering.num_tokens >= 1
    flagged = Stream(demo_server, question, "live-3-flagged", policy="force-unknown").read()
    assert stream.tokens == flagged.tokens


def test_an_order_that_was_voided_changes_nothing(demo_server, client):
    client.steer_request("chatcmpl-live-4", policy="force-unknown", ttl=30.0)
    assert client.release_request("chatcmpl-live-4") == []
    stream = Stream(demo_server, asked(74), "live-4").read()
    plain = Stream(demo_server, asked(74), "live-4-plain").read()
    assert stream.tokens == plain.tokens


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"policy": "nobody-made-it"}, "policy"),
        ({}, "policy"),
        ({"policy": "force-known", "interventions": [EDIT]}, "policy"),
        ({"interventions": [{"feature": "no_such", "clamp": 1.0}]}, "interventions[0].feature"),
        ({"policy": "force-known", "ttl": 7200.0}, "ttl"),
        ({"policy": "force-known", "max_dose": 0.5}, "max_dose"),
    ],
)
def test_what_is_asked_wrongly_names_its_field(client, arguments, field):
    with pytest.raises(SpecError) as caught:
        client.steer_request("chatcmpl-none", **arguments)
    assert caught.value.field == field


def test_releasing_what_is_not_there_says_so(client):
    with pytest.raises(SteerscopeError, match="no request 'chatcmpl-none' runs"):
        client.release_request("chatcmpl-none")
