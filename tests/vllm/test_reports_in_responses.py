"""``steerscope_report``: the report inside the OpenAI response, as the official client reads it."""

import re
import urllib.request

import openai
import pytest
from steerscope.demo import world
from steerscope.demo.live.server import MODEL_NAME

pytestmark = pytest.mark.server

QUESTION = world.questions("known", "en", 1, 29)[0].question


def asked(want=1, **more):
    flags = {"vllm_xargs": {"steerscope_report": want, **more.pop("flags", {})}}
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": more.pop("temperature", 0),
        "max_tokens": 12,
        "extra_body": flags,
        **more,
    }


def test_a_plain_response_holds_the_report_and_the_official_client_reads_it(openai_client, client):
    reply = openai_client.chat.completions.create(**asked(flags={"steering": "force-known"}))
    report = reply.steerscope
    assert report["name"] == f"requests/{reply.id}"
    assert report["state"] == "REQUEST_STATE_FINISHED"
    (completion,) = report["completions"]
    assert completion["complete"]
    assert completion["policy"] == "force-known"
    assert {s["signal"] for s in completion["signals"]} >= {"hallucination_risk"}
    assert completion["features"] == []
    over_grpc = client.get_request_report(reply.id)
    assert completion["steering_digest"] == over_grpc.completions[0].steering_digest
    assert reply.choices[0].message.content


def test_a_stream_ends_with_one_more_chunk_without_choices(openai_client):
    plain = openai_client.chat.completions.create(**asked(0), stream=True)
    without = list(plain)
    stream = openai_client.chat.completions.create(
        **asked(), stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert last.choices == []
    assert last.id == chunks[0].id
    assert last.object == "chat.completion.chunk"
    assert last.steerscope["name"] == f"requests/{last.id}"
    assert last.steerscope["completions"][0]["complete"]
    assert chunks[-1].usage is not None
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "".join(c.choices[0].delta.content or "" for c in without if c.choices)
    assert not any(hasattr(chunk, "steerscope") for chunk in (*chunks, *without))


def test_activations_come_if_they_are_asked_for(openai_client):
    reply = openai_client.chat.completions.create(**asked(2))
    features = reply.steerscope["completions"][0]["features"]
    known = next(f for f in features if f["feature"] == "known_entity")
    assert len(known["activations"]) == reply.usage.total_tokens - 1


def test_several_completions_and_several_prompts_are_all_told(openai_client):
    reply = openai_client.chat.completions.create(**asked(temperature=1.0), n=3)
    assert len(reply.steerscope["completions"]) == 3
    reply = openai_client.completions.create(
        model=MODEL_NAME,
        prompt=["One two", "Three four"],
        max_tokens=3,
        extra_body={"vllm_xargs": {"steerscope_report": 1}},
    )
    assert len(reply.steerscope["reports"]) == 2


@pytest.mark.parametrize("flag", [3, "yes", 0.5, [1]])
def test_another_value_is_refused_and_the_field_named(openai_client, flag):
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(**asked(flag))
    assert caught.value.body["param"] == "vllm_xargs.steerscope_report"


def test_a_request_that_is_refused_has_no_report(http):
    flags = {"steerscope_report": 1, "steering": "nobody"}
    status, reply = http.chat(QUESTION, vllm_xargs=flags)
    assert status == 400
    assert "steerscope" not in reply


def test_vllm_s_own_metrics_page_has_ours_too(demo_server, http):
    http.say(QUESTION)
    for accept in ("text/plain", "application/openmetrics-text;version=1.0.0"):
        request = urllib.request.Request(
            f"{demo_server.base_url}/metrics", headers={"accept": accept}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            page = response.read().decode()
        assert "\nvllm:" in page
        assert "\nsteerscope_observed_tokens_total{" in page
        assert page.count("# EOF") == ("openmetrics" in response.headers["content-type"])
    ours = re.compile(r"^steerscope_\w+", re.MULTILINE)
    assert set(ours.findall(page)) == set(ours.findall(demo_server.metrics()))
