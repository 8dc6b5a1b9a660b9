"""One request, followed by its ids from a bucket of a histogram to its report."""

import json
import re
import time
import urllib.request

import otlp_receiver
import pytest
from otlp_receiver import METRICS, attributes
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from steerscope.client import Client
from steerscope.demo.live import server
from steerscope.demo.live.server import MODEL_NAME

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
CLIENT_SPAN = "00f067aa0ba902b7"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture(scope="module")
def receiver(tmp_path_factory):
    with otlp_receiver.receiving(tmp_path_factory.mktemp("collector")) as receiver:
        yield receiver


@pytest.fixture(scope="module")
def traced_server(tmp_path_factory, receiver):
    endpoint = receiver.endpoint("grpc")
    with server.running(
        tmp_path_factory.mktemp("traced"),
        extra_arguments=("--otlp-traces-endpoint", endpoint),
        settings={"otel": {"endpoint": endpoint, "interval_seconds": 1}},
    ) as running:
        yield running


def ask(running, **headers):
    """A chat completion's id."""
    question = {"role": "user", "content": "Which sport does Michael Jordan play?"}
    body = {"model": MODEL_NAME, "messages": [question], "temperature": 0, "max_tokens": 16}
    request = urllib.request.Request(
        f"{running.base_url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json", **headers},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["id"]


def eventually(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return value


def exemplars(running):
    """The score buckets' exemplars, by signal."""
    request = urllib.request.Request(running.metrics_url, headers={"accept": OPENMETRICS})
    with urllib.request.urlopen(request, timeout=10) as reply:
        families = list(text_string_to_metric_families(reply.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.exemplar]
    assert {sample.name for sample in samples} <= {"steerscope_signal_score_ratio_bucket"}
    return {sample.labels["signal"]: sample.exemplar for sample in samples}


def requests_of(spans):
    """The ids that clients know, of vLLM's request spans."""
    return {attributes(s)["gen_ai.request.id"] for s in spans if s.name == "llm_request"}


def events_of(receiver, response_id):
    """The request's events, by signal."""
    kept = {}
    for event in receiver.events():
        told = attributes(event)
        if told["gen_ai.response.id"] == response_id:
            kept[told["gen_ai.evaluation.name"]] = (event, told)
    return kept


def test_a_bucket_leads_to_a_trace_an_event_and_a_report(traced_server, receiver):
    ask(traced_server, traceparent=f"00-{TRACE}-{CLIENT_SPAN}-01")
    signal, exemplar = eventually(lambda: sorted(exemplars(traced_server).items()))[0]
    trace_id = exemplar.labels["trace_id"]

    def in_trace(kept):
        return [one for one in kept if one.trace_id.hex() == trace_id]

    (span,) = eventually(lambda: in_trace(receiver.spans()))
    assert span.name == "llm_request"
    assert span.parent_span_id.hex() == CLIENT_SPAN

    events = eventually(lambda: in_trace(receiver.events()))
    told = {attributes(event)["gen_ai.evaluation.name"]: attributes(event) for event in events}
    assert {event.span_id for event in events} == {span.parent_span_id}
    assert told[signal]["gen_ai.evaluation.score.value"] == exemplar.value
    response_id = told[signal]["gen_ai.response.id"]
    assert response_id == attributes(span)["gen_ai.request.id"]

    with Client(traced_server.grpc_address) as client:
        report = client.get_request_report(response_id)
    (completion,) = report.completions
    scores = {score.signal: (score.score, score.label) for score in completion.signals}
    labels = "gen_ai.evaluation.score.value", "gen_ai.evaluation.score.label"
    for name, event in told.items():
        assert scores[name] == tuple(event[label] for label in labels)
    assert told[signal]["gen_ai.request.model"] == completion.model_name == MODEL_NAME


def test_a_request_without_a_trace_is_found_by_its_id(traced_server, receiver):
    response_id = ask(traced_server)
    events = eventually(lambda: events_of(receiver, response_id))
    assert {event.trace_id for event, _ in events.values()} == {b""}
    eventually(lambda: response_id in requests_of(receiver.spans()))


def test_a_malformed_trace_is_no_trace_and_no_error(traced_server, receiver):
    response_id = ask(traced_server, traceparent="00-garbage-01")
    events = eventually(lambda: events_of(receiver, response_id))
    assert {event.trace_id for event, _ in events.values()} == {b""}


def test_metrics_come_with_the_name_of_the_served_model(traced_server, receiver):
    resources = eventually(lambda: receiver.resources(METRICS))
    told = attributes(resources[-1].resource)
    assert told["service.name"] == "steerscope"
    assert told["gen_ai.request.model"] == MODEL_NAME


def test_nothing_that_was_said_reaches_the_collector(traced_server, receiver):
    kept = [taken.payload for kind in ("metrics", "logs") for taken in receiver.taken(kind)]
    assert kept
    assert not any(re.search(rb"Michael|Jordan", payload) for payload in kept)
