"""Created policies in a Redis that two hubs share: real servers, real hubs."""

import concurrent.futures
import contextlib
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path

import grpc
import msgspec
import pytest
import yaml
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hub_world import eventually
from steerscope.api.v1 import steering_pb2, steering_pb2_grpc
from steerscope.api.v1 import steering_pb2 as pb
from steerscope.catalog import store
from steerscope.client import Client
from steerscope.config import RedisSettings, StateSettings
from steerscope.errors import HubError
from steerscope.hub import launcher
from steerscope.hub.link import FrontendLink
from steerscope.hub.server import STATE_SERVICE

redis = pytest.importorskip("redis", reason="the redis package is not installed")
if shutil.which("redis-server") is None:
    pytest.skip("there is no redis-server", allow_module_level=True)

pytestmark = pytest.mark.timeout(120)

CLAMP = {"feature": "known", "clamp": 6.0}
PASSWORD = "s3cret-of-the-fleet"


class Server:
    """A Redis on a port of its own; it can be killed and started again with its data."""

    def __init__(self, folder, *options):
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        self._command += ["--dir", str(folder), "--save", "", *options]
        self._process = None
        self.password = None

    def start(self):
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        eventually(self._answers)

    def kill(self):
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @property
    def client(self):
        return redis.Redis(port=self.port, password=self.password, socket_timeout=2)

    def _answers(self):
        try:
            return self.client.ping()
        except redis.ConnectionError:
            return False


@pytest.fixture
def server_of(tmp_path):
    """Makes a running Redis; by default it keeps what it acknowledged."""
    with contextlib.ExitStack() as servers:

        def make(*options):
            server = Server(tmp_path, *options)
            servers.callback(server.kill)
            server.start()
            return server

        yield make


@pytest.fixture
def durable(server_of):
    return server_of("--appendonly", "yes", "--appendfsync", "always")


@pytest.fixture
def sharing(settings):
    """Settings that share a Redis."""

    def make(server, **redis_settings):
        url = f"redis://127.0.0.1:{server.port}/0"
        state = StateSettings(redis=RedisSettings(url=url, **redis_settings))
        return msgspec.structs.replace(settings, state=state)

    return make


class Replica:
    """A hub with a front end."""

    def __init__(self, settings):
        self.hub = launcher.start_hub(settings)
        self.client = Client(f"127.0.0.1:{self.hub.grpc_port}")
        catalog = store.load(Path(settings.catalog))
        self._link = FrontendLink(self.hub.endpoint, catalog.digest)
        self._link.start()

    @property
    def in_force(self):
        """What a request may name there."""
        return set(self._link.policies) - {"force-known"}

    @property
    def rules(self):
        return self._link.rules

    def put_rules(self, **rules):
        with grpc.insecure_channel(f"127.0.0.1:{self.hub.grpc_port}") as channel:
            stub = steering_pb2_grpc.SteeringServiceStub(channel)
            stub.UpdateRules(steering_pb2.UpdateRulesRequest(rules=rules), timeout=10)

    def health(self):
        with grpc.insecure_channel(f"127.0.0.1:{self.hub.grpc_port}") as channel:
            request = health_pb2.HealthCheckRequest(service=STATE_SERVICE)
            return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status

    def is_healthy(self):
        return self.health() == health_pb2.HealthCheckResponse.SERVING

    def is_writable(self):
        """Whether a change goes through; health is told a moment later."""
        try:
            self.client.delete_policy("never-was", allow_missing=True)
        except HubError:
            return False
        return True

    def names(self):
        found = self.client.list_policies("origin=created")
        return {policy.name.removeprefix("policies/") for policy in found}

    def close(self):
        self._link.close()
        self.client.close()
        self.hub.stop()


@pytest.fixture
def replica_of():
    with contextlib.ExitStack() as replicas:

        def make(settings):
            replica = Replica(settings)
            replicas.callback(replica.close)
            return replica

        yield make


@pytest.fixture
def pair(durable, sharing, replica_of):
    """Two hubs and what they share."""
    return replica_of(sharing(durable)), replica_of(sharing(durable)), durable


def refusal(call):
    """The status code, ErrorInfo's reason and the message of a refused call."""
    with pytest.raises(HubError) as caught:
        call()
    error = caught.value.__cause__
    info = error_details_pb2.ErrorInfo()
    assert any(detail.Unpack(info) for detail in rpc_status.from_call(error).details)
    return error.code(), info.reason, error.details()


