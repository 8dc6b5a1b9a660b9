"""Frames in: the PULL socket that every worker pushes to, drained into the observer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import zmq

from steerscope.hub.protocol import frames_address
from steerscope.telemetry.frames import MAX_FRAME_BYTES
from steerscope.telemetry.observer import Observer

READ_AHEAD_MESSAGES = 32
"""Frames that wait in our memory; more wait in their worker's, which drops what is too much."""

EXPIRE_EVERY_SECONDS = 1.0


class FanIn:
    """Owns the PULL socket. One per hub, on the hub's loop.

    A frame that waited longer than ``max_wait_seconds`` for a hub that was there is shed, so that
    the newest are live.
    """

    def __init__(self, endpoint: str, observer: Observer, max_wait_seconds: float) -> None:
        self._observer = observer
        self._max_wait_ns = int(max_wait_seconds * 1e9)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, READ_AHEAD_MESSAGES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(frames_address(endpoint))

    async def run(self) -> None:
        """Feed the observer until cancelled.

        What waited while there was no hub has waited for this one from now on: it catches up.
        """
        loop, came = asyncio.get_running_loop(), asyncio.Event()
        began_ns = time.monotonic_ns()
        loop.add_reader(self._socket, came.set)
        try:
            while True:
                came.clear()
                for payload in self._waiting():
                    now_ns = time.monotonic_ns()
                    stale_ns = now_ns - self._max_wait_ns
                    self._observer.take(payload, now_ns, stale_ns if stale_ns > began_ns else 0)
                    await asyncio.sleep(0)  # a flood must not starve the other tasks
                await came.wait()
        finally:
            loop.remove_reader(self._socket)

    def _waiting(self) -> Iterator[bytes]:
        """Frames, until there is none: only then the socket tells of more."""
        while True:
            try:
                yield self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return

    async def expire(self) -> None:
        """Drop old reports, once a second, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRE_EVERY_SECONDS)
            self._observer.expire(time.monotonic_ns())

    def close(self) -> None:
        """Free the socket."""
        self._socket.close()
