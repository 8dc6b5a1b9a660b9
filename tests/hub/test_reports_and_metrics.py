import math
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import numpy as np
import pytest
from hub_world import ENGINE, eventually, frame, scrape, start
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from steerscope import __version__, config
from steerscope.api.v1 import catalog_pb2
from steerscope.api.v1 import telemetry_pb2 as pb
from steerscope.catalog.model import ModelMatch
from steerscope.client import Client
from steerscope.errors import HubError, SpecError
from steerscope.hub import launcher
from steerscope.steering.interventions import Intervention
from steerscope.telemetry.frames import CachedActivations, RequestEnd

pytestmark = pytest.mark.timeout(60)

LONG = 60_000


@pytest.fixture
def client(hub):
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:
        yield client


def serve(worker, catalog, name="a", **fields):
    """A whole request: 3 tokens of prompt, 2 generated, with a prefix hit of 1."""
    told = start(name, 4, first_position=1, **fields)
    steered = {2: 3.0, 3: 1.0} if told.policy else {}
    worker.send(frame(catalog, (name, 1, 3), acts=2.0, started=(told,)))
    worker.send(
        frame(catalog, (name, 4, 2), acts=4.0, edited={r - 2: d for r, d in steered.items()})
    )
    worker.send(frame(catalog, finished=(name,)))


def test_a_long_report_as_json_makes_nobody_wait(settings, worker_of, catalog):
    fields = msgspec.structs.replace(settings.hub, max_tokens_per_report=LONG)
    hub = launcher.start_hub(msgspec.structs.replace(settings, hub=fields))
    try:
        acts = np.random.default_rng(0).normal(1.0, 1.0, (LONG, 3))
        worker_of(hub).send(
            frame(catalog, ("a", 0, LONG), acts=acts, started=(start("a", LONG),), finished=("a",))
        )
        with Client(f"127.0.0.1:{hub.grpc_port}") as client:
            client.get_request_report("a", wait=10.0)
        url, waits = f"http://127.0.0.1:{hub.http_port}", []
        with ThreadPoolExecutor(1) as asking, httpx.Client() as others:
            began = time.monotonic()
            answer = asking.submit(httpx.get, f"{url}/v1/steerscope/requests/a", timeout=30)
            while not answer.done():
                asked = time.monotonic()
                others.get(f"{url}/health")
                waits.append(time.monotonic() - asked)
            took = time.monotonic() - began
        (track, *_) = answer.result().json()["completions"][0]["features"]
        assert len(track["activations"]) == LONG
        assert max(waits) < took / 2
    finally:
        hub.stop()


def test_a_report_tells_all_that_was_seen_and_done(client, worker, catalog):
    edits = (Intervention(feature="known", clamp=6.0),)
    serve(worker, catalog, policy="force-known", interventions=edits)
    report = client.get_request_report("a", wait=5.0)
    assert report.name == "requests/a"
    assert report.state == pb.REQUEST_STATE_FINISHED
    assert (report.catalog_digest, report.plugin_version) == (catalog.digest, __version__)
    (completion,) = report.completions
    assert (completion.model_name, completion.engine) == ("demo", "0")
    assert (completion.policy, completion.steering_digest) == ("force-known", "d1")
    assert (completion.num_prompt_tokens, completion.num_observed_tokens) == (4, 5)
    assert not completion.complete
    assert [(u.reason, u.num_tokens) for u in completion.unobserved] == [
        (pb.UNOBSERVED_REASON_PREFIX_CACHE, 1)
    ]
    steering = completion.steering
    assert (steering.num_tokens, steering.first_position, steering.last_position) == (2, 4, 5)
    assert (steering.dose_mean, steering.dose_max) == (0.5, 0.5)
    scores = {s.signal: s for s in completion.signals}
    assert scores["at_question"].score == pytest.approx(0.5)
    assert scores["in_answer"].score == pytest.approx(1 / (1 + math.exp(-2.0)))
    assert scores["in_answer"].label == "high"
    assert not scores["whole_prompt"].HasField("score")
    assert scores["whole_prompt"].label == "unobserved"
    assert not scores["about_entity"].HasField("score")
    tracks = {t.feature: t for t in completion.features}
    assert tracks["known"].first_position == 1
    assert list(tracks["known"].activations) == [2.0, 2.0, 2.0, 4.0, 4.0]
    assert list(tracks["known"].deltas) == [0.0, 0.0, 0.0, 3.0, 1.0]
    assert not tracks["late"].deltas


