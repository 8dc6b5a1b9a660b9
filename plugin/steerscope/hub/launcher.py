"""Starts the hub beside a vLLM launch, and stops it with it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import steerscope
from steerscope import config
from steerscope.config import Settings
from steerscope.errors import HubError
from steerscope.hub.protocol import control_address

READY_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 6.0
MAX_IPC_PATH = 107
"""Longest path of a Unix socket on Linux."""

INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONPATH")
"""All that the hub takes over of our environment, beside ``state.redis.password_env``."""


@dataclass(frozen=True, slots=True)
class RunningHub:
    """A hub that answers. ``endpoint`` is the folder of its sockets."""

    endpoint: str
    process: subprocess.Popen[bytes]
    grpc_port: int
    http_port: int

    def stop(self) -> None:
        """End the process, by force if need be, and remove its folder. May be called again."""
        _end(self.process)
        shutil.rmtree(self.endpoint, ignore_errors=True)


def start_hub(settings: Settings, timeout: float = READY_TIMEOUT_SECONDS) -> RunningHub:
    """Start a hub and wait until it serves; raise ``HubError`` with its reason if it does not.

    It ends when ``stop`` is called, when this process exits, or soon after it is killed.
    """
    endpoint = _private_folder()
    process = _spawn(endpoint, settings)
    try:
        ready = _greet(process, settings, timeout)
    except BaseException:
        _end(process)
        shutil.rmtree(endpoint, ignore_errors=True)
        raise
    hub = RunningHub(endpoint, process, ready["grpc_port"], ready["http_port"])
    owner = os.getpid()
    atexit.register(lambda: hub.stop() if os.getpid() == owner else None)
    return hub


def _private_folder() -> str:
    """A new folder that only we can open, short enough for sockets in it."""
    for parent in (None, "/tmp"):
        with contextlib.suppress(OSError):
            folder = tempfile.mkdtemp(prefix="steerscope-", dir=parent)
            if len(control_address(folder).removeprefix("ipc://").encode()) <= MAX_IPC_PATH:
                return folder
            os.rmdir(folder)
    raise HubError("there is no folder for temporary files whose path is short enough")


def _spawn(endpoint: str, settings: Settings) -> subprocess.Popen[bytes]:
    redis = settings.state.redis
    secret = () if redis is None or redis.password_env is None else (redis.password_env,)
    names = (*INHERITED, *secret)
    environment = {name: os.environ[name] for name in names if name in os.environ}
    here = str(Path(steerscope.__file__).parent.parent)
    paths = [here, *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-P", "-m", "steerscope.hub", "--config-json", "-"]
    return subprocess.Popen(
        [*command, "--endpoint", endpoint, "--parent-pid", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _greet(process: subprocess.Popen[bytes], settings: Settings, timeout: float) -> dict[str, Any]:
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


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
