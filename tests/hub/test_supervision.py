"""A hub that is killed comes back as it was: same ports, same policies, and the gap counted."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import msgspec
import psutil
import pytest
from hub_world import ENGINE, eventually, frame, scrape, start, write_catalog
from steerscope.api.v1 import steering_pb2 as pb
from steerscope.api.v1 import steering_pb2_grpc
from steerscope.cli.main import main
from steerscope.client import Client
from steerscope.config import AuditSettings
from steerscope.hub import launcher, supervision
from steerscope.hub.supervision import RunningHub, Ways
from steerscope.steering.interventions import Intervention
from steerscope.steering.rules import OverrideMode
from steerscope.telemetry.frames import RequestEnd
from steerscope.telemetry.marks import Mark, Marks
from steerscope.telemetry.tracks import EngineKey

pytestmark = pytest.mark.timeout(120)

CLAMP = {"feature": "known", "clamp": 6.0}
RESTART_SECONDS = 40


def kill(hub):
    """Kill the hub, and wait until the next one serves."""
    restarts = hub.restarts
    hub.process.kill()
    eventually(lambda: hub.restarts > restarts and _serves(hub), RESTART_SECONDS)


def _serves(hub):
    try:
        return scrape(hub.http_port)
    except httpx.HTTPError:
        return None


def hubs_of(endpoint):
    """Processes that serve in the folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if endpoint in (p.info["cmdline"] or ())]


def rules_stub(channel):
    return steering_pb2_grpc.SteeringServiceStub(channel)


def test_it_comes_back_on_its_ports_with_its_policies_and_rules(hub, front_end):
    with (
        Client(f"127.0.0.1:{hub.grpc_port}") as client,
        grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel,
    ):
        created = client.create_policy("lasting", [CLAMP])
        rules = {"default_policy": "policies/lasting", "override": {"mode": 1, "reason": "why"}}
        rules_stub(channel).UpdateRules(pb.UpdateRulesRequest(rules=rules), timeout=10)
        for restarts in (1, 2):
            kill(hub)
            assert scrape(hub.http_port).value("steerscope_hub_restarts_total") == restarts
            assert client.get_policy("lasting") == created
            there = rules_stub(channel).GetRules(
                pb.GetRulesRequest(), timeout=20, wait_for_ready=True
            )
            assert there.rules.default_policy == "policies/lasting"
            assert there.rules.override.mode == pb.OVERRIDE_MODE_OFF
            assert front_end.rules.override.mode is OverrideMode.OFF
        client.create_policy("later", [CLAMP])
        assert {"lasting", "later"} <= set(front_end.policies)


def test_it_is_restarted_only_until_it_is_told_to_stop(settings):
    hub = launcher.start_hub(settings)
    kill(hub)
    hub.stop()
    assert not Path(hub.endpoint).exists()
    restarts = hub.restarts
    time.sleep(1.5)
    assert hub.restarts == restarts
    assert not hubs_of(hub.endpoint)


@pytest.mark.parametrize("seconds", [0.0, 0.6, 1.2])
def test_it_can_be_told_to_stop_while_it_is_down_or_starting(settings, seconds):
    hub = launcher.start_hub(settings)
    hub.process.kill()
    time.sleep(seconds)
    hub.stop()
    assert hub.process.poll() is not None
    assert not hubs_of(hub.endpoint)
    assert not Path(hub.endpoint).exists()


def test_a_hub_that_someone_else_terminates_comes_back_with_its_policies(hub):
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:
        client.create_policy("lasting", [CLAMP])
        hub.process.terminate()
        eventually(lambda: hub.restarts == 1 and _serves(hub), RESTART_SECONDS)
        assert client.get_policy("lasting")


def test_what_keeps_it_from_starting_is_said_and_tried_again(settings, tmp_path, caplog):
    catalog = write_catalog(tmp_path / "catalog")
    hub = launcher.start_hub(msgspec.structs.replace(settings, catalog=str(catalog)))
    try:
        catalog.rename(tmp_path / "away")
        hub.process.kill()
        said = "the hub could not be started again: hub settings: catalog: no folder"
        eventually(lambda: said in caplog.text, RESTART_SECONDS)
        (tmp_path / "away").rename(catalog)
        eventually(lambda: _serves(hub), RESTART_SECONDS)
    finally:
        hub.stop()