def test_a_request_that_nobody_knows_is_not_found(client):
    with pytest.raises(HubError, match="NOT_FOUND"):
        client.get_request_report("nobody")


def test_a_wait_that_nothing_ends_is_over_in_time(client):
    begun = time.monotonic()
    with pytest.raises(HubError, match="NOT_FOUND"):
        client.get_request_report("nobody", wait=0.4)
    assert 0.3 < time.monotonic() - begun < 2.0


def test_a_negative_wait_is_refused(client):
    with pytest.raises(SpecError) as caught:
        client.get_request_report("a", wait=-1.0)
    assert caught.value.field == "wait"


def test_tokens_of_a_prefix_hit_are_observed_where_their_activations_were_kept(
    hub, client, worker, catalog
):
    labels = {"model_name": "demo", "engine": "0"}
    before = scrape(hub.http_port)
    kept = frame(catalog, ("x", 0, 3), acts=[[1.0], [2.0], [3.0]], edited={1: 3.0}).sites
    told = msgspec.structs.replace(
        start("hit", 4, first_position=3), cached=CachedActivations(bytes([1, 1, 0]), kept)
    )
    worker.send(frame(catalog, ("hit", 3, 2), acts=4.0, started=(told,)))
    ended = frame(catalog)
    worker.send(msgspec.structs.replace(ended, finished=(RequestEnd("hit", 5),)))
    (completion,) = client.get_request_report("hit", wait=5.0).completions
    assert (completion.num_observed_tokens, completion.num_cached_tokens) == (4, 2)
    assert [(u.reason, u.num_tokens) for u in completion.unobserved] == [
        (pb.UNOBSERVED_REASON_PREFIX_CACHE, 1)
    ]
    tracks = [t for t in completion.features if t.feature == "known"]
    assert [(t.first_position, list(t.activations)) for t in tracks] == [
        (0, [1.0, 2.0]),
        (3, [4.0, 4.0]),
    ]
    assert list(tracks[0].deltas) == [0.0, 3.0]

    def moved(name, **more):
        return scrape(hub.http_port).value(name, **labels, **more) - (
            before.value(name, **labels, **more) or 0.0
        )

    assert moved("steerscope_cached_tokens_total") == 2
    assert moved("steerscope_unobserved_tokens_total", reason="prefix_cache") == 1
    assert moved("steerscope_observed_tokens_total", phase="prompt") == 3


def test_an_end_says_how_many_tokens_there_were(client, worker, catalog):
    worker.send(frame(catalog, ("short", 0, 3), started=(start("short", 2),)))
    worker.send(msgspec.structs.replace(frame(catalog), finished=(RequestEnd("short", 5),)))
    (completion,) = client.get_request_report("short", wait=5.0).completions
    assert not completion.complete
    assert [(u.reason, u.num_tokens) for u in completion.unobserved] == [
        (pb.UNOBSERVED_REASON_DROPPED_FRAME, 2)
    ]


def test_a_receipt_is_complete_only_if_what_was_asked_is_what_was_done(
    client, worker, catalog, front_end
):
    for name, digest, complete in (("same", "d1", True), ("other", "d2", False)):
        front_end.admitted(name, "force-known", digest)
        told = start(name, 2, policy="force-known")
        worker.send(frame(catalog, (name, 0, 2), started=(told,)))
        worker.send(msgspec.structs.replace(frame(catalog), finished=(RequestEnd(name, 2),)))
        report = eventually(lambda name=name, digest=digest: _asked(client, name, digest))
        (completion,) = report.completions
        assert completion.complete is complete
        assert completion.steering_digest == "d1"


def _asked(client, name, digest):
    report = client.get_request_report(name, wait=5.0)
    return report if report.asked_steering_digest == digest else None


