"""The embedded model behind a real vLLM server, on free ports, for as long as it is needed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from steerscope.cli import serve
from steerscope.config import CONFIG_ENV
from steerscope.demo.paths import CATALOG_DIR, MODEL_DIR
from steerscope.errors import HubError

MODEL_NAME: Final = "steerscope-demo"

SETTINGS: Final[Mapping[str, str]] = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
"""Environment of whatever runs the embedded model: a small KV cache, no phoning home."""

SERVER_SETTINGS: Final[Mapping[str, str]] = {
    **SETTINGS,
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
}
"""Environment of the server: on few cores, no process may wait by spinning. vLLM's engine core
and its worker do so for each other, up to a second at a time, which starves whatever else there
is (docs/measurements.md); so the worker is in the core's process, and has one thread, which this
model cannot keep busy."""

BASE_URL: Final = "{base_url}"

OWN_PORTS = (10_000, 32_000)
"""Below the range that Linux takes its own picks from."""
START_TIMEOUT_SECONDS: Final = 300.0
STOP_TIMEOUT_SECONDS: Final = 30.0
FOLLOW_TIMEOUT_SECONDS: Final = 5.0


@dataclass(frozen=True, slots=True)
class DemoServer:
    """Where a running server is reached."""

    http_port: int
    grpc_port: int
    metrics_port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def base_url(self) -> str:
        """vLLM's root, without the API version."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        """The hub's control plane."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """The hub's Prometheus page."""
        return f"http://127.0.0.1:{self.metrics_port}/metrics"

    def metrics(self) -> str:
        """The page's text."""
        with urllib.request.urlopen(self.metrics_url, timeout=10) as response:
            text: str = response.read().decode()
        return text

    def vllm_config(self) -> dict[str, Any]:
        """vLLM's own account of its config (needs VLLM_SERVER_DEV_MODE)."""
        url = f"{self.base_url}/server_info?config_format=json"
        with urllib.request.urlopen(url, timeout=10) as response:
            info: dict[str, Any] = json.load(response)
        config: dict[str, Any] = info["vllm_config"]
        return config


def vllm_arguments(port: int) -> list[str]:
    """What vLLM is started with: nothing but the model, its address and its precision."""
    return [
        *("--model", str(MODEL_DIR)),
        *("--served-model-name", MODEL_NAME),
        *("--dtype", "float32"),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
    ]


@contextlib.contextmanager
def running(
    folder: Path,
    *,
    extra_arguments: tuple[str, ...] = (),
    with_steerscope: bool = True,
    environment: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[DemoServer]:
    """Start the server with its logs in ``folder``, wait until it answers, stop it at the end.

    ``settings`` are trees of Steerscope's config beside the demo's own; ``{base_url}`` in them
    stands for the server's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    http_port, grpc_port, metrics_port = free_ports(3)
    config = folder / "steerscope.yaml"
    text = yaml.safe_dump(_config(grpc_port, metrics_port, settings or {}))
    config.write_text(text.replace(BASE_URL, f"http://127.0.0.1:{http_port}"))
    variables = {**os.environ, **SERVER_SETTINGS, "VLLM_SERVER_DEV_MODE": "1"}
    variables |= environment or {}
    variables.pop(CONFIG_ENV, None)
    if with_steerscope:
        variables[CONFIG_ENV] = str(config)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            serve.command([*vllm_arguments(http_port), *extra_arguments]),
            env=variables,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    server = DemoServer(http_port, grpc_port, metrics_port, process, log)
    try:
        _wait(server)
        yield server
    finally:
        _stop(process)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, of those that the system gives to nobody by itself.

    They are used only later, so none may be picked that an outgoing connection, or another
    process asking the system for any port, is likely to get meanwhile.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(*OWN_PORTS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


def _config(grpc_port: int, metrics_port: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **settings,
        "catalog": str(CATALOG_DIR),
        "hub": {
            "grpc_address": f"127.0.0.1:{grpc_port}",
            "http_address": f"127.0.0.1:{metrics_port}",
        },
    }


def _wait(server: DemoServer) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            tail = server.log.read_text(errors="replace")[-3000:]
            raise HubError(f"the server ended with code {server.process.returncode}:\n{tail}")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{server.base_url}/health", timeout=2).close()
            return
        time.sleep(0.05)
    raise HubError(f"the server did not answer in {START_TIMEOUT_SECONDS:.0f} s; see {server.log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server; its children follow by themselves, or are made to."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_SECONDS)
    deadline = time.monotonic() + FOLLOW_TIMEOUT_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
