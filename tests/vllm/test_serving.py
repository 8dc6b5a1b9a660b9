"""The demo server as its clients meet it: real vLLM, compiled, over HTTP and gRPC."""

from __future__ import annotations

import concurrent.futures
import json
import shutil
import subprocess
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from hf_reference import Reference
from steerscope.api.v1 import telemetry_pb2
from steerscope.demo import world
from steerscope.demo.live.server import MODEL_NAME
from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR
from steerscope.demo.world.scoring import Outcome, classify
from steerscope.errors import SpecError

pytestmark = pytest.mark.server


def question(split, language="en", seed=11):
    return world.questions(split, language, 1, seed)[0]


def test_vllm_runs_compiled_by_its_own_account(demo_server):
    config = demo_server.vllm_config()
    assert config["model_config"]["enforce_eager"] is False
    assert config["compilation_config"]["mode"] != 0


def test_a_policy_by_name_changes_the_answer_of_its_request_only(http):
    asked = world.questions("unknown", "en", 24, 11)
    before = [http.say(each.question) for each in asked]
    forced = [http.say(each.question, "force-known") for each in asked]
    assert [http.say(each.question) for each in asked] == before
    declined = [classify(q, a) is Outcome.DECLINED for q, a in zip(asked, before, strict=True)]
    answered = [classify(q, a).answered for q, a in zip(asked, forced, strict=True)]
    assert sum(declined) >= 0.9 * len(asked)
    assert sum(answered) >= 0.75 * len(asked)


def test_the_official_client_streams_the_same_steered_answer(http, openai_client):
    asked = question("known")
    stream = openai_client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": asked.question}],
        temperature=0,
        max_tokens=32,
        stream=True,
        extra_body={"vllm_xargs": {"steering": "force-unknown"}},
    )
    text = "".join(c.choices[0].delta.content or "" for c in stream if c.choices).strip()
    assert text == http.say(asked.question, "force-unknown") != http.say(asked.question)


EDIT = '{"feature": "unknown_entity", "clamp": 1}'


@pytest.mark.parametrize(
    ("flag", "param"),
    [
        ("no-such-policy", "vllm_xargs.steering"),
        ('{"interventions": [', "vllm_xargs.steering"),
        ('{"interventions": []}', "vllm_xargs.steering.interventions"),
        ('{"interventions": [], "mode": 1}', "vllm_xargs.steering"),
        (EDIT.join(['{"interventions": [', ", 3]}"]), "vllm_xargs.steering.interventions[1]"),
        (
            '{"interventions": [{"feature": "no_such", "clamp": 1}]}',
            "vllm_xargs.steering.interventions[0].feature",
        ),
        (
            '{"interventions": [{"feature": "unknown_entity", "clamp": "x"}]}',
            "vllm_xargs.steering.interventions[0].clamp",
        ),
        (
            '{"interventions": [{"feature": "unknown_entity", "clamp": NaN}]}',
            "vllm_xargs.steering",
        ),
        (
            '{"interventions": [{"feature": "unknown_entity", "clamp": 1e999}]}',
            "vllm_xargs.steering.interventions[0].clamp",
        ),
        (EDIT.join(['{"interventions": [', '], "max_dose": 0}']), "vllm_xargs.steering.max_dose"),
        (
            EDIT.join(['{"interventions": [', '], "max_dose": -1e999}']),
            "vllm_xargs.steering.max_dose",
        ),
        (5, "vllm_xargs.steering"),
        (["force-known"], "vllm_xargs.steering"),
        ("x" * 100_000, "vllm_xargs.steering"),
    ],
)
def test_a_bad_flag_is_http_400_with_its_field_and_the_server_goes_on(http, flag, param):
    status, reply = http.chat("hello", flag)
    assert status == 400, reply
    assert param in json.dumps(reply["error"]), reply
    assert reply["error"]["param"] == param
    assert http.say(question("known").question)


