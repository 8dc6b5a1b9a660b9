"""Rules that look at who sends a request, over real HTTP: headers, tokens, the kill switch."""

import contextlib

import grpc
import openai
import pytest
from google.protobuf import field_mask_pb2
from steerscope.api.v1 import steering_pb2, steering_pb2_grpc
from steerscope.demo import world
from steerscope.demo.live.server import MODEL_NAME

pytestmark = pytest.mark.server

OFF = steering_pb2.OVERRIDE_MODE_OFF
DEFAULT, NAMED, BOUND, OVERRIDE = (
    getattr(steering_pb2, f"STEERING_SOURCE_{name}")
    for name in ("DEFAULT", "NAMED", "BOUND", "OVERRIDE")
)
QUESTION = world.questions("known", "en", 1, 23)[0].question


@pytest.fixture
def ruled(demo_server):
    """Puts rules in force for a block."""
    with grpc.insecure_channel(demo_server.grpc_address) as channel:
        stub = steering_pb2_grpc.SteeringServiceStub(channel)

        @contextlib.contextmanager
        def during(**rules):
            asked = steering_pb2.UpdateRulesRequest(rules=steering_pb2.Rules(**rules))
            stub.UpdateRules(asked, timeout=10)
            yield
            asked = steering_pb2.UpdateRulesRequest(
                update_mask=field_mask_pb2.FieldMask(paths=["*"])
            )
            stub.UpdateRules(asked, timeout=10)

        yield during


@pytest.fixture
def say(demo_server):
    """The answer's text and the id of its request, as someone who sends these headers."""

    def say(policy=None, token="none", **headers):
        client = openai.OpenAI(base_url=f"{demo_server.base_url}/v1", api_key=token, max_retries=0)
        flag = {"vllm_xargs": {"steering": policy}} if policy else {}
        reply = client.chat.completions.create(
            model=MODEL_NAME,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=24,
            extra_body=flag,
            extra_headers={name.replace("_", "-"): value for name, value in headers.items()},
        )
        return reply.choices[0].message.content, reply.id

    return say


@pytest.fixture
def receipt(client):
    def receipt(request_id):
        (completion,) = client.get_request_report(request_id, wait=10.0).completions
        return completion

    return receipt


def binding(policy="policies/force-unknown", **match):
    return steering_pb2.Binding(binding="rule", match=match, policy=policy)


def test_a_header_binds_and_beats_what_is_asked(ruled, say, receipt):
    plain, _ = say()
    steered, _ = say("force-unknown")
    assert plain != steered
    with ruled(bindings=[binding(headers={"x-team": "red"})]):
        assert say()[0] == plain
        assert say(x_team="blue")[0] == plain
        text, request_id = say("force-known", x_team="red")
        assert text == steered
        told = receipt(request_id)
    assert told.steering_source == BOUND
    assert (told.policy, told.steering_rule) == ("force-unknown", "rule")
    assert told.asked_policy == "force-known"
    assert told.complete
    assert say("force-known", x_team="red")[0] == say("force-known")[0]


def test_a_token_binds_its_identity(ruled, say, team_token, receipt):
    steered, plain = say("force-unknown")[0], say()[0]
    with ruled(bindings=[binding(identity="team-a")]):
        assert say()[0] == plain
        text, request_id = say(token=team_token)
    assert text == steered
    assert receipt(request_id).steering_rule == "rule"


def test_a_binding_without_a_policy_keeps_its_requests_unsteered(ruled, say, receipt):
    with ruled(bindings=[binding(policy="", headers={"x-team": "red"})]):
        text, request_id = say("force-unknown", x_team="red")
    assert text == say()[0]
    told = receipt(request_id)
    assert (told.policy, told.asked_policy) == ("", "force-unknown")
    assert told.steering_source == BOUND


def test_an_identity_may_only_ask_for_the_policies_it_is_allowed(say, team_token, receipt):
    _, request_id = say("force-known", token=team_token)
    assert receipt(request_id).steering_source == NAMED
    with pytest.raises(openai.BadRequestError) as caught:
        say("force-unknown", token=team_token)
    assert "may not use or change policy 'force-unknown'" in str(caught.value)
    assert caught.value.body["param"] == "vllm_xargs.steering"


def test_the_model_s_name_binds_everything_it_serves(ruled, say):
    with ruled(bindings=[binding(model="another-model")]):
        plain, _ = say()
    with ruled(bindings=[binding(model=MODEL_NAME)]):
        assert say()[0] == say("force-unknown")[0] != plain


def test_the_default_and_the_kill_switch(ruled, say, receipt):
    plain, steered = say()[0], say("force-unknown")[0]
    with ruled(default_policy="policies/force-unknown"):
        text, request_id = say()
        assert text == steered
        assert receipt(request_id).steering_source == DEFAULT
    with ruled(default_policy="policies/force-unknown", override={"mode": OFF}):
        text, request_id = say("force-unknown")
        assert text == plain
        told = receipt(request_id)
    assert (told.steering_source, told.asked_policy) == (OVERRIDE, "force-unknown")
    assert told.complete
    assert say()[0] == plain
