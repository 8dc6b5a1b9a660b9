import math
import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import httpx
import msgspec
import otlp_receiver
import pytest
from auth_world import Secured
from hub_world import ENGINE, eventually, frame, scrape, start
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as semconv
from otlp_receiver import METRICS, attributes
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from steerscope import __version__, config
from steerscope.catalog.model import ModelMatch
from steerscope.config import OtelSettings
from steerscope.errors import ConfigError, HubError
from steerscope.export import budget, instruments, otlp_events, otlp_sender
from steerscope.export.instruments import INSTRUMENTS, Kind
from steerscope.export.prometheus import HubCollector
from steerscope.hub import launcher
from steerscope.hub.tracing import open_export
from steerscope.steering.interventions import Intervention, Policy
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.totals import EngineTotals, HubTotals
from steerscope.telemetry.tracks import EngineKey
from steerscope.telemetry.windows import DriftWindow

pytestmark = pytest.mark.timeout(60)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
MOVE_BY_THEMSELVES = {instruments.HUB_CPU.name, instruments.ENGINE_LAST_SEEN.name}


@pytest.fixture
def receiver(tmp_path):
    with otlp_receiver.receiving(tmp_path) as receiver:
        yield receiver


@pytest.fixture
def protocol(request):
    return getattr(request, "param", "grpc")


over_both = pytest.mark.parametrize("protocol", ["grpc", "http"], indirect=True)


@pytest.fixture
def otel(receiver, protocol):
    endpoint = receiver.endpoint(protocol)
    return OtelSettings(endpoint=endpoint, protocol=protocol, interval_seconds=0.3)


@pytest.fixture
def exporting(settings, otel):
    """A hub that exports to the receiver."""
    running = launcher.start_hub(msgspec.structs.replace(settings, otel=otel))
    yield running
    running.stop()


@pytest.fixture
def worker(exporting, worker_of):
    return worker_of(exporting)


def traced(name, num_prompt_tokens, traceparent=TRACEPARENT, **told):
    made = start(name, num_prompt_tokens, **told)
    return msgspec.structs.replace(made, traceparent=traceparent)


def serve(worker, catalog, started, acts=2.0):
    """A whole request of 3 tokens of prompt and 2 generated."""
    name, steered = started.request_id, {2: 3.0} if started.policy else {}
    worker.send(frame(catalog, (name, 0, 3), acts=acts, edited=steered, started=(started,)))
    worker.send(frame(catalog, (name, 3, 2), acts=acts))
    worker.send(frame(catalog, finished=(name,)))


def finished(hub, label="high"):
    labels = {"signal": "at_question", "label": label, **ENGINE}
    return scrape(hub.http_port).value("steerscope_signal_requests_total", **labels) or 0.0


def scraped(hub):
    """Every sample of the page, and every exemplar, by name and labels."""
    reply = httpx.get(
        f"http://127.0.0.1:{hub.http_port}/metrics", headers={"accept": OPENMETRICS}, timeout=5
    )
    samples, exemplars = {}, {}
    for family in text_string_to_metric_families(reply.text):
        for sample in family.samples:
            key = (sample.name, frozenset((k, v) for k, v in sample.labels.items() if v))
            samples[key] = sample.value
            if sample.exemplar is not None:
                exemplars[key] = sample.exemplar
    return samples, exemplars


def newest_collection(receiver):
    """The metrics of the newest collection, merged where it came in several requests."""
    collections = {}
    for resource in receiver.resources(METRICS):
        for metric in resource.scope_metrics[0].metrics:
            for point in getattr(metric, metric.WhichOneof("data")).data_points:
                collections.setdefault(point.time_unix_nano, []).append((metric, point))
    newest = max(collections, default=0)
    return newest, collections.get(newest, [])