def within_a_second(condition):
    """The task's own bound: a change on one replica governs all within a second."""
    eventually(condition, 1.0)


def test_what_one_replica_is_told_governs_all_within_a_second(pair):
    one, other, _ = pair
    for i in range(5):
        created = one.client.create_policy(f"shared-{i}", [CLAMP])
        within_a_second(lambda i=i: f"shared-{i}" in other.in_force)
        assert other.client.get_policy(f"shared-{i}") == created
        other.client.update_policy(f"shared-{i}", description="by the other")
        within_a_second(lambda i=i: one.client.get_policy(f"shared-{i}").description)
        one.client.delete_policy(f"shared-{i}")
        within_a_second(lambda i=i: f"shared-{i}" not in other.in_force)


def test_a_change_whose_news_was_lost_is_found_within_a_second(pair):
    one, other, server = pair
    one.client.create_policy("unheard", [CLAMP])
    within_a_second(lambda: "unheard" in other.in_force)
    with server.client.pipeline() as pipe:  # nothing is published
        pipe.hdel("steerscope:policies", "unheard").set("steerscope:mark", "99:unheard").execute()
    within_a_second(lambda: not one.in_force | other.in_force)


def test_an_expired_policy_is_gone_everywhere(pair):
    one, other, _ = pair
    one.client.create_policy("brief", [CLAMP], ttl=1.5)
    within_a_second(lambda: "brief" in other.in_force)
    eventually(lambda: "brief" not in one.in_force | other.in_force, 2.5)
    assert other.client.create_policy("brief", [CLAMP])


def test_concurrent_updates_on_two_replicas_are_all_kept(pair):
    one, other, _ = pair
    one.client.create_policy("counted", [CLAMP], description="0")
    within_a_second(lambda: "counted" in other.in_force)

    def count(replica):
        done = 0
        while done < 20:
            seen = replica.client.get_policy("counted")
            more = str(int(seen.description) + 1)
            with contextlib.suppress(HubError):
                replica.client.update_policy("counted", description=more, etag=seen.etag)
                done += 1

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(count, (one, other)))
    within_a_second(lambda: one.client.get_policy("counted").description == "40")
    assert other.client.get_policy("counted").description == "40"


def test_concurrent_updates_of_different_fields_do_not_undo_each_other(pair):
    one, other, _ = pair
    one.client.create_policy("divided", [CLAMP])
    within_a_second(lambda: "divided" in other.in_force)

    def describe():
        for i in range(20):
            one.client.update_policy("divided", description=str(i))

    def annotate():
        for i in range(20):
            other.client.update_policy("divided", annotations={"count": str(i)})

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for calls in [pool.submit(describe), pool.submit(annotate)]:
            calls.result()
    within_a_second(lambda: one.client.get_policy("divided").annotations["count"] == "19")
    assert one.client.get_policy("divided").description == "19"


def test_a_name_is_given_once_however_many_ask(pair):
    one, other, _ = pair

    def create(replica, i):
        try:
            replica.client.create_policy(f"wanted-{i}", [CLAMP])
        except HubError as error:
            return error.__cause__.code()
        return grpc.StatusCode.OK

    for i in range(10):
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            codes = list(pool.map(create, (one, other, one, other), [i] * 4))
        assert codes.count(grpc.StatusCode.OK) == 1
        assert codes.count(grpc.StatusCode.ALREADY_EXISTS) == 3


def test_a_request_id_holds_on_every_replica(pair):
    one, other, _ = pair
    request_id = str(uuid.uuid4())
    first = one.client.create_policy("once", [CLAMP], request_id=request_id)
    assert other.client.create_policy("once", [CLAMP], request_id=request_id) == first
    reused = refusal(lambda: other.client.create_policy("twice", [CLAMP], request_id=request_id))
    assert reused[:2] == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")


