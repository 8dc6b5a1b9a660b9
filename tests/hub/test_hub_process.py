import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import httpx
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hub_world import eventually, frame, scrape, start
from steerscope import config
from steerscope.client import Client
from steerscope.config import HubSettings
from steerscope.errors import HubError
from steerscope.hub import launcher
from steerscope.hub.link import FrontendLink
from steerscope.hub.server import SERVICES
from steerscope.steering.interventions import Intervention, Policy

pytestmark = pytest.mark.timeout(90)


def with_hub(settings, **hub):
    changed = msgspec.structs.replace(settings.hub, **hub)
    return msgspec.structs.replace(settings, hub=changed)


@contextlib.contextmanager
def run_by_hand(settings, endpoint):
    """The process as an operator starts it; yields its first line too."""
    command = [sys.executable, "-m", "steerscope.hub", "--config-json", "-"]
    process = subprocess.Popen(
        [*command, "--endpoint", str(endpoint), "--parent-pid", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        process.stdin.write(json.dumps(config.to_tree(settings)).encode())
        process.stdin.close()
        yield process, process.stdout.readline()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_folder_of_the_sockets_is_private(shared_hub):
    assert stat.S_IMODE(Path(shared_hub.endpoint).stat().st_mode) == 0o700


def test_stopping_ends_the_process_and_removes_the_folder(settings):
    running = launcher.start_hub(settings)
    running.stop()
    assert running.process.poll() == 0
    assert not Path(running.endpoint).exists()
    running.stop()


@pytest.mark.parametrize("field", ["grpc_address", "http_address"])
def test_a_port_in_use_is_named_and_the_hub_does_not_start(settings, field):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HubError) as caught:
            launcher.start_hub(with_hub(settings, **{field: address}))
    assert str(caught.value) == f"hub.{field}: {address}: address already in use"


def test_two_hubs_cannot_share_a_grpc_port(shared_hub, settings):
    address = f"127.0.0.1:{shared_hub.grpc_port}"
    with pytest.raises(HubError, match=r"hub\.grpc_address.*in use"):
        launcher.start_hub(with_hub(settings, grpc_address=address))


@pytest.mark.parametrize("field", ["grpc_address", "http_address"])
def test_an_address_beyond_loopback_is_refused(settings, field):
    with pytest.raises(HubError, match=rf"hub\.{field}.*loopback"):
        launcher.start_hub(with_hub(settings, **{field: "0.0.0.0:0"}))


def test_a_bad_declared_policy_is_named_at_start(settings):
    policy = Policy(name="odd", interventions=(Intervention(feature="nobody", add=1.0),))
    with pytest.raises(HubError, match=r"'odd'.*interventions\[0\]\.feature"):
        launcher.start_hub(msgspec.structs.replace(settings, policies=(policy,)))


def test_another_catalog_than_the_pinned_one_is_refused(settings):
    with pytest.raises(HubError, match="pinned"):
        launcher.start_hub(config.pinned(settings, "0" * 64))


def test_a_missing_socket_folder_is_told_on_the_ready_line(settings, tmp_path):
    with run_by_hand(settings, tmp_path / "nowhere") as (process, line):
        assert json.loads(line or b"null"), "no line on stdout"
        assert json.loads(line)["ready"] is False
        assert process.wait(10) == 1


def test_a_hub_that_ends_leaves_what_others_put_in_its_folder(settings, tmp_path):
    (tmp_path / "notes").write_text("not the hub's")
    with run_by_hand(settings, tmp_path) as (process, line):
        assert json.loads(line)["ready"] is True
        process.terminate()
        assert process.wait(10) == 0
    left = {path.name for path in tmp_path.iterdir()}
    assert {"notes", "marks", "state.db"} <= left  # for the next hub of this launch


def test_malformed_settings_are_told_on_the_ready_line(tmp_path):
    command = [sys.executable, "-m", "steerscope.hub", "--config-json", "-"]
    done = subprocess.run(
        [*command, "--endpoint", str(tmp_path), "--parent-pid", str(os.getpid())],
        input=b'{"catalogue": 1}',
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)["ready"] is False


def test_the_hub_ends_when_its_parent_is_killed(settings, tmp_path):
    script = (
        "import json, sys, time\n"
        "from pathlib import Path\n"
        "from steerscope import config\n"
        "from steerscope.hub.launcher import start_hub\n"
        "tree = json.loads(sys.argv[1])\n"
        "hub = start_hub(config.from_tree(tree, base=Path.cwd(), where='test'))\n"
        "print(hub.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    tree = json.dumps(config.to_tree(settings))
    parent = subprocess.Popen([sys.executable, "-c", script, tree], stdout=subprocess.PIPE)
    try:
        child = int(parent.stdout.readline())
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    eventually(lambda: not is_running(child), 10)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_standard_health_service_serves_as_a_whole_and_by_service(shared_hub):
    with grpc.insecure_channel(f"127.0.0.1:{shared_hub.grpc_port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", *SERVICES):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_services(shared_hub):
    with grpc.insecure_channel(f"127.0.0.1:{shared_hub.grpc_port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=5)
    assert set(SERVICES) <= {s.name for s in answer.list_services_response.service}


def test_a_message_beyond_the_limit_is_refused(client):
    with pytest.raises(HubError, match="RESOURCE_EXHAUSTED"):
        client.create_policy(
            "huge", [{"feature": "known", "add": 1.0}], description="x" * (5 << 20)
        )


def test_a_front_end_of_another_catalog_is_refused(shared_hub):
    link = FrontendLink(shared_hub.endpoint, "0" * 64)
    with pytest.raises(HubError, match="refused"):
        link.start(5.0)
    link.close()


def test_a_link_without_a_hub_says_so_in_time(tmp_path):
    link = FrontendLink(str(tmp_path), "0" * 64)
    with pytest.raises(HubError, match=str(tmp_path)):
        link.start(0.3)
    link.close()


def test_a_links_news_is_counted_by_policy_and_outcome(hub, catalog):
    link = FrontendLink(hub.endpoint, catalog.digest)
    link.start()
    link.admitted("r1", "force-known", "d")
    link.admitted("r2", "inline", "d")
    link.rejected("r3", "made-up", "steering", "no such policy")
    name = "steerscope_steering_requests_total"

    def counted():
        metrics = scrape(hub.http_port)
        return [
            metrics.value(name, model_name="", engine="", policy=policy, outcome=outcome)
            for policy, outcome in (
                ("force-known", "admitted"),
                ("inline", "admitted"),
                ("unknown", "rejected"),
            )
        ]

    eventually(lambda: counted() == [1, 1, 1])
    link.close()


def test_a_link_outlives_its_hub_and_finds_the_next_one(settings, catalog, tmp_path):
    with run_by_hand(settings, tmp_path) as (process, line):
        link = FrontendLink(str(tmp_path), catalog.digest)
        link.start()
        with Client(f"127.0.0.1:{json.loads(line)['grpc_port']}") as client:
            client.create_policy("first", [{"feature": "known", "add": 1.0}])
        assert set(link.policies) == {"force-known", "first"}
        process.kill()
        process.wait()
        link.admitted("r", "force-known", "d")
        assert set(link.policies) == {"force-known", "first"}
    with run_by_hand(settings, tmp_path) as (_, line):
        with Client(f"127.0.0.1:{json.loads(line)['grpc_port']}") as client:
            client.delete_policy("first")
            client.create_policy("second", [{"feature": "known", "add": 1.0}])
        eventually(lambda: set(link.policies) == {"force-known", "second"}, 10)
    link.close()


def test_a_front_end_killed_without_goodbye_is_not_waited_for(hub, catalog):
    script = (
        "import sys, time\n"
        "from steerscope.hub.link import FrontendLink\n"
        "FrontendLink(*sys.argv[1:]).start()\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, hub.endpoint, catalog.digest]
    front_end = subprocess.Popen(command, stdout=subprocess.PIPE)
    front_end.stdout.readline()
    front_end.kill()
    front_end.wait()
    front_end.stdout.close()
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:
        begun = time.monotonic()
        client.create_policy("quick", [{"feature": "known", "add": 1.0}])
        assert time.monotonic() - begun < 1.0


def test_a_front_end_that_hangs_delays_a_change_but_does_not_fail_it(hub, catalog):
    script = (
        "import sys, time\n"
        "from steerscope.hub.link import FrontendLink\n"
        "FrontendLink(*sys.argv[1:]).start()\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, hub.endpoint, catalog.digest]
    front_end = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        front_end.stdout.readline()
        front_end.send_signal(signal.SIGSTOP)
        with Client(f"127.0.0.1:{hub.grpc_port}") as client:
            begun = time.monotonic()
            client.create_policy("slow", [{"feature": "known", "add": 1.0}])
            assert 1.5 < time.monotonic() - begun < 4.0
            assert client.get_policy("slow")
        timeouts = scrape(hub.http_port).value("steerscope_policy_propagation_timeouts_total")
        assert timeouts == 1
    finally:
        front_end.kill()
        front_end.wait()
        front_end.stdout.close()


def test_a_flood_of_frames_does_not_shut_out_callers(hub, worker, catalog):
    told = (start("a", 1 << 20),)
    for i in range(800):
        worker.send(frame(catalog, ("a", 256 * i, 256), started=told))
        told = ()
        if i % 200 == 100:
            begun = time.monotonic()
            assert httpx.get(f"http://127.0.0.1:{hub.http_port}/health", timeout=5).is_success
            assert time.monotonic() - begun < 1.0


def test_a_malformed_frame_is_survived(hub, worker, catalog):
    worker.send(b"\xffnot a frame")
    worker.send(frame(catalog, ("a", 0, 2), started=(start("a", 2),), finished=("a",)))
    labels = {"model_name": "", "engine": "", "reason": "malformed"}
    eventually(
        lambda: scrape(hub.http_port).value("steerscope_frames_dropped_total", **labels) == 1
    )
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:
        assert client.get_request_report("a", wait=5.0).completions[0].complete


def test_importing_the_link_loads_neither_torch_nor_vllm_nor_grpc():
    script = (
        "import sys, steerscope.hub.link\n"
        "print([m for m in ('torch', 'vllm', 'grpc', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "[]"


def test_two_settings_of_one_policy_name_do_not_start(settings):
    policy = Policy(name="force-known", interventions=(Intervention(feature="known", add=1.0),))
    with pytest.raises(HubError, match="force-known"):
        launcher.start_hub(msgspec.structs.replace(settings, policies=(policy,)))


@pytest.mark.parametrize("name", ["inline", "unknown"])
def test_a_declared_policy_cannot_take_a_reserved_name(settings, name):
    policy = Policy(name=name, interventions=(Intervention(feature="known", add=1.0),))
    with pytest.raises(HubError, match=name):
        launcher.start_hub(msgspec.structs.replace(settings, policies=(policy,))).stop()


def test_the_limit_on_interventions_holds_for_policies_too(settings):
    strict = msgspec.structs.replace(
        settings, steering=config.SteeringSettings(max_interventions=1)
    )
    running = launcher.start_hub(strict)
    edits = [{"feature": "known", "add": 1.0}, {"feature": "unknown", "add": 1.0}]
    try:
        with (
            Client(f"127.0.0.1:{running.grpc_port}") as client,
            pytest.raises(ValueError, match="1"),
        ):
            client.create_policy("many", edits)
    finally:
        running.stop()


def test_settings_of_the_hub_have_safe_defaults():
    assert HubSettings().grpc_address.startswith("127.0.0.1:")
    assert HubSettings().http_address.startswith("127.0.0.1:")