def as_samples(points):
    """OTLP points as a scrape would show them."""
    samples, exemplars = {}, {}
    for metric, point in points:
        labels = frozenset(attributes(point).items())
        if metric.WhichOneof("data") != "histogram":
            value = getattr(point, point.WhichOneof("value"))
            samples[metric.name, labels] = value
            continue
        seen, bounds = 0, [*point.explicit_bounds, math.inf]
        buckets = {}
        for bound, count in zip(bounds, point.bucket_counts, strict=True):
            seen += count
            le = "+Inf" if bound == math.inf else repr(bound)
            buckets[bound] = (f"{metric.name}_bucket", labels | {("le", le)})
            samples[buckets[bound]] = seen
        samples[f"{metric.name}_count", labels] = point.count
        samples[f"{metric.name}_sum", labels] = point.sum
        for exemplar in point.exemplars:
            exemplars[buckets[min(b for b in bounds if exemplar.as_double <= b)]] = exemplar
    return samples, exemplars


def still(samples):
    return {key: value for key, value in samples.items() if key[0] not in MOVE_BY_THEMSELVES}


@over_both
def test_a_collector_gets_what_a_scrape_finds(exporting, receiver, worker, catalog):
    edits = (Intervention(feature="known", clamp=6.0),)
    serve(worker, catalog, traced("a", 3, policy="force-known", interventions=edits))
    serve(worker, catalog, start("b", 3), acts=0.0)
    eventually(lambda: finished(exporting) == finished(exporting, "low") == 1)
    told, told_exemplars = scraped(exporting)
    asked_ns = time.time_ns()
    eventually(lambda: newest_collection(receiver)[0] > asked_ns)
    _, points = newest_collection(receiver)
    sent, sent_exemplars = as_samples(points)
    assert len(told) > 200
    assert still(sent) == still(told)
    assert {name for name, _ in sent} & MOVE_BY_THEMSELVES == MOVE_BY_THEMSELVES
    assert sent_exemplars.keys() == told_exemplars.keys()
    assert sent_exemplars
    for key, exemplar in told_exemplars.items():
        assert exemplar.labels == {"trace_id": TRACE, "span_id": SPAN}
        assert sent_exemplars[key].trace_id.hex() == TRACE
        assert sent_exemplars[key].span_id.hex() == SPAN
        assert sent_exemplars[key].as_double == exemplar.value
        assert sent_exemplars[key].time_unix_nano * 1e-9 == pytest.approx(float(exemplar.timestamp))


def test_metrics_say_what_they_are_and_since_when(
    exporting, receiver, worker, catalog, settings, otel
):
    serve(worker, catalog, start("a", 3))
    eventually(lambda: finished(exporting) == 1)
    after_ns = time.time_ns()
    eventually(lambda: newest_collection(receiver)[0] > after_ns)
    _, points = newest_collection(receiver)
    declared = {instrument.name: instrument for instrument in INSTRUMENTS}
    kinds = {"sum": Kind.COUNTER, "gauge": Kind.GAUGE, "histogram": Kind.HISTOGRAM}
    for metric, point in points:
        instrument = declared[metric.name]
        assert (metric.unit, metric.description) == (instrument.unit, instrument.help)
        data = metric.WhichOneof("data")
        assert kinds[data] is instrument.kind
        if data != "gauge":
            cumulative = 2
            assert getattr(metric, data).aggregation_temporality == cumulative
        assert data != "sum" or metric.sum.is_monotonic
        assert data != "histogram" or not (point.HasField("min") or point.HasField("max"))
    told = budget.declared(catalog, msgspec.structs.replace(settings, otel=otel)).rows
    expected = {row.instrument.name for row in told if row.of_engine or row.of_hub}
    assert {metric.name for metric, _ in points} == expected
    (began_ns,) = {p.start_time_unix_nano for m, p in points if m.WhichOneof("data") != "gauge"}
    assert 0 < began_ns < after_ns