def test_a_running_request_is_reported_as_it_is(client, worker, catalog):
    worker.send(frame(catalog, ("a", 0, 3), started=(start("a", 3),)))
    report = client.get_request_report("a", wait=0.5)
    assert report.state == pb.REQUEST_STATE_RUNNING
    assert report.completions[0].complete
    assert not report.completions[0].signals


def test_a_wait_begun_before_the_request_ends_with_it(client, worker, catalog):
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(client.get_request_report("a", wait=10.0))
    )
    waiting.start()
    time.sleep(0.2)
    serve(worker, catalog)
    waiting.join(5.0)
    assert answers[0].state == pb.REQUEST_STATE_FINISHED


def test_the_children_of_a_request_share_its_report(client, worker, catalog):
    told = tuple(start(f"{i}_x", 2, external_id="x") for i in (0, 1))
    worker.send(frame(catalog, ("0_x", 0, 2), ("1_x", 0, 2), started=told))
    worker.send(frame(catalog, finished=("0_x",)))
    report = client.get_request_report("x", wait=0.5)
    assert report.state == pb.REQUEST_STATE_RUNNING
    worker.send(frame(catalog, finished=("1_x",)))
    report = client.get_request_report("x", wait=5.0)
    assert [c.request_id for c in report.completions] == ["0_x", "1_x"]
    assert report.state == pb.REQUEST_STATE_FINISHED


@pytest.mark.timeout(15)
def test_a_watcher_hears_of_start_and_end_without_activations(client, worker, catalog):
    events = client.watch_requests()
    serve(worker, catalog)
    started, finished = next(events), next(events)
    assert started.WhichOneof("event") == "started"
    assert started.started.name == "requests/a"
    assert finished.WhichOneof("event") == "finished"
    assert len(finished.finished.completions[0].signals) == 4
    assert not finished.finished.completions[0].features
    events.close()


def test_a_slow_watcher_is_told_how_much_it_missed(client, worker, catalog):
    events = client.watch_requests()
    count = 6000
    names = [f"{'n' * 900}{i}" for i in range(count)]  # long, so that buffers fill
    for at in range(0, count, 50):
        batch = names[at : at + 50]
        started = tuple(start(name, 1) for name in batch)
        worker.send(frame(catalog, *((n, 0, 1) for n in batch), started=started))
    worker.send(frame(catalog, ("last", 0, 1), started=(start("last", 1),)))
    client.get_request_report("last", wait=3.0)
    received = missed = 0
    for event in events:
        received += 1
        missed += event.missed
        if event.started.name == "requests/last":
            break
    assert missed > 0
    assert received + missed == count + 1
    events.close()


def test_features_are_listed_with_what_can_be_done_to_them(client):
    features = {f.name: f for f in client.list_features()}
    assert list(features) == ["features/known", "features/late", "features/unknown"]
    assert features["features/known"].steerable
    assert not features["features/late"].steerable
    assert features["features/known"].label == "Known entity"
    assert features["features/known"].label_source == catalog_pb2.LABEL_SOURCE_HUMAN
    assert client.get_feature("late").layer == 2
    with pytest.raises(HubError, match="NOT_FOUND"):
        client.get_feature("nobody")


def test_a_signal_is_told_with_what_it_predicts_and_how_it_was_calibrated(client):
    signals = {signal.name: signal for signal in client.get_catalog().signals}
    told = signals["about_entity"]
    at_entity, after = told.terms
    assert (at_entity.reduction, at_entity.HasField("first")) == ("max_entity_span", False)
    assert (at_entity.span.feature, at_entity.span.above) == ("unknown", 1.5)
    assert (after.first, after.HasField("span")) == (3, False)
    assert (told.predicts.label, told.predicts.among) == ("wrong", "answered")
    calibration = told.calibration
    assert calibration.WhichOneof("map") == "platt"
    assert (calibration.platt.scale, calibration.platt.offset) == (0.5, 0.25)
    assert (calibration.num_cases, calibration.split) == (400, "dev, sha256:ab12")
    (threshold,) = calibration.thresholds
    assert (threshold.score, threshold.max_fpr, threshold.num_negatives) == (0.8, 0.05, 150)
    plain = signals["in_answer"]
    assert not plain.HasField("calibration")
    assert not plain.HasField("predicts")


