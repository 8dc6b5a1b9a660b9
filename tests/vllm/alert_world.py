"""From a metrics page to a webhook: generated rules, Prometheus, Alertmanager, a receiver."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import yaml
from steerscope.demo.live.server import free_ports

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = ROOT / "dashboards"
SHIPPED = yaml.safe_load((DASHBOARDS / "settings.yaml").read_text())
"""What operators decide, as it is before they do."""
SHIPPED_WEBHOOK = "127.0.0.1:5001"
START_SECONDS = 30.0


class Told(msgspec.Struct, rename="camel"):
    """One alert of a notification."""

    status: str
    labels: dict[str, str]
    annotations: dict[str, str]
    starts_at: datetime
    ends_at: datetime
    fingerprint: str


class Notification(msgspec.Struct):
    """What Alertmanager posts to a webhook."""

    version: str
    status: str
    receiver: str
    alerts: list[Told]


class Taken(NamedTuple):
    """A notification and the path that it was posted to."""

    path: str
    notification: Notification


class Chain(NamedTuple):
    """Where Prometheus is reached, and what the webhook has heard by now."""

    prometheus: str
    taken: list[Taken]

    def heard(self, alert: str, status: str) -> list[tuple[str, Told]]:
        """The path and the words of every time that this was told."""
        return [
            (path, told)
            for path, notification in tuple(self.taken)
            for told in notification.alerts
            if (told.labels["alertname"], told.status) == (alert, status)
        ]

    def now(self, query: str, label: str) -> dict[str, float]:
        """What Prometheus answers at this moment, by a label."""
        reply = httpx.get(f"{self.prometheus}/api/v1/query", params={"query": query}, timeout=10)
        series = reply.raise_for_status().json()["data"]["result"]
        return {one["metric"].get(label, ""): float(one["value"][1]) for one in series}


def missing_tools() -> str:
    """Why Prometheus and Alertmanager cannot be had; empty when they can."""
    return _refusal([ROOT / "scripts" / "install_prometheus.sh"])


def write_rules(folder: Path, changes: Mapping[str, Any]) -> str:
    """Generate everything with the shipped settings, some of them changed; why not, if not."""
    folder.mkdir(parents=True)
    settings = folder / "settings.yaml"
    settings.write_text(yaml.safe_dump({**SHIPPED, **changes}))
    script = ROOT / "scripts" / "generate_dashboards.sh"
    return _refusal([script, "--settings", settings, "--out", folder / "generated"])


@contextlib.contextmanager
def running(folder: Path, metrics_port: int) -> Iterator[Chain]:
    """Judge this metrics page by the rules in ``folder/generated``, and listen."""
    prometheus_port, alertmanager_port = free_ports(2)
    with contextlib.ExitStack() as stack:
        taken, webhook_port = stack.enter_context(_listening())
        _write_routes(folder / "alertmanager.yml", webhook_port)
        _write_scrapes(folder, metrics_port, alertmanager_port)
        for command, port in (
            (_alertmanager(folder, alertmanager_port), alertmanager_port),
            (_prometheus(folder, prometheus_port), prometheus_port),
        ):
            stack.enter_context(_process(command, port, folder / f"{command[0]}.log"))
        url = f"http://127.0.0.1:{prometheus_port}"
        # Until it has found Alertmanager, it tells nobody, and again only a minute later.
        eventually(lambda: _alertmanagers(url))
        yield Chain(url, taken)


def eventually(condition: Callable[[], Any], seconds: float = START_SECONDS) -> Any:
    """The first true value; fails when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return value


def _refusal(command: Sequence[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    last = (done.stderr.strip() or "no reason given").splitlines()[-1]
    return "" if done.returncode == 0 else last


@contextlib.contextmanager
def _listening() -> Iterator[tuple[list[Taken], int]]:
    taken: list[Taken] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            notification = msgspec.json.decode(body, type=Notification)
            taken.append(Taken(self.path, notification))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield taken, server.server_port
        finally:
            server.shutdown()


def _write_routes(path: Path, webhook_port: int) -> None:
    """The shipped routes, to our receiver, and without waiting for company."""
    shipped = (DASHBOARDS / "alertmanager" / "alertmanager.yml").read_text()
    assert SHIPPED_WEBHOOK in shipped
    tree = yaml.safe_load(shipped.replace(SHIPPED_WEBHOOK, f"127.0.0.1:{webhook_port}"))
    for route in (tree["route"], *tree["route"]["routes"]):
        route.update(group_wait="1s", group_interval="1s")
    path.write_text(yaml.safe_dump(tree))


def _write_scrapes(folder: Path, metrics_port: int, alertmanager_port: int) -> None:
    def at(port: int) -> list[dict[str, list[str]]]:
        return [{"targets": [f"127.0.0.1:{port}"]}]

    tree = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(path) for path in sorted((folder / "generated").glob("*.rules.yaml"))],
        "scrape_configs": [{"job_name": "steerscope", "static_configs": at(metrics_port)}],
        "alerting": {"alertmanagers": [{"static_configs": at(alertmanager_port)}]},
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(tree))


def _prometheus(folder: Path, port: int) -> list[str]:
    return [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]


def _alertmanager(folder: Path, port: int) -> list[str]:
    return [
        "prometheus-alertmanager",
        f"--config.file={folder / 'alertmanager.yml'}",
        f"--storage.path={folder / 'alertmanager'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--cluster.listen-address=",
    ]


@contextlib.contextmanager
def _process(command: list[str], port: int, log: Path) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        eventually(lambda: _is_ready(port))
        yield
    finally:
        process.terminate()
        process.wait(10)


def _is_ready(port: int) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/-/ready", timeout=2).is_success
    return False


def _alertmanagers(url: str) -> list[Any]:
    reply = httpx.get(f"{url}/api/v1/alertmanagers", timeout=10).raise_for_status()
    found: list[Any] = reply.json()["data"]["activeAlertmanagers"]
    return found