@over_both
def test_each_score_is_one_event_in_the_clients_trace(exporting, receiver, worker, catalog):
    before_ns = time.time_ns()
    serve(worker, catalog, traced("internal-1", 3, external_id="chatcmpl-7"))
    eventually(lambda: len(receiver.events()) >= 3)
    time.sleep(1.0)  # none must follow
    events = receiver.events()
    common = {
        "gen_ai.response.id": "chatcmpl-7",
        "gen_ai.request.model": "demo",
        "gen_ai.provider.name": "vllm",
        "steerscope.engine": "0",
        "steerscope.sequence.id": "internal-1",
        "steerscope.complete": True,
    }
    scores = {"at_question": 0.5, "whole_prompt": 0.5, "in_answer": 0.5}
    kept = {attributes(event)["gen_ai.evaluation.name"]: attributes(event) for event in events}
    about_entity = kept.pop("about_entity")
    assert about_entity["gen_ai.evaluation.score.label"] in ("low", "high")
    assert kept == {
        name: {
            "gen_ai.evaluation.name": name,
            "gen_ai.evaluation.score.value": score,
            "gen_ai.evaluation.score.label": "high",
            **common,
        }
        for name, score in scores.items()
    }
    assert len(events) == len(scores) + 1
    for event in events:
        assert event.event_name == "gen_ai.evaluation.result"
        assert (event.trace_id.hex(), event.span_id.hex(), event.flags) == (TRACE, SPAN, 1)
        assert before_ns < event.time_unix_nano < time.time_ns()
        assert event.body.WhichOneof("value") is None


def test_a_signal_without_a_score_is_no_event(exporting, receiver, worker, catalog):
    told = start("a", 4, first_position=1, policy="force-known")
    worker.send(frame(catalog, ("a", 1, 3), acts=2.0, started=(told,)))
    worker.send(frame(catalog, ("a", 4, 2), acts=4.0))
    worker.send(frame(catalog, finished=("a",)))
    eventually(lambda: len(receiver.events()) >= 2)
    time.sleep(1.0)
    events = [attributes(event) for event in receiver.events()]
    assert {e["gen_ai.evaluation.name"] for e in events} == {"at_question", "in_answer"}
    assert {e["steerscope.steering.policy"] for e in events} == {"force-known"}
    assert not any(e["steerscope.complete"] for e in events)


def test_a_request_without_a_trace_is_an_event_without_one(exporting, receiver, worker, catalog):
    serve(worker, catalog, start("a", 3))
    for event in eventually(lambda: len(receiver.events()) >= 4 and receiver.events()):
        assert (event.trace_id, event.span_id) == (b"", b"")
        assert attributes(event)["gen_ai.response.id"] == "a"


def test_an_id_that_is_too_long_is_cut(exporting, receiver, worker, catalog):
    serve(worker, catalog, start("a", 3, external_id="x" * 5000))
    (event, *_) = eventually(lambda: receiver.events())
    assert attributes(event)["gen_ai.response.id"] == "x" * otlp_events.MAX_ID_LENGTH


def test_the_names_of_attributes_are_those_of_the_conventions():
    assert otlp_events.NAME == semconv.GEN_AI_EVALUATION_NAME
    assert otlp_events.SCORE == semconv.GEN_AI_EVALUATION_SCORE_VALUE
    assert otlp_events.LABEL == semconv.GEN_AI_EVALUATION_SCORE_LABEL
    assert otlp_events.RESPONSE_ID == semconv.GEN_AI_RESPONSE_ID
    assert otlp_events.REQUEST_MODEL == semconv.GEN_AI_REQUEST_MODEL
    assert otlp_events.PROVIDER == semconv.GEN_AI_PROVIDER_NAME


def test_the_resource_says_which_hub_it_is(settings, otel, receiver):
    otel = msgspec.structs.replace(
        otel, resource={"service.name": "chat", "deployment.environment.name": "test"}
    )
    settings = msgspec.structs.replace(settings, otel=otel)
    hub = launcher.start_hub(config.named(settings, "a-model"))
    try:
        (resource, *_) = eventually(lambda: receiver.resources(METRICS))
    finally:
        hub.stop()
    told = attributes(resource.resource)
    assert (told["service.name"], told["service.version"]) == ("chat", __version__)
    assert told["deployment.environment.name"] == "test"
    assert told["gen_ai.request.model"] == "a-model"
    assert len(told["service.instance.id"]) == 36
    assert resource.scope_metrics[0].scope.name == "steerscope"


def test_a_malformed_trace_in_a_frame_is_a_malformed_frame(exporting, worker, catalog):
    worker.send(frame(catalog, ("a", 0, 2), started=(traced("a", 2, "00-garbage"),)))
    labels = {"reason": "malformed", "model_name": "", "engine": ""}
    name = "steerscope_frames_dropped_total"
    eventually(lambda: scrape(exporting.http_port).value(name, **labels) == 1)


