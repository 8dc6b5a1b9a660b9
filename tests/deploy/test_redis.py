"""Redis as the component runs it, and a hub of the component's config on it."""

import contextlib
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import shipped
from grpc_health.v1 import health_pb2, health_pb2_grpc
from steerscope import config
from steerscope.client import Client
from steerscope.client.channel import Credentials, open_channel
from steerscope.hub import launcher
from steerscope.hub.server import STATE_SERVICE

redis = pytest.importorskip("redis", reason="the redis package is not installed")
from redis.backoff import NoBackoff  # noqa: E402
from redis.retry import Retry  # noqa: E402

if shutil.which("redis-server") is None:
    pytest.skip("there is no redis-server", allow_module_level=True)

REDIS_CONF = shipped.KUBERNETES / "components" / "redis" / "redis.conf"


def connection(credentials, port, username="steerscope", password=None):
    return redis.Redis(
        host="127.0.0.1",  # the certificate has no localhost
        port=port,
        ssl=True,
        ssl_ca_certs=str(credentials / "redis-tls" / "ca.crt"),
        username=username,
        password=password or (credentials / "redis" / "password").read_text(),
        socket_timeout=5,
        retry=Retry(NoBackoff(), 0),
    )


@pytest.fixture
def port(credentials, tmp_path):
    """Where Redis listens with the shipped settings, its folders moved into ours."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = REDIS_CONF.read_text().replace("tls-port 6379", f"tls-port {port}\nbind 127.0.0.1")
    text = text.replace("/etc/redis/tls", str(credentials / "redis-tls"))
    text = text.replace("/etc/redis/users", str(credentials / "redis"))
    path = tmp_path / "redis.conf"
    path.write_text(text.replace("dir /data", f"dir {tmp_path}"))
    log = tmp_path / "redis.log"
    with log.open("wb") as output:
        process = subprocess.Popen(["redis-server", path], stdout=output)
    try:
        assert _answers(connection(credentials, port), process), log.read_text()[-500:]
        yield port
    finally:
        process.kill()
        process.wait()


def _answers(client, process):
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(redis.ConnectionError):
            return client.ping()
        time.sleep(0.1)
    return False


@pytest.fixture
def hub(port, deployed, credentials, monkeypatch):
    """A hub with the component's config, on any ports."""
    path = deployed(shipped.CONFIGS["cluster with Redis"])
    text = path.read_text().replace("steerscope-redis:6379", f"127.0.0.1:{port}")
    path.write_text(text.replace(":50051", ":0").replace(":9464", ":0"))
    password = (credentials / "redis" / "password").read_text()
    monkeypatch.setenv("STEERSCOPE_REDIS_PASSWORD", password)
    running = launcher.start_hub(config.load_file(path))
    yield running
    running.stop()


def state_health(hub, credentials):
    with open_channel(f"localhost:{hub.grpc_port}", Credentials(ca=credentials / "ca.crt")) as made:
        request = health_pb2.HealthCheckRequest(service=STATE_SERVICE)
        return health_pb2_grpc.HealthStub(made).Check(request, timeout=10).status


def test_a_policy_created_over_tls_with_the_token_is_kept_in_redis(hub, port, credentials):
    token = (credentials / "admin.token").read_text().strip()
    proof = Credentials(ca=credentials / "ca.crt", token=token)
    with Client(f"localhost:{hub.grpc_port}", proof) as client:
        client.create_policy("shared", [{"feature": "unknown_entity", "clamp": 6.0}])
        assert "policies/shared" in {policy.name for policy in client.list_policies()}
    assert connection(credentials, port).hkeys("steerscope:policies") == [b"shared"]
    assert state_health(hub, credentials) == health_pb2.HealthCheckResponse.SERVING


def test_nobody_else_and_nothing_else_is_let_into_redis(port, credentials):
    with pytest.raises(redis.AuthenticationError):
        connection(credentials, port, password="guessed").ping()
    with pytest.raises(redis.ConnectionError):
        redis.Redis(port=port, socket_timeout=1, retry=Retry(NoBackoff(), 0)).ping()
    ours = connection(credentials, port)
    for refused in (lambda: ours.set("another", 1), ours.flushall, ours.config_get):
        with pytest.raises(redis.exceptions.NoPermissionError):
            refused()


def test_the_config_asks_for_what_makes_an_answer_durable():
    lines = Path(REDIS_CONF).read_text().splitlines()
    assert {"appendonly yes", "appendfsync always", "maxmemory-policy noeviction"} <= set(lines)