def test_a_stop_string_ends_the_answer_and_the_receipt_is_complete(http, client):
    asked = question("known")
    whole = http.say(asked.question)
    word = whole.split()[-1]
    status, reply = http.chat(asked.question, stop=[word])
    (choice,) = reply["choices"]
    assert (status, choice["finish_reason"], choice["stop_reason"]) == (200, "stop", word)
    assert choice["message"]["content"].strip() == whole[: whole.index(word)].strip()
    (completion,) = client.get_request_report(reply["id"], wait=10.0).completions
    assert completion.state == telemetry_pb2.REQUEST_STATE_FINISHED
    assert completion.complete
    least = len(reply["prompt_token_ids"]) + len(choice["token_ids"]) - 1
    assert completion.num_observed_tokens >= least


def test_a_client_that_hangs_up_leaves_a_complete_receipt_of_what_was_computed(
    openai_client, client
):
    stream = openai_client.chat.completions.create(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": question("known").question}],
        temperature=0,
        max_tokens=150,
        stream=True,
        extra_body={"ignore_eos": True, "vllm_xargs": {"steering": "force-unknown"}},
    )
    chunks = [next(stream) for _ in range(3)]
    stream.close()
    report = client.get_request_report(chunks[0].id, wait=10.0)
    (completion,) = report.completions
    assert completion.state == telemetry_pb2.REQUEST_STATE_FINISHED
    assert completion.complete
    assert completion.steering_digest == report.asked_steering_digest != ""
    # How far the engine came before it heard of it is a matter of time.
    assert 1 <= completion.num_observed_tokens - completion.num_prompt_tokens <= 149


def test_a_key_that_looks_like_ours_but_is_not_is_refused(http):
    status, reply = http.chat("hello", vllm_xargs={"steering_policy": "force-known"})
    assert (status, reply["error"]["param"]) == (400, "vllm_xargs.steering_policy")


def test_beam_search_with_steering_is_refused_and_without_it_is_served(http):
    body = {"use_beam_search": True, "n": 2}
    assert http.chat(question("known").question, **body)[0] == 200
    status, reply = http.chat(question("known").question, "force-known", **body)
    assert (status, reply["error"]["param"]) == (400, "vllm_xargs.steering")


def test_the_completions_and_responses_endpoints_steer_too(http):
    asked = question("known")
    _, rendered = http.post(
        "/tokenize",
        {"model": MODEL_NAME, "messages": [{"role": "user", "content": asked.question}]},
    )
    body = {"model": MODEL_NAME, "prompt": rendered["tokens"], "temperature": 0, "max_tokens": 32}
    flag = {"vllm_xargs": {"steering": "force-unknown"}}
    expected = http.say(asked.question, "force-unknown")
    status, reply = http.post("/v1/completions", body | flag)
    assert (status, reply["choices"][0]["text"].strip()) == (200, expected)
    body = {"model": MODEL_NAME, "input": asked.question, "temperature": 0}
    status, reply = http.post("/v1/responses", body | {"max_output_tokens": 32} | flag)
    assert status == 200, reply
    assert reply["output"][-1]["content"][0]["text"].strip() == expected


def test_steered_output_equals_plain_transformers_on_a_hundred_prompts(http, demo_server):
    reference = Reference(MODEL_DIR, CATALOG_DIR)
    flags = {p.name: p for p in _policies()}
    cases = [
        (asked, name)
        for language in world.LANGUAGES
        for name, split in (
            ("force-known", "unknown"),
            ("force-unknown", "known"),
            ("control", "unknown"),
        )
        for asked in world.questions(split, language, 17, 23)
    ]
    assert len(cases) >= 100
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: http.chat(case[0].question, case[1]), cases))
    changed = 0
    for (asked, name), (status, reply) in zip(cases, replies, strict=True):
        assert status == 200
        prompt = reply["prompt_token_ids"]
        got = reply["choices"][0]["token_ids"]
        expected, _ = reference.generate(prompt, len(got), flags[name].edits)
        assert got == expected, (asked.question, name)
        changed += got != reference.generate(prompt, len(got))[0]
    assert changed >= 50