def test_an_exemplar_is_the_newest_of_its_bucket_whose_trace_is_recorded(hub, worker_of, catalog):
    worker, other = worker_of(hub), TRACE[::-1]
    for name, traceparent in {
        "a": TRACEPARENT,
        "b": f"00-{other}-{SPAN}-01",
        "c": f"00-{'1' * 32}-{SPAN}-00",
        "d": "",
    }.items():
        serve(worker, catalog, traced(name, 3, traceparent))
    eventually(lambda: finished(hub) == 4)
    _, exemplars = scraped(hub)
    labels = frozenset({**ENGINE, "signal": "at_question", "le": "0.5"}.items())
    found = exemplars["steerscope_signal_score_ratio_bucket", labels]
    assert (found.labels["trace_id"], found.value) == (other, 0.5)
    assert {exemplar.labels["trace_id"] for exemplar in exemplars.values()} == {other}


def test_a_scraper_that_takes_text_only_gets_no_exemplars(hub, worker_of, catalog):
    serve(worker_of(hub), catalog, traced("a", 3))
    eventually(lambda: finished(hub) == 1)
    assert TRACE not in scrape(hub.http_port).text


def test_a_hub_without_a_collector_counts_nothing_as_lost(hub):
    assert "steerscope_otel_dropped_total{" not in scrape(hub.http_port).text


def test_a_hub_without_a_collector_does_not_load_the_sdk():
    loaded = "import sys, steerscope.hub.__main__; print('opentelemetry' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True)
    assert told.stdout.split()[-1] == b"False"