def test_while_redis_is_away_the_last_state_holds_and_changes_are_refused(pair, replica_of):
    one, other, server = pair
    one.client.create_policy("held", [CLAMP])
    within_a_second(lambda: "held" in other.in_force)
    server.kill()
    eventually(lambda: not one.is_healthy() and not other.is_healthy())
    for replica in (one, other):
        for change in (
            lambda replica=replica: replica.client.create_policy("more", [CLAMP]),
            lambda replica=replica: replica.client.update_policy("held", description="x"),
            lambda replica=replica: replica.client.delete_policy("held"),
        ):
            code, reason, told = refusal(change)
            assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STATE_UNAVAILABLE")
            assert f"redis 127.0.0.1:{server.port}/0 prefix 'steerscope'" in told
        assert replica.in_force == replica.names() == {"held"}
        assert replica.client.create_policy("more", [CLAMP], validate_only=True)
    server.start()
    eventually(lambda: one.is_healthy() and other.is_healthy())
    other.client.create_policy("after", [CLAMP])
    within_a_second(lambda: one.in_force == other.in_force == {"held", "after"})


def test_a_policy_expires_also_while_redis_is_away(pair):
    one, _, server = pair
    one.client.create_policy("brief", [CLAMP], ttl=1.0)
    server.kill()
    assert "brief" in one.in_force
    eventually(lambda: "brief" not in one.in_force, 2.0)


def test_a_redis_that_hangs_is_away_and_holds_nothing_up(pair):
    one, _, server = pair
    one.client.create_policy("held", [CLAMP])
    server.client.execute_command("CLIENT", "PAUSE", "20000", "ALL")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # one after the other, it would be long
        calls = [pool.submit(one.client.create_policy, f"more-{i}", [CLAMP]) for i in range(8)]
    for call in calls:
        code, reason, _ = refusal(call.result)
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "STATE_UNAVAILABLE")
    assert one.names() == one.in_force == {"held"}


def test_what_a_redis_lost_is_put_back_by_the_hubs(server_of, sharing, replica_of):
    forgetful = server_of("--appendonly", "no")
    one, other = replica_of(sharing(forgetful)), replica_of(sharing(forgetful))
    made = {name: one.client.create_policy(name, [CLAMP]) for name in ("first", "second")}
    one.client.delete_policy("first")
    within_a_second(lambda: other.in_force == {"second"})
    forgetful.kill()
    eventually(lambda: not one.is_healthy() and not other.is_healthy())
    forgetful.start()
    eventually(lambda: one.is_healthy() and other.is_healthy())
    late = replica_of(sharing(forgetful))
    assert late.in_force == one.in_force == other.in_force == {"second"}
    assert late.client.get_policy("second") == made["second"]
    late.client.update_policy("second", description="still one state")
    within_a_second(lambda: one.client.get_policy("second").description)


def test_a_hub_that_starts_without_redis_has_declared_policies_until_it_is_there(
    durable, sharing, replica_of
):
    before = replica_of(sharing(durable))
    before.client.create_policy("kept", [CLAMP])
    durable.kill()
    late = replica_of(sharing(durable))
    assert late.in_force == set()
    assert not late.is_healthy()
    assert refusal(lambda: late.client.create_policy("x", [CLAMP]))[1] == "STATE_UNAVAILABLE"
    durable.start()
    eventually(lambda: late.in_force == {"kept"} and late.is_healthy())