def _policies():
    import msgspec
    from steerscope.catalog import store

    class Plain:
        def __init__(self, policy):
            self.name = policy.name
            self.edits = [
                {
                    key: {k: v for k, v in value.items() if v is not None}
                    if isinstance(value, dict)
                    else value
                    for key, value in msgspec.to_builtins(edit).items()
                    if value is not None
                }
                for edit in policy.interventions
            ]

    return map(Plain, store.load(CATALOG_DIR).policies)


def test_the_report_is_found_by_the_id_in_the_response(http, client):
    asked = question("unknown")
    _, reply = http.chat(asked.question, "force-known")
    report = client.get_request_report(reply["id"], wait=10.0)
    (completion,) = report.completions
    assert completion.policy == "force-known"
    assert completion.complete
    num_tokens = len(reply["prompt_token_ids"]) + len(reply["choices"][0]["token_ids"]) - 1
    assert completion.num_observed_tokens == num_tokens
    assert completion.steering.num_tokens >= 1
    assert {s.signal for s in completion.signals} == {
        "known_entity_confidence",
        "hallucination_risk",
        "answered_vs_declined",
    }
    for track in completion.features:
        assert len(track.activations) == num_tokens


def test_a_policy_over_grpc_is_usable_at_once_and_bad_ones_name_their_field(http, client):
    asked = question("known")
    edits = [e for p in _policies() if p.name == "force-unknown" for e in p.edits]
    client.create_policy("made-here", edits)
    try:
        assert http.say(asked.question, "made-here") == http.say(asked.question, "force-unknown")
    finally:
        client.delete_policy("made-here")
    assert http.chat(asked.question, "made-here")[0] == 400
    with pytest.raises(SpecError) as caught:
        client.create_policy("bad", [{"feature": "no_such", "clamp": 1.0}])
    assert caught.value.field.endswith("interventions[0].feature")


def test_features_are_listed_with_what_they_are(client):
    features = {f.name.removeprefix("features/"): f for f in client.list_features()}
    assert {"unknown_entity", "known_entity"} <= features.keys()


def test_health_and_reflection_answer(demo_server):
    with grpc.insecure_channel(demo_server.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "steerscope.v1.SteeringService", "steerscope.v1.TelemetryService"):
            reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        services = ProtoReflectionDescriptorDatabase(channel).get_services()
        assert "steerscope.v1.CatalogService" in services


NAMES = (
    "steerscope_signal_score_ratio",
    "steerscope_signal_requests_total",
    "steerscope_feature_activation",
    "steerscope_feature_active_tokens_total",
    "steerscope_observed_tokens_total",
    "steerscope_unobserved_tokens_total",
    "steerscope_steering_requests_total",
    "steerscope_steered_tokens_total",
    "steerscope_steering_dose_ratio",
    "steerscope_frames_dropped_total",
    "steerscope_readout_lag_seconds",
    "steerscope_step_overhead_seconds",
    "steerscope_build_info",
)


def test_the_metrics_page_passes_promtool_and_holds_the_promised_names(http, demo_server):
    http.say(question("unknown").question, "force-known")
    time.sleep(0.5)
    page = demo_server.metrics()
    for name in NAMES:
        assert f"\n{name}" in page, name
    assert 'model_name="steerscope-demo"' in page
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=page, text=True, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_observed_tokens_add_up_to_what_was_fed_to_the_model(http, demo_server, client):
    def observed():
        lines = demo_server.metrics().splitlines()
        return sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith("steerscope_observed_tokens_total{")
        )

    before, fed = observed(), 0
    for asked in world.questions("known", "en", 8, 5):
        _, reply = http.chat(asked.question)
        client.get_request_report(reply["id"], wait=10.0)
        fed += reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"] - 1
    assert observed() - before == fed


def test_the_command_prints_names_and_paths(capsys):
    from steerscope.cli.main import main

    assert main(["demo", "path"]) == 0
    paths = json.loads(capsys.readouterr().out)
    assert main(["check", paths["config"], "--model", paths["model"]]) == 0
    capsys.readouterr()
    assert main(["demo", "names", "--split", "unknown", "--language", "fr", "--count", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in lines] == [
        {"question", "answer", "entity", "split", "language"}
    ] * 3
