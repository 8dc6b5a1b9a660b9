"""The canary of a real hub, whose server is played: its answers, and what its worker tells."""

import contextlib
import http.server
import itertools
import json
import threading
import time
import urllib.request

import msgspec
import pytest
from hub_world import ENGINE, eventually, frame, scrape, start
from steerscope.config import CanaryCheck, CanarySettings
from steerscope.errors import ConfigError, HubError
from steerscope.hub import launcher
from steerscope.steering.policies import check_declared

pytestmark = pytest.mark.timeout(60)

KEY_ENV = "STEERSCOPE_TEST_CANARY_KEY"
HIGH = {"at_question": "high"}


class PlayedServer:
    """Speaks as vLLM's server does, and sends what vLLM's worker would."""

    def __init__(self):
        self.is_up = True
        self.status = 200
        self.activation = 6.0
        self.delay = 0.0
        self.asked = []
        self.worker = None
        self.catalog = None
        self._ids = itertools.count()
        played = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self._answer(200 if played.is_up else 503, {})

            def do_POST(self):
                length = int(self.headers["content-length"])
                body = json.loads(self.rfile.read(length))
                played.asked.append((self.path, body, dict(self.headers)))
                time.sleep(played.delay)
                if played.status == 200:
                    played.serve(self.path, self.headers["x-request-id"])
                self._answer(played.status, {"id": "whatever"})

            def _answer(self, status, tree):
                payload = json.dumps(tree).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("content-length", str(len(payload)))
                    self.end_headers()
                    self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever).start()

    def serve(self, path, own_id):
        if self.worker is None or self.activation is None:
            return
        external = f"chatcmpl-{own_id}" if "chat" in path else f"cmpl-{own_id}-0"
        name = f"internal-{next(self._ids)}"
        begun = start(name, 3, external_id=external)
        acts = self.activation
        self.worker.send(frame(self.catalog, (name, 0, 3), acts=acts, started=(begun,)))
        self.worker.send(frame(self.catalog, finished=(name,)))

    def close(self):
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server():
    played = PlayedServer()
    yield played
    played.close()


def canary(server, **fields):
    checks = {"known": CanaryCheck(prompts=("Who?", "Where?"), expect=HIGH)}
    given = {"interval_seconds": 1.0, "timeout_seconds": 1.0, "checks": checks, **fields}
    return CanarySettings(base_url=server.base_url, **given)


@pytest.fixture
def hub_with(settings, server, worker_of, catalog):
    """Starts a hub with the canary."""
    with contextlib.ExitStack() as hubs:

        def make(**fields):
            asked = msgspec.structs.replace(settings, canary=canary(server, **fields))
            running = launcher.start_hub(asked)
            hubs.callback(running.stop)
            server.worker, server.catalog = worker_of(running), catalog
            return running

        yield make


def runs(hub, outcome, check="known"):
    labels = {"canary": check, "outcome": outcome}
    return scrape(hub.http_port).value("steerscope_canary_runs_total", **labels)


def last_success(hub):
    return scrape(hub.http_port).value(
        "steerscope_canary_last_success_timestamp_seconds", canary="known"
    )


def test_a_check_whose_label_is_as_expected_passes(hub_with, server):
    before = time.time()
    hub = hub_with()
    eventually(lambda: runs(hub, "passed") >= 2)
    assert runs(hub, "unexpected") == runs(hub, "failed") == 0
    assert before < last_success(hub) <= time.time()
    score = scrape(hub.http_port).value(
        "steerscope_canary_score_ratio", canary="known", signal="at_question"
    )
    assert score == pytest.approx(1 / (1 + 2.718281828 ** -(6.0 - 2.0)))
    (path, first, _), (_, second, _) = server.asked[:2]
    assert path == "/v1/chat/completions"
    assert [first["messages"][0]["content"], second["messages"][0]["content"]] == ["Who?", "Where?"]
    assert first["temperature"] == 0


def test_what_it_asks_is_in_no_number_of_users(hub_with, server, catalog):
    hub = hub_with()
    eventually(lambda: runs(hub, "passed") >= 1)
    scored = {"signal": "at_question", "label": "high", **ENGINE}
    assert scrape(hub.http_port).value("steerscope_signal_requests_total", **scored) == 0
    begun = start("a-user", 3, external_id="chatcmpl-steerscope-canary-guessed")
    server.worker.send(frame(catalog, ("a-user", 0, 3), acts=6.0, started=(begun,)))
    server.worker.send(frame(catalog, finished=("a-user",)))
    eventually(
        lambda: scrape(hub.http_port).value("steerscope_signal_requests_total", **scored) == 1
    )