def test_hubs_of_another_catalog_refuse_by_name_what_means_something_else_to_them(
    pair, catalog_folder, tmp_path, sharing, replica_of
):
    one, _, server = pair
    one.client.create_policy("same", [CLAMP])
    one.client.create_policy("moved", [{"feature": "unknown", "add": 1.0}])
    folder = tmp_path / "other"
    shutil.copytree(catalog_folder, folder)
    document = yaml.safe_load((folder / "catalog.yaml").read_text())
    document["features"][1]["layer"] = 3
    document["signals"] = []
    (folder / "catalog.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    other = replica_of(msgspec.structs.replace(sharing(server), catalog=str(folder)))
    assert other.in_force == {"same"}
    refused = other.client.get_policy("moved")
    assert refused.state == pb.POLICY_STATE_INVALID
    assert "'unknown' is another one" in refused.state_reason
    other.client.update_policy("moved", interventions=[{"feature": "unknown", "add": 1.0}])
    assert other.in_force == {"same", "moved"}
    within_a_second(lambda: one.in_force == {"same"})


def test_deployments_with_other_prefixes_do_not_meet(durable, sharing, replica_of):
    one = replica_of(sharing(durable))
    other = replica_of(sharing(durable, prefix="staging"))
    one.client.create_policy("production", [CLAMP])
    other.client.create_policy("trial", [CLAMP])
    assert (one.names(), other.names()) == ({"production"}, {"trial"})
    assert {key.split(b":")[0] for key in durable.client.scan_iter()} == {b"steerscope", b"staging"}


def test_a_policy_that_cannot_be_read_leaves_the_last_state_in_force(pair):
    one, _, server = pair
    one.client.create_policy("good", [CLAMP])
    with server.client.pipeline() as pipe:
        pipe.hset("steerscope:policies", "good", b'{"revisions": [], "more": 1}')
        pipe.set("steerscope:mark", "99:bad").execute()
    eventually(lambda: not one.is_healthy())
    assert one.in_force == {"good"}
    _, reason, told = refusal(lambda: one.client.delete_policy("good"))
    assert reason == "STATE_UNAVAILABLE"
    assert "policy 'good' cannot be read" in told


def test_the_kill_switch_of_one_replica_governs_all_within_a_second(durable, sharing, replica_of):
    one, two = replica_of(sharing(durable)), replica_of(sharing(durable))
    one.put_rules(default_policy="policies/force-known", override={"mode": 1})
    began = time.monotonic()
    eventually(lambda: two.rules.override is not None, 5)
    assert time.monotonic() - began < 1.0
    assert two.rules.default_policy == "force-known"
    three = replica_of(sharing(durable))
    assert three.rules == two.rules


def test_a_state_of_another_format_is_refused_at_start(durable, sharing):
    durable.client.set("steerscope:format", "3")
    with pytest.raises(HubError, match=r"prefix 'steerscope': format '3' is of another"):
        launcher.start_hub(sharing(durable))


def test_the_password_comes_from_the_named_variable_and_is_told_nowhere(
    server_of, sharing, replica_of, monkeypatch, capfd
):
    server = server_of("--appendonly", "no")
    server.client.config_set("requirepass", PASSWORD)
    settings = sharing(server, password_env="FLEET_REDIS_PASSWORD")
    with pytest.raises(HubError, match="password_env: FLEET_REDIS_PASSWORD is not set"):
        launcher.start_hub(settings)
    monkeypatch.setenv("FLEET_REDIS_PASSWORD", PASSWORD + "?")
    with pytest.raises(HubError, match=r"redis 127\.0\.0\.1:\d+/0.*(WRONGPASS|invalid)") as caught:
        launcher.start_hub(settings)
    monkeypatch.setenv("FLEET_REDIS_PASSWORD", PASSWORD)
    replica = replica_of(settings)
    replica.client.create_policy("guarded", [CLAMP])
    server.kill()
    eventually(lambda: not replica.is_healthy())
    told = refusal(lambda: replica.client.create_policy("more", [CLAMP]))[2]
    output = capfd.readouterr()
    assert "stay as last known" in output.err
    assert PASSWORD not in output.err + output.out + told + str(caught.value)


def test_no_acknowledged_change_is_lost_when_redis_is_killed_while_hubs_write(pair):
    one, other, server = pair
    acknowledged = {}

    def write(replica, name):
        for i in range(1000):
            try:
                made = replica.client.create_policy(f"{name}-{i}", [CLAMP])
            except HubError:
                return
            acknowledged[made.name] = made

    for round_ in range(4):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            for which, replica in enumerate((one, other)):
                pool.submit(write, replica, f"p-{round_}-{which}")
            enough = len(acknowledged) + 10 + 5 * round_
            eventually(lambda enough=enough: len(acknowledged) >= enough, 20)
            server.kill()
        server.start()
        eventually(lambda: one.is_writable() and other.is_writable())
    time.sleep(0.5)
    for replica in (one, other):
        found = {policy.name: policy for policy in replica.client.list_policies("origin=created")}
        assert {name: found.get(name) for name in acknowledged} == acknowledged


def test_redis_over_tls_is_verified(tmp_path, server_of, sharing, replica_of):
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-key-file", str(key)]
    options += ["--tls-cert-file", str(certificate), "--tls-ca-cert-file", str(certificate)]
    server = server_of(*options)

    def over_tls(options):
        url = f"rediss://127.0.0.1:{port}/0{options}"
        state = StateSettings(redis=RedisSettings(url=url))
        return replica_of(msgspec.structs.replace(sharing(server), state=state))

    trusting = over_tls(f"?ssl_ca_certs={certificate}")
    assert trusting.client.create_policy("private", [CLAMP])
    assert not over_tls("").is_healthy()