def test_a_report_says_where_a_signal_does_not_apply(client, worker, catalog):
    worker.send(frame(catalog, ("a", 0, 4), acts=1.0, started=(start("a", 3),)))
    worker.send(frame(catalog, finished=("a",)))
    (completion,) = client.get_request_report("a", wait=5.0).completions
    (score,) = (s for s in completion.signals if s.signal == "about_entity")
    assert (score.label, score.HasField("score")) == ("not_applicable", False)


def test_a_fine_tune_is_named_wherever_its_numbers_are(settings, worker_of, catalog):
    running = launcher.start_hub(config.matched(settings, ModelMatch.FINE_TUNE))
    try:
        worker_of(running).send(frame(catalog, ("a", 0, 2), started=(start("a", 2),)))
        with Client(f"127.0.0.1:{running.grpc_port}") as client:
            assert client.get_request_report("a", wait=0.5).model_match == "fine_tune"
            assert client.get_catalog().model_match == "fine_tune"
        url = f"http://127.0.0.1:{running.http_port}/v1/steerscope/requests/a"
        assert httpx.get(url, timeout=5).json()["model_match"] == "fine_tune"
        assert 'model_match="fine_tune"' in scrape(running.http_port).text
    finally:
        running.stop()


def test_the_report_is_json_over_http_too(hub, worker, client, catalog):
    serve(worker, catalog)
    client.get_request_report("a", wait=5.0)
    url = f"http://127.0.0.1:{hub.http_port}/v1/steerscope/requests"
    report = httpx.get(f"{url}/a", timeout=5).json()
    assert report["name"] == "requests/a"
    assert report["completions"][0]["num_observed_tokens"] == 5
    missing = httpx.get(f"{url}/nobody", timeout=5)
    assert missing.status_code == 404
    assert "nobody" in missing.json()["error"]["message"]


def test_health_is_told_over_http(hub):
    assert httpx.get(f"http://127.0.0.1:{hub.http_port}/health", timeout=5).status_code == 200


def test_a_served_request_moves_the_metrics(hub, worker, client, catalog):
    serve(worker, catalog, policy="force-known")
    client.get_request_report("a", wait=5.0)
    metrics = scrape(hub.http_port)
    for name, value, labels in (
        ("steerscope_observed_tokens_total", 3, {"phase": "prompt"}),
        ("steerscope_observed_tokens_total", 2, {"phase": "generation"}),
        ("steerscope_unobserved_tokens_total", 1, {"reason": "prefix_cache"}),
        ("steerscope_signal_requests_total", 1, {"signal": "in_answer", "label": "high"}),
        ("steerscope_signal_requests_total", 1, {"signal": "whole_prompt", "label": "unobserved"}),
        ("steerscope_signal_score_ratio_count", 1, {"signal": "in_answer"}),
        ("steerscope_signal_score_ratio_count", 0, {"signal": "whole_prompt"}),
        ("steerscope_frames_total", 3, {}),
        ("steerscope_readout_lag_seconds_count", 3, {}),
        ("steerscope_step_overhead_seconds_count", 3, {}),
        ("steerscope_steering_dose_ratio_count", 2, {}),
    ):
        assert metrics.value(name, **ENGINE, **labels) == value, (name, labels)
    assert f'version="{__version__}"' in metrics.text


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_complain_about(hub, worker, client, catalog):
    serve(worker, catalog, policy="force-known")
    client.get_request_report("a", wait=5.0)
    text = scrape(hub.http_port).text
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_openmetrics_is_spoken_to_who_asks_for_it(hub, worker, catalog):
    worker.send(frame(catalog))
    eventually(lambda: "steerscope_frames_total{" in scrape(hub.http_port).text)
    accept = "application/openmetrics-text; version=1.0.0"
    reply = httpx.get(
        f"http://127.0.0.1:{hub.http_port}/metrics", headers={"accept": accept}, timeout=5
    )
    assert reply.headers["content-type"].startswith("application/openmetrics-text")
    assert reply.text.endswith("# EOF\n")
    families = {f.name: f.type for f in text_string_to_metric_families(reply.text)}
    assert families["steerscope_frames"] == "counter"
    assert families["steerscope_signal_score_ratio"] == "histogram"
