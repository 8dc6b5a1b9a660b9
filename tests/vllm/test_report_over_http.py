"""``GET /v1/steerscope/requests/{request_id}`` on vLLM's own port, an endpoint plugin of vLLM's."""

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import psutil
import pytest
from steerscope.client import Client, Credentials
from steerscope.demo import world
from steerscope.demo.live import server
from steerscope.demo.live.server import MODEL_NAME

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

QUESTION = world.questions("known", "en", 1, 29)[0].question
REPORTS = "/v1/steerscope/requests/"
OBSERVER, USER = "sst_" + 43 * "o", "sk-" + 40 * "u"
"""A token of ours that vLLM takes as well, and a key of vLLM's that is nobody's token."""


def get(url, token=None):
    """Status and JSON."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as r:
            return r.status, json.load(r)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def ask(running, token=None, **more):
    """Have a question answered; the response's id."""
    body = {"model": MODEL_NAME, "messages": [{"role": "user", "content": QUESTION}], **more}
    headers = {"content-type": "application/json"}
    if token:
        headers["authorization"] = f"Bearer {token}"
    request = urllib.request.Request(
        f"{running.base_url}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["id"]


def hub_of(running):
    below = psutil.Process(running.process.pid).children(recursive=True)
    (hub,) = [each for each in below if "steerscope.hub" in each.cmdline()]
    return hub.pid


@contextlib.contextmanager
def stopped(pid):
    """The process takes no part in anything meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_the_report_is_that_of_the_hub_s_own_page(demo_server, client):
    request_id = ask(demo_server, max_tokens=8, vllm_xargs={"steering": "force-known"})
    assert client.get_request_report(request_id, wait=10.0).completions[0].complete
    status, report = get(demo_server.base_url + REPORTS + request_id)
    hub_s_own = demo_server.metrics_url.removesuffix("/metrics")
    assert (status, report) == get(hub_s_own + REPORTS + request_id)
    assert report["name"] == f"requests/{request_id}"
    (completion,) = report["completions"]
    assert completion["policy"] == "force-known"
    assert all(feature["activations"] for feature in completion["features"])


def test_whoever_may_call_may_also_show_a_token_that_only_vllm_knows(demo_server, team_token):
    request_id = ask(demo_server, max_tokens=4)
    for token in (None, team_token, "none"):
        assert get(demo_server.base_url + REPORTS + request_id, token)[0] == 200


def test_an_unknown_id_is_not_found_in_the_shape_of_vllm_s_errors(demo_server):
    status, answer = get(demo_server.base_url + REPORTS + "chatcmpl-nobody")
    assert (status, answer["error"]["code"]) == (404, 404)
    assert "chatcmpl-nobody" in answer["error"]["message"]
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(demo_server, model="nobody")
    theirs = json.load(caught.value)
    assert answer["error"].keys() == theirs["error"].keys()
    assert answer["error"]["type"] == theirs["error"]["type"]


def test_without_a_hub_the_service_is_unavailable_and_comes_back(demo_server):
    request_id = ask(demo_server, max_tokens=4)
    with stopped(hub_of(demo_server)):
        status, answer = get(demo_server.base_url + REPORTS + request_id)
    assert (status, answer["error"]["type"]) == (503, "ServiceUnavailableError")
    assert get(demo_server.base_url + REPORTS + request_id)[0] == 200


def test_two_api_servers_let_in_who_has_vllm_s_key_and_may_observe(tmp_path):
    observer = {
        "name": "observer",
        "token_sha256": hashlib.sha256(OBSERVER.encode()).hexdigest(),
        "scopes": ["observe"],
    }
    with server.running(
        tmp_path,
        extra_arguments=(
            *("--api-server-count", "2"),
            *("--api-key", OBSERVER, USER),
            "--enforce-eager",  # it is up sooner
        ),
        environment={"VLLM_PLUGINS": "steerscope"},
        settings={"security": {"identities": [observer]}},
    ) as running:
        request_id = ask(running, USER, max_tokens=4)
        with Client(running.grpc_address, Credentials(token=OBSERVER)) as client:
            assert client.get_request_report(request_id, wait=10.0).completions[0].complete
        url = running.base_url + REPORTS + request_id
        assert get(url)[0] == 401
        assert get(url, "sk-stranger")[0] == 401
        status, answer = get(url, USER)
        assert (status, answer["error"]["type"]) == (401, "AuthenticationError")
        log = running.log.read_text()
        api_servers = set(map(int, re.findall(r"\(ApiServer_\d pid=(\d+)\)", log)))
        assert len(api_servers) == 2
        for other in api_servers:
            with stopped(other):
                status, report = get(url, OBSERVER)
                assert (status, report["name"]) == (200, f"requests/{request_id}")
                assert get(url + "0", OBSERVER)[0] == 404


PROBE = """
import json, os, sys
from fastapi import FastAPI
from vllm.plugins.endpoint_plugins.interface import attach_endpoint_plugins

def attached(**environment):
    os.environ.update(environment)
    app = FastAPI()
    attach_endpoint_plugins(app, ("generate",))
    for name in environment:
        del os.environ[name]
    ours = [route.path for route in app.routes if "steerscope" in route.path]
    costly = [name for name in sys.modules if name.startswith(("steerscope.engine", "grpc"))]
    return len(app.state.endpoint_plugins), ours, costly

named, configured = {"VLLM_PLUGINS": "steerscope"}, {"STEERSCOPE_CONFIG": "there.yaml"}
found = [attached(**named), attached(**configured), attached(**named, **configured)]
print("RESULT", json.dumps(found))
"""


def test_there_is_a_route_only_if_vllm_is_told_to_and_steerscope_is_configured():
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("STEERSCOPE", "VLLM_PL"))}
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env=clean,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    unconfigured, unnamed, both = json.loads(done.stdout.split("RESULT ", 1)[1])
    assert unconfigured == [1, [], []]
    assert unnamed == [0, [], []]
    assert both == [1, [REPORTS + "{request_id}"], []]
    assert "VLLM_PLUGINS is not set" in done.stdout + done.stderr
