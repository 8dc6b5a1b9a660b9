"""``traceparent`` in gRPC metadata: what a call led to can be found by its trace."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import grpc
import msgspec
import pytest
from auth_world import LOOPBACK, somebody
from hub_world import eventually, frame, start
from opentelemetry.sdk.trace import TracerProvider
from steerscope import config
from steerscope.api.v1 import steering_pb2, steering_pb2_grpc
from steerscope.cli.main import main
from steerscope.client import AsyncClient, CallError, Client, Credentials
from steerscope.config import AuditSettings
from steerscope.hub import launcher
from steerscope.hub.audit.log import AuditLog
from steerscope.hub.audit.verification import verify
from steerscope.steering.interventions import Intervention

pytestmark = pytest.mark.timeout(90)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADER = ("traceparent", f"00-{TRACE}-{SPAN}-01")
EDIT = {"feature": "known", "clamp": 2.0}
TRACER = TracerProvider().get_tracer("test")


@pytest.fixture(scope="module")
def audited(settings, tmp_path_factory):
    told = AuditSettings(path=str(tmp_path_factory.mktemp("audit") / "audit.jsonl"))
    hub = launcher.start_hub(msgspec.structs.replace(settings, audit=told))
    hub.audit_path = told.path
    yield hub
    hub.stop()


def entries(hub):
    with open(hub.audit_path) as file:
        return [json.loads(line) for line in file]


def traces(hub, policy):
    """The trace of each entry about the policy; None where there is none."""
    return [e.get("trace_id") for e in entries(hub) if e["event"].get("policy") == policy]


def create(hub, policy, *metadata):
    """Make a policy as anyone's gRPC client would."""
    with grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel:
        request = steering_pb2.CreatePolicyRequest(policy_id=policy)
        request.policy.interventions.add(feature="known", clamp=2.0)
        steering_pb2_grpc.SteeringServiceStub(channel).CreatePolicy(
            request, timeout=10, metadata=metadata
        )


def span_trace(span):
    return f"{span.get_span_context().trace_id:032x}"


def test_a_change_is_written_down_with_the_trace_of_its_call_and_the_next_without(audited):
    create(audited, "in-a-trace", HEADER)
    create(audited, "in-none")
    assert traces(audited, "in-a-trace") == [TRACE]
    assert traces(audited, "in-none") == [None]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("empty", ""),
        ("garbage", "00-garbage"),
        ("capitals", HEADER[1].upper()),
        ("zeros", f"00-{'0' * 32}-{SPAN}-01"),
        ("version-ff", f"ff-{TRACE}-{SPAN}-01"),
        ("longer", HEADER[1] + "-more"),
    ],
)
def test_what_is_malformed_is_no_trace_and_no_error(audited, name, value):
    create(audited, name, ("traceparent", value))
    assert traces(audited, name) == [None]


def test_calls_at_the_same_time_do_not_mix_their_traces(audited):
    async def change(client, number):
        with TRACER.start_as_current_span("change") as span:
            await client.create_policy(f"many-{number}", [EDIT])
            await client.delete_policy(f"many-{number}")
            return [span_trace(span)] * 2

    async def change_all():
        async with AsyncClient(f"127.0.0.1:{audited.grpc_port}") as client:
            return await asyncio.gather(*(change(client, number) for number in range(8)))

    expected = asyncio.run(change_all())
    assert [traces(audited, f"many-{number}") for number in range(8)] == expected
    assert len({trace for trace, _ in expected}) == 8


def test_our_client_sends_the_trace_of_the_span_that_is_active(audited):
    with Client(f"127.0.0.1:{audited.grpc_port}") as client:
        with TRACER.start_as_current_span("outer") as span:
            client.create_policy("ours", [EDIT])
            client.steer_request("chatcmpl-5", interventions=[EDIT], ttl=30.0)
            client.update_rules(default_policy="force-known")
        client.update_rules(default_policy=None)
        client.release_request("chatcmpl-5")
        client.delete_policy("ours")
    found = {(e["event"]["type"], e.get("trace_id")) for e in entries(audited)}
    assert {("steering_changed", span_trace(span)), ("released", None)} <= found
    assert {("default_changed", span_trace(span)), ("default_changed", None)} <= found
    assert traces(audited, "ours") == [span_trace(span), None]


