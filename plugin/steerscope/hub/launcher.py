"""Start a hub as a child process, and know when it serves. Called once per launch."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass

from steerscope import config
from steerscope.errors import HubError

START_TIMEOUT_SECONDS = 30.0
STOP_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RunningHub:
    """A hub that serves. ``endpoint`` is the folder of its sockets."""

    endpoint: str
    process: subprocess.Popen[str]
    grpc_port: int
    http_port: int

    def stop(self) -> None:
        """End the hub and remove its sockets."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.endpoint, ignore_errors=True)


def start_hub(settings: config.Settings) -> RunningHub:
    """Start a hub and wait until it serves; raise ``HubError`` with its own words if it cannot."""
    # Short on purpose: the path of a Unix socket may have 107 bytes. mkdtemp makes it 0700.
    endpoint = tempfile.mkdtemp(prefix="steerscope-")
    arguments = ["--endpoint", endpoint, "--parent-pid", str(os.getpid())]
    process = subprocess.Popen(
        [sys.executable, "-m", "steerscope.hub", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C in the terminal is for vLLM; the hub drains after it
    )
    try:
        ready = _handshake(process, settings)
    except HubError:
        process.kill()
        process.wait()
        shutil.rmtree(endpoint, ignore_errors=True)
        raise
    hub = RunningHub(endpoint, process, ready["grpc_port"], ready["http_port"])
    owner = os.getpid()
    atexit.register(lambda: hub.stop() if os.getpid() == owner else None)
    return hub


def _handshake(process: subprocess.Popen[str], settings: config.Settings) -> dict[str, int]:
    assert process.stdin is not None
    assert process.stdout is not None
    timer = threading.Timer(START_TIMEOUT_SECONDS, process.kill)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            json.dump(config.to_tree(settings), process.stdin)
            process.stdin.close()
        line = process.stdout.readline()
    finally:
        timer.cancel()
    try:
        told = json.loads(line)
    except ValueError:
        raise HubError(f"the hub did not start in {START_TIMEOUT_SECONDS:.0f} s") from None
    if not told["ready"]:
        raise HubError(f"the hub cannot start: {told['error']}")
    ready: dict[str, int] = told
    return ready