def test_delays_double_up_to_a_bound_and_start_over_after_health(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(supervision, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(supervision, "MAX_DELAY_SECONDS", 0.04)

    def delays(count):
        caplog.clear()
        ways = Ways(lambda _: subprocess.Popen(["true"]), lambda process: process.wait())
        hub = RunningHub(
            str(tmp_path / "none"), subprocess.Popen(["true"]), ways, grpc_port=1, http_port=2
        )
        eventually(lambda: hub.restarts >= count)
        hub.stop()
        said = [r.getMessage() for r in caplog.records if "starting it again" in r.getMessage()]
        return [float(message.split()[-2]) for message in said[:count]]

    assert delays(5) == [0.01, 0.02, 0.04, 0.04, 0.04]
    monkeypatch.setattr(supervision, "HEALTHY_SECONDS", 0.0)
    assert delays(3) == [0.01, 0.01, 0.01]


def test_a_forked_process_leaves_it_alone(hub):
    child = os.fork()
    if child == 0:
        hub.stop()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(hub.endpoint).exists()
    assert scrape(hub.http_port)
    assert hub.restarts == 0


def test_what_died_with_the_hub_is_counted_and_no_request_across_the_gap_is_complete(
    hub, worker, catalog
):
    worker.send(frame(catalog, ("a", 0, 4), started=(start("a", 4),)))
    counted = {"phase": "prompt", **ENGINE}
    eventually(
        lambda: scrape(hub.http_port).value("steerscope_observed_tokens_total", **counted) == 4
    )
    kill(hub)
    resumed = msgspec.structs.replace(start("a", 4), resumed_at=24)
    lost = {"step": 5, "dropped": 1, "dropped_tokens": 3, "told_tokens": 20}
    worker.send(frame(catalog, ("a", 24, 2), started=(resumed,), **lost))
    told = {"step": 6, "dropped": 1, "dropped_tokens": 3, "told_tokens": 22}
    worker.send(msgspec.structs.replace(frame(catalog), finished=(RequestEnd("a", 26),), **told))
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:
        (completion,) = client.get_request_report("a", wait=10.0).completions
    assert not completion.complete
    assert completion.num_observed_tokens == 2
    assert [u.num_tokens for u in completion.unobserved] == [24]
    metrics = scrape(hub.http_port)
    for name, labels, value in (
        ("steerscope_frames_dropped_total", {"reason": "lost"}, 3),
        ("steerscope_frames_dropped_total", {"reason": "not_sent"}, 1),
        ("steerscope_unobserved_tokens_total", {"reason": "dropped_frame"}, 19),
        ("steerscope_unobserved_tokens_total", {"reason": "unknown_request"}, 0),
        ("steerscope_signal_requests_total", {"signal": "whole_prompt", "label": "unobserved"}, 1),
    ):
        assert metrics.value(name, **ENGINE, **labels) == value, (name, labels)


def test_a_steered_request_across_the_gap_is_in_the_audit_log_and_not_called_complete(
    settings, worker_of, catalog, tmp_path
):
    log = tmp_path / "audit.jsonl"
    hub = launcher.start_hub(msgspec.structs.replace(settings, audit=AuditSettings(path=str(log))))
    try:
        worker = worker_of(hub)
        told = start(
            "a", 4, policy="force-known", interventions=(Intervention(feature="known", clamp=6.0),)
        )
        worker.send(frame(catalog, ("a", 0, 4), started=(told,)))
        counted = {"phase": "prompt", **ENGINE}
        name = "steerscope_observed_tokens_total"
        eventually(lambda: scrape(hub.http_port).value(name, **counted) == 4)
        kill(hub)
        again = (msgspec.structs.replace(told, resumed_at=4),)
        end = {"step": 1, "told_tokens": 4, "started": again, "finished": (RequestEnd("a", 4),)}
        worker.send(msgspec.structs.replace(frame(catalog), **end))
        eventually(lambda: "request_steered" in log.read_text())
    finally:
        hub.stop()
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    (event,) = [event for event in events if event["type"] == "request_steered"]
    assert (event["external_id"], event["applied"], event["complete"]) == ("a", "d1", False)
    assert main(["audit", "verify", str(log)]) == 0


def test_what_was_asked_is_told_to_the_next_hub(hub, worker, catalog, front_end):
    front_end.admitted("steered", "force-known", "d1")
    front_end.admitted("cheated", "force-known", "d1")
    asked = {"policy": "force-known", "outcome": "admitted", "model_name": "", "engine": ""}
    name = "steerscope_steering_requests_total"
    eventually(lambda: scrape(hub.http_port).value(name, **asked) == 2)
    kill(hub)
    for i, told in enumerate(
        (start("steered", 2, policy="force-known"), start("cheated", 2), start("plain", 2))
    ):
        request = told.request_id
        worker.send(frame(catalog, (request, 0, 2), started=(told,), step=2 * i, told_tokens=2 * i))
        end = {"step": 2 * i + 1, "told_tokens": 2 * i + 2, "finished": (RequestEnd(request, 2),)}
        worker.send(msgspec.structs.replace(frame(catalog), **end))
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:

        def completion(request):
            return client.get_request_report(request, wait=5.0).completions[0]

        # Of a request without steering the front ends say nothing, so it takes a while to know.
        assert not completion("plain").complete
        eventually(lambda: completion("steered").complete)
        assert not completion("cheated").complete
        eventually(lambda: completion("plain").complete, 15)
        assert not completion("cheated").complete


def test_marks_outlive_who_made_them_also_if_the_last_was_cut_short(tmp_path):
    key, path = EngineKey("model", "0"), tmp_path / "marks"
    marks = Marks(path)
    for rank, tokens in ((0, 5), (1, 7), (0, 9)):
        marks.note(key, rank, Mark(3, tokens, 2, 1))
    with path.open("ab") as file:
        file.write(b"cut")
    found = Marks(path)
    assert found.of(key, 0) == Mark(3, 9, 2, 1)
    assert found.of(key, 1) == Mark(3, 7, 2, 1)
    assert found.of(EngineKey("model", "1"), 0) == Mark()
    assert found.ranks(key) == {0, 1}
    found.note(EngineKey("model", "1"), 0, Mark(1, 1, 0, 0))
    assert Marks(path).of(EngineKey("model", "1"), 0) == Mark(1, 1, 0, 0)


def test_the_folder_goes_when_hub_and_launcher_are_killed_one_after_the_other(settings):
    script = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from steerscope import config\n"
        "from steerscope.hub.launcher import start_hub\n"
        "hub = start_hub(config.from_tree(json.loads(sys.argv[1]), base=Path.cwd(), where='t'))\n"
        "print(hub.endpoint, hub.process.pid, hub.http_port, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, msgspec.json.encode(settings).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        endpoint, pid, _ = parent.stdout.readline().split()
        os.kill(int(pid), 9)
        eventually(lambda: [p.pid for p in hubs_of(endpoint) if p.pid != int(pid)], RESTART_SECONDS)
        parent.kill()
    eventually(lambda: not Path(endpoint).exists() and not hubs_of(endpoint), 20)
