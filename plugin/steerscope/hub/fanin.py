"""Frames in: the PULL socket that every worker pushes to, drained into the observer."""

from __future__ import annotations

import asyncio
import time

import zmq
import zmq.asyncio

from steerscope.hub.protocol import frames_address
from steerscope.telemetry.observer import Observer

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""A larger message is refused by the socket before it is read."""

EXPIRE_EVERY_SECONDS = 1.0


class FanIn:
    """Owns the PULL socket. One per hub, on the hub's loop."""

    def __init__(self, endpoint: str, observer: Observer) -> None:
        self._observer = observer
        self._socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(frames_address(endpoint))

    async def run(self) -> None:
        """Feed the observer until cancelled."""
        while True:
            self._observer.take(await self._socket.recv(), time.monotonic_ns())
            await asyncio.sleep(0)  # a flood must not starve the other tasks

    async def expire(self) -> None:
        """Drop old reports, once a second, until cancelled."""
        while True:
            await asyncio.sleep(EXPIRE_EVERY_SECONDS)
            self._observer.expire(time.monotonic_ns())

    def close(self) -> None:
        """Free the socket."""
        self._socket.close()