def test_another_label_is_unexpected(hub_with, server):
    server.activation = 0.0
    hub = hub_with()
    eventually(lambda: runs(hub, "unexpected") >= 1)
    assert (runs(hub, "passed"), last_success(hub)) == (0, 0)
    server.activation = 6.0
    eventually(lambda: runs(hub, "passed") >= 1)


def test_an_answer_of_which_nothing_was_seen_is_unreported(hub_with, server):
    server.activation = None
    hub = hub_with()
    eventually(lambda: runs(hub, "unreported") >= 1)


def test_a_signal_without_a_score_is_unscored(hub_with):
    check = CanaryCheck(prompts=("Who?",), expect={"in_answer": "high"})
    hub = hub_with(checks={"known": check})
    eventually(lambda: runs(hub, "unscored") >= 1)  # the server generates nothing


@pytest.mark.parametrize("fault", ["refused", "too_late"])
def test_a_server_that_does_not_answer_has_failed(hub_with, server, fault):
    server.status, server.delay = (401, 0.0) if fault == "refused" else (200, 3.0)
    hub = hub_with()
    eventually(lambda: runs(hub, "failed") >= 1)
    assert runs(hub, "passed") == 0


def test_it_waits_for_a_server_that_is_not_up_yet(hub_with, server):
    server.is_up = False
    hub = hub_with()
    time.sleep(2.5)
    assert server.asked == []
    assert last_success(hub) == 0
    server.is_up = True
    eventually(lambda: runs(hub, "passed") >= 1)


def test_it_shows_its_key_and_names_the_model(hub_with, server, monkeypatch):
    monkeypatch.setenv(KEY_ENV, "k-1")
    hub = hub_with(api_key_env=KEY_ENV, model="other", api="completions")
    eventually(lambda: runs(hub, "passed") >= 1)
    path, body, headers = server.asked[0]
    assert path == "/v1/completions"
    assert (body["model"], body["prompt"]) == ("other", "Who?")
    assert {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer k-1"


def test_a_hub_whose_key_is_not_set_does_not_start(hub_with):
    with pytest.raises(HubError, match=r"canary\.api_key_env: .* is not set"):
        hub_with(api_key_env="NOT_SET_ANYWHERE")


@pytest.mark.parametrize(
    ("expect", "message"),
    [
        ({"nonsense": "high"}, r"canary\.checks\.known\.expect\.nonsense: no signal"),
        ({"at_question": "medium"}, r"expect\.at_question: no label 'medium' \(there are low, hi"),
    ],
)
def test_an_expectation_that_cannot_hold_is_refused(settings, catalog, server, expect, message):
    checks = {"known": CanaryCheck(prompts=("Who?",), expect=expect)}
    asked = msgspec.structs.replace(settings, canary=canary(server, checks=checks))
    with pytest.raises(ConfigError, match=message):
        check_declared(catalog, asked)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"base_url": "ftp://127.0.0.1"}, "must be a URL"),
        ({"base_url": "http://user:pw@127.0.0.1"}, "name the variable"),
        ({"base_url": "http://10.0.0.1:8000", "api_key_env": "K"}, "not encrypted"),
        ({"base_url": "http://127.0.0.1:8000", "ca_file": "ca.pem"}, "contradicts"),
        ({"base_url": "http://127.0.0.1:8000", "checks": {}}, "length >= 1"),
        ({"base_url": "http://127.0.0.1:8000", "interval_seconds": 0}, ">= 1"),
        ({"base_url": "http://127.0.0.1:8000", "colour": "yellow"}, "unknown field"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    checks = {"known": {"prompts": ["Who?"], "expect": {"at_question": "high"}}}
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert({"checks": checks, **fields}, CanarySettings)


def test_a_server_that_is_gone_fails_the_check_and_harms_nothing_else(hub_with, server):
    hub = hub_with()
    eventually(lambda: runs(hub, "passed") >= 1)
    server.close()
    eventually(lambda: runs(hub, "failed") >= 1)
    with urllib.request.urlopen(f"http://127.0.0.1:{hub.http_port}/health", timeout=5) as answer:
        assert answer.status == 200