def test_an_sdk_that_is_not_there_is_named(settings, otel, monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk._logs", None)
    monkeypatch.delitem(sys.modules, "steerscope.export.opentelemetry", raising=False)
    monkeypatch.delitem(sys.modules, "steerscope.export.otlp_sender", raising=False)
    settings = msgspec.structs.replace(settings, otel=otel)
    with pytest.raises(ConfigError, match=r"otel: .*opentelemetry\.sdk\._logs.*steerscope\[otel\]"):
        open_export(settings, CollectorRegistry, HubTotals())


def test_a_snapshot_stays_as_it_was_when_the_totals_go_on(catalog):
    bounds = instruments.bounds_for(catalog)
    columns = Columns(catalog)
    totals = EngineTotals(columns, catalog.signals, bounds, DriftWindow((), columns, 60.0))
    totals.frames = 1
    engines, hub = {EngineKey("demo", "0"): totals}, HubTotals()
    policies = [Policy(name="force-known", interventions=())]
    collector = HubCollector(
        catalog, SimpleNamespace(engines=engines), hub, lambda: policies, ModelMatch.EXACT
    )
    snapshot = collector.snapshot()
    before = page(snapshot)
    totals.frames += 1
    totals.score.observe_one(0, 0.5)
    totals.labels["at_question", "high"] += 1
    hub.propagation_timeouts += 1
    policies.append(Policy(name="another", interventions=()))
    engines[EngineKey("demo", "1")] = totals
    assert page(snapshot) == before != page(collector)


def page(collector):
    """All samples but those that move by themselves."""
    samples = [sample for family in collector.collect() for sample in family.samples]
    return [sample for sample in samples if sample.name not in MOVE_BY_THEMSELVES]


def lost(hub, kind):
    return scrape(hub.http_port).value("steerscope_otel_dropped_total", signal=kind)


@over_both
def test_a_collector_that_was_away_gets_what_waited(exporting, receiver, worker, catalog):
    eventually(lambda: receiver.resources(METRICS))
    receiver.stop()
    serve(worker, catalog, traced("a", 3))
    eventually(lambda: finished(exporting) == 1)
    eventually(lambda: lost(exporting, "metrics") > 0, seconds=20)
    assert lost(exporting, "logs") == 0
    assert not receiver.events()
    receiver.start()
    back_ns = time.time_ns()
    eventually(lambda: len(receiver.events()) == 4, seconds=20)
    eventually(lambda: newest_collection(receiver)[0] > back_ns, seconds=20)
    assert lost(exporting, "logs") == 0


def test_events_that_find_no_room_are_counted_and_the_newest_stay(
    exporting, receiver, worker, catalog
):
    receiver.stop()
    batch, batches = 100, 25
    emitted = 4 * batch * batches
    assert emitted > otlp_sender.MAX_EVENTS
    for number in range(batches):
        names = [f"{number}-{i}" for i in range(batch)]
        starts = tuple(start(name, 3) for name in names)
        worker.send(frame(catalog, *((name, 0, 3) for name in names), acts=2.0, started=starts))
        worker.send(frame(catalog, *((name, 3, 2) for name in names), acts=2.0))
        worker.send(frame(catalog, finished=tuple(names)))
        sent = batch * (number + 1)
        eventually(lambda sent=sent: finished(exporting) == sent, seconds=20)  # or it sheds
    receiver.start()
    waited = otlp_sender.MAX_EVENTS
    eventually(lambda: len(receiver.events()) >= waited, seconds=30)
    eventually(lambda: len(receiver.events()) + lost(exporting, "logs") == emitted, seconds=10)
    names = {attributes(event)["gen_ai.response.id"] for event in receiver.events()}
    assert "24-99" in names
    assert "0-0" not in names


@over_both
def test_a_hub_that_ends_sends_what_it_has_first(exporting, receiver, worker, catalog):
    eventually(lambda: receiver.resources(METRICS))
    serve(worker, catalog, start("a", 3))
    eventually(lambda: finished(exporting) == 1)
    exporting.stop()
    assert len(receiver.events()) == 4
    sent, _ = as_samples(newest_collection(receiver)[1])
    labels = {**ENGINE, "signal": "at_question", "label": "high"}
    assert sent["steerscope_signal_requests_total", frozenset(labels.items())] == 1


@over_both
def test_a_collector_that_does_not_answer_keeps_nobody_waiting(
    settings, protocol, catalog, worker_of
):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        otel = OtelSettings(endpoint=endpoint, protocol=protocol, interval_seconds=0.2)
        hub = launcher.start_hub(msgspec.structs.replace(settings, otel=otel))
        try:
            serve(worker_of(hub), catalog, start("a", 3))
            eventually(lambda: finished(hub) == 1)
            slowest = 0.0
            for _ in range(20):
                began = time.monotonic()
                scrape(hub.http_port)
                slowest = max(slowest, time.monotonic() - began)
            began = time.monotonic()
        finally:
            hub.stop()
        ended = time.monotonic() - began
    assert slowest < 1.0
    assert ended < 4.0  # of which two seconds wait for the collector
    assert hub.process.returncode == 0


@over_both
def test_headers_come_from_the_variable_that_is_named(
    settings, otel, receiver, protocol, monkeypatch
):
    monkeypatch.setenv("COLLECTOR_HEADERS", "X-Scope-OrgID=team%20a, authorization=Bearer abc=")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "leaked=1")
    otel = msgspec.structs.replace(otel, headers_env="COLLECTOR_HEADERS")
    hub = launcher.start_hub(msgspec.structs.replace(settings, otel=otel))
    try:
        (taken, *_) = eventually(lambda: receiver.taken(METRICS))
    finally:
        hub.stop()
    assert taken.protocol == protocol
    assert taken.headers["x-scope-orgid"] == "team a"
    assert taken.headers["authorization"] == "Bearer abc="
    assert "leaked" not in taken.headers


@pytest.mark.parametrize("value", [None, "", "secret", "a=secret\nb", "a b=secret", "=secret"])
def test_headers_that_are_none_are_refused_without_being_told(value):
    otel = OtelSettings(endpoint="http://localhost:1", headers_env="VARIABLE")
    environ = {} if value is None else {"VARIABLE": value}
    with pytest.raises(ConfigError, match=r"otel\.headers_env: VARIABLE is not") as refused:
        config.otel_headers(otel, environ)
    assert "secret" not in str(refused.value)


