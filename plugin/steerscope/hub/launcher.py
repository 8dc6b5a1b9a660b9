"""Starts the hub beside a vLLM launch; see ``supervision`` for what becomes of it."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import msgspec

import steerscope
from steerscope import config
from steerscope.config import Settings
from steerscope.errors import HubError
from steerscope.hub.protocol import control_address
from steerscope.hub.supervision import HubProcess, RunningHub, Ways, end

READY_TIMEOUT_SECONDS = 30.0
MAX_IPC_PATH = 107
"""Longest path of a Unix socket on Linux."""

INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
"""All that the hub takes over of our environment, beside what ``state.redis.password_env``,
``otel.headers_env`` and ``canary.api_key_env`` name."""


def start_hub(settings: Settings, timeout: float = READY_TIMEOUT_SECONDS) -> RunningHub:
    """Start a hub and wait until it serves; raise ``HubError`` with its reason if it does not.

    It is started again should it end by itself. It ends for good when ``stop`` is called, when
    this process exits, or soon after it is killed.
    """
    endpoint = _private_folder()
    process = _spawn(endpoint, settings, 0)
    try:
        ready = _greet(process, settings, timeout)
    except BaseException:
        end(process)
        shutil.rmtree(endpoint, ignore_errors=True)
        raise
    ports = {"grpc_port": ready["grpc_port"], "http_port": ready["http_port"]}
    again = _on_ports(settings, **ports)
    ways = Ways(
        functools.partial(_spawn, endpoint, again),
        functools.partial(_greet, settings=again, timeout=timeout),
    )
    hub = RunningHub(endpoint, process, ways, **ports)
    atexit.register(hub.stop)
    return hub


def _on_ports(settings: Settings, grpc_port: int, http_port: int) -> Settings:
    """The settings with the ports that were found where any would do."""
    hub = settings.hub
    fixed = msgspec.structs.replace(
        hub,
        grpc_address=f"{hub.grpc_address.rpartition(':')[0]}:{grpc_port}",
        http_address=f"{hub.http_address.rpartition(':')[0]}:{http_port}",
    )
    return msgspec.structs.replace(settings, hub=fixed)


def _private_folder() -> str:
    """A new folder that only we can open, short enough for sockets in it."""
    for parent in (None, "/tmp"):
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix="steerscope-", dir=parent)
            if len(control_address(folder).removeprefix("ipc://").encode()) <= MAX_IPC_PATH:
                return folder
            os.rmdir(folder)
    raise HubError("there is no folder for temporary files whose path is short enough")


def _spawn(endpoint: str, settings: Settings, restarts: int) -> HubProcess:
    redis, otel = settings.state.redis, settings.otel
    canary = settings.canary
    secrets = [
        redis.password_env if redis else None,
        otel.headers_env if otel else None,
        canary.api_key_env if canary else None,
    ]
    names = [*INHERITED, *(name for name in secrets if name is not None)]
    environment = {name: os.environ[name] for name in names if name in os.environ}
    here = str(Path(steerscope.__file__).parent.parent)
    paths = [here, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-P", "-m", "steerscope.hub", "--config-json", "-"]
    command += ["--endpoint", endpoint, "--parent-pid", str(os.getpid())]
    return subprocess.Popen(
        [*command, "--restarts", str(restarts)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        process_group=0,  # Ctrl-C is for the launcher, which ends the hub last
    )


def _greet(process: HubProcess, settings: Settings, timeout: float) -> dict[str, Any]:
    """Give the hub its settings and read its one line."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(json.dumps(config.to_tree(settings)).encode())
    with process.stdout as stdout:
        line = _read_line(stdout, time.monotonic() + timeout)
    if line is None:
        raise HubError(f"the hub was not ready in {timeout:g} s")
    try:
        answer: dict[str, Any] = json.loads(line)
    except ValueError:
        raise HubError("the hub ended before it was ready; its log is on stderr") from None
    if not answer["ready"]:
        raise HubError(answer["error"])
    return answer


def _read_line(stream: IO[bytes], deadline: float) -> bytes | None:
    """What came until a newline or the end of the stream; None when time was up first."""
    received = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0.0)):
            chunk = os.read(stream.fileno(), 4096)
            received += chunk
            if not chunk or b"\n" in chunk:
                return received
    return None