def test_a_steered_request_is_written_down_with_its_own_trace(audited, catalog, worker_of):
    edits = (Intervention(feature="known", clamp=2.0),)
    traced = msgspec.structs.replace(
        start("traced", 2, policy="mine", interventions=edits), traceparent=HEADER[1]
    )
    plain = start("plain", 2, policy="mine", interventions=edits)
    worker = worker_of(audited)
    worker.send(frame(catalog, ("traced", 0, 3), ("plain", 0, 3), started=(traced, plain)))
    worker.send(frame(catalog, finished=("traced", "plain")))
    eventually(lambda: len(traces(audited, "mine")) == 2)
    assert sorted(traces(audited, "mine"), key=str) == [TRACE, None]


def test_a_refusal_is_logged_and_written_down_with_the_trace(catalog_folder, tmp_path, capfd):
    path = tmp_path / "audit.jsonl"
    watcher = somebody("watcher", "observe")
    tree = {
        "catalog": str(catalog_folder),
        "hub": LOOPBACK,
        "audit": {"path": str(path)},
        "security": {"identities": [watcher.tree]},
    }
    hub = launcher.start_hub(config.from_tree(tree, base=Path("/"), where="test"))
    with (
        Client(f"127.0.0.1:{hub.grpc_port}", Credentials(token=watcher.token)) as client,
        TRACER.start_as_current_span("refused") as span,
        pytest.raises(CallError, match="needs the scope"),
    ):
        client.create_policy("mine", [EDIT])
    hub.stop()
    (denied,) = [e for e in map(json.loads, path.open()) if e["event"]["type"] == "denied"]
    assert (denied["identity"], denied["trace_id"]) == ("watcher", span_trace(span))
    assert f"(trace {span_trace(span)})" in capfd.readouterr().err


def test_a_log_with_and_without_traces_is_one_chain(audited, tmp_path, capsys):
    create(audited, "to-verify", HEADER)
    create(audited, "to-verify-too")
    assert main(["audit", "verify", audited.audit_path]) == 0
    capsys.readouterr()
    assert main(["audit", "show", audited.audit_path, "--policy", "to-verify", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["trace_id"] == TRACE
    edited = tmp_path / "edited.jsonl"
    with open(audited.audit_path) as file:
        edited.write_text(file.read().replace(TRACE, TRACE[::-1]))
    assert verify([edited]).problems


OLD_LOG = """\
{"seq":1,"time":"2026-11-21T09:00:00.250000Z","identity":"","event":{"type":"log_started\
","pid":1910},"previous":"00000000000000000000000000000000000000000000000000000000000000\
00"}
{"seq":2,"time":"2026-11-21T09:00:00.250000Z","identity":"alice","event":{"type":"policy\
_deleted","policy":"mine","revision":7,"digest":"d1"},"previous":"341bbbf436c366f99fa3f5\
b6dd9cd5666fc730abd5789deba8bcdb3063f4c461"}
{"seq":3,"time":"2026-11-21T09:00:00.250000Z","identity":"alice","event":{"type":"kill_s\
witch","mode":"steering_off"},"previous":"5967d62376e9add10cc4366b774978a3d4939ddd926a7e\
4c5a3d5575b7df5f37"}
"""


def test_a_log_from_before_there_were_traces_is_intact_and_goes_on(tmp_path):
    path = tmp_path / "audit.jsonl"
    path.write_text(OLD_LOG)
    path.chmod(0o600)
    log = AuditLog.open(path)
    log.close()
    found = verify([path])
    assert (found.problems, found.num_entries) == ([], OLD_LOG.count("\n") + 1)


def test_without_opentelemetry_or_a_span_nothing_is_sent():
    script = (
        "import sys\n"
        "from steerscope.client.call import trace_metadata\n"
        "assert trace_metadata() == ()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
        "import opentelemetry.trace\n"
        "assert trace_metadata() == ()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