def test_a_hub_does_not_start_without_the_headers_it_is_to_send(settings, otel):
    assert "NOBODY_SET_THIS" not in os.environ
    otel = msgspec.structs.replace(otel, headers_env="NOBODY_SET_THIS")
    with pytest.raises(HubError, match=r"otel\.headers_env: NOBODY_SET_THIS is not set"):
        launcher.start_hub(msgspec.structs.replace(settings, otel=otel))


@over_both
def test_an_encrypted_collector_is_known_by_the_authority_that_is_named(
    settings, protocol, tmp_path
):
    secured = Secured(tmp_path)
    pair = (secured.certificate, secured.key)
    with otlp_receiver.receiving(tmp_path, pair) as receiver:
        otel = OtelSettings(
            endpoint=receiver.endpoint(protocol), protocol=protocol, interval_seconds=0.2
        )
        trusting = msgspec.structs.replace(otel, ca_file=str(secured.ca))
        stranger = launcher.start_hub(msgspec.structs.replace(settings, otel=otel))
        try:
            eventually(lambda: lost(stranger, "metrics") > 0, seconds=20)
        finally:
            stranger.stop()
        assert not receiver.taken(METRICS)
        hub = launcher.start_hub(msgspec.structs.replace(settings, otel=trusting))
        try:
            assert eventually(lambda: receiver.taken(METRICS))
        finally:
            hub.stop()


@pytest.mark.parametrize(
    ("otel", "message"),
    [
        ({}, "missing required field `endpoint`"),
        ({"endpoint": "localhost:4317"}, "endpoint: must be a URL"),
        ({"endpoint": "ftp://localhost:1"}, "endpoint: must be a URL"),
        ({"endpoint": "http://localhost:99999"}, "otel"),
        ({"endpoint": "http://me:secret@localhost:1"}, "headers_env"),
        ({"endpoint": "http://localhost:1/?key=secret"}, "headers_env"),
        ({"endpoint": "http://localhost:1/otlp"}, "gRPC has no path"),
        ({"endpoint": "http://collector:4317"}, "not encrypted"),
        ({"endpoint": "https://collector:4317", "insecure": True}, "insecure: contradicts"),
        ({"endpoint": "http://localhost:1", "ca_file": "ca.pem"}, "ca_file: contradicts"),
        ({"endpoint": "http://localhost:1", "protocol": "udp"}, "protocol"),
        ({"endpoint": "http://localhost:1", "interval_seconds": 0}, "interval_seconds"),
        ({"endpoint": "http://localhost:1", "resource": {"Bad Key": "x"}}, "resource"),
        ({"endpoint": "http://localhost:1", "headers": {"a": "b"}}, "unknown field `headers`"),
    ],
)
def test_bad_settings_are_refused_by_name(catalog_folder, tmp_path, otel, message):
    tree = {"catalog": str(catalog_folder), "otel": otel}
    with pytest.raises(ConfigError, match=message) as refused:
        config.from_tree(tree, base=tmp_path, where="c.yaml")
    assert "otel" in str(refused.value)
    assert "secret@" not in str(refused.value)


def test_what_is_allowed_beyond_loopback_and_what_a_file_may_say(catalog_folder, tmp_path):
    for otel in (
        {"endpoint": "http://collector:4317", "insecure": True},
        {"endpoint": "https://collector", "protocol": "http"},
        {"endpoint": "http://[::1]:4318/otlp", "protocol": "http"},
    ):
        tree = {"catalog": str(catalog_folder), "otel": otel}
        assert config.from_tree(tree, base=tmp_path, where="c").otel.endpoint == otel["endpoint"]
    tree["otel"] = {"endpoint": "https://collector:4317", "ca_file": "ca.pem"}
    settings = config.from_tree(tree, base=tmp_path, where="c")
    assert settings.otel.ca_file == str(tmp_path / "ca.pem")
    assert config.from_tree(config.to_tree(settings), base=tmp_path, where="c") == settings


def test_an_authority_that_cannot_be_read_is_named(settings, tmp_path):
    otel = OtelSettings(endpoint="https://localhost:1", ca_file=str(tmp_path / "gone.pem"))
    with pytest.raises(HubError, match=r"otel\.ca_file: .*gone\.pem: No such file"):
        launcher.start_hub(msgspec.structs.replace(settings, otel=otel))
