"""A hub that is started again when it ends without having been told to."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from steerscope.errors import HubError

FIRST_DELAY_SECONDS = 0.5
MAX_DELAY_SECONDS = 30.0
HEALTHY_SECONDS = 60.0
"""A hub that lived so long is started again at once; before that, delays double."""
STOP_TIMEOUT_SECONDS = 6.0

HubProcess = subprocess.Popen[bytes]

_log = logging.getLogger(__name__)


class Ways(NamedTuple):
    """How a hub is started: as a process that does not answer yet, and until it does."""

    spawn: Callable[[int], HubProcess]
    """Takes how many times the hub was started again."""
    greet: Callable[[HubProcess], object]
    """Raises ``HubError`` if it will not serve."""


class RunningHub:
    """A hub that answers, in the folder ``endpoint`` and on ports that it keeps.

    A daemon thread waits for its process to end, and starts the next one. A process that was
    forked from this one has no such thread, and must leave the hub alone.
    """

    def __init__(
        self, endpoint: str, process: HubProcess, ways: Ways, *, grpc_port: int, http_port: int
    ) -> None:
        self.endpoint = endpoint
        self.grpc_port = grpc_port
        self.http_port = http_port
        self.process = process
        """The newest; it may have ended, and the next not be there yet."""
        self.restarts = 0
        """How many times it was started again, in vain or not."""
        self._ways = ways
        self._owner = os.getpid()
        self._starting = threading.Lock()
        self._stopping = threading.Event()
        threading.Thread(target=self._supervise, name="steerscope-hub", daemon=True).start()

    @property
    def is_stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """End it for good, by force if need be, and remove its folder. May be called again."""
        if os.getpid() != self._owner:
            return
        with self._starting:
            self._stopping.set()
        end(self.process)
        shutil.rmtree(self.endpoint, ignore_errors=True)

    def _supervise(self) -> None:
        delay, began = FIRST_DELAY_SECONDS, time.monotonic()
        while True:
            status = self.process.wait()
            if self._stopping.is_set():
                return
            if time.monotonic() - began >= HEALTHY_SECONDS:
                delay = FIRST_DELAY_SECONDS
            _log.error("the hub ended (%s); starting it again in %g s", _told(status), delay)
            if self._stopping.wait(delay):
                return
            delay, began = min(2 * delay, MAX_DELAY_SECONDS), time.monotonic()
            self._start_again()

    def _start_again(self) -> None:
        try:
            with self._starting:
                if self._stopping.is_set():
                    return
                self.restarts += 1
                self.process = self._ways.spawn(self.restarts)
            self._ways.greet(self.process)
        except (HubError, OSError) as error:
            end(self.process)
            if not self._stopping.is_set():
                _log.error("the hub could not be started again: %s", error)
        else:
            _log.warning("the hub was started again, for the %d. time", self.restarts)


def end(process: HubProcess) -> None:
    """Ask the process to end; kill it if it does not."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _told(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
