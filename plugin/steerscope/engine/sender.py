"""The socket that frames leave a worker by."""

from __future__ import annotations

import contextlib
import functools
import os
import threading

import zmq

from steerscope.hub.protocol import frames_address
from steerscope.telemetry.frames import MAX_FRAME_BYTES

MAX_QUEUED_FRAMES = 1000
MAX_QUEUED_BYTES = 512 * 1024 * 1024
"""So much may wait for a hub, also one that is gone, before new frames are dropped."""


@functools.cache
def _frames_context() -> zmq.Context[zmq.Socket[bytes]]:
    """ZeroMQ for frames alone: its thread does not take the core of the thread that wakes it."""
    context = zmq.Context()
    if hasattr(os, "SCHED_BATCH"):  # Linux
        context.set(zmq.THREAD_SCHED_POLICY, os.SCHED_BATCH)
    return context


class FrameSender:
    """PUSH socket to the hub's fan-in. Nothing here blocks, and ``send`` never raises.

    What waits in the socket while there is no hub goes to the next one, in order. A thread that
    otherwise sleeps notices that a hub went away.

    Args:
        endpoint: folder of the hub's sockets.
        max_frame_bytes: what the activations of one frame can take.
    """

    def __init__(self, endpoint: str, max_frame_bytes: int) -> None:
        self._socket: zmq.Socket[bytes] = _frames_context().socket(zmq.PUSH)
        num_frames = min(MAX_QUEUED_BYTES // max_frame_bytes, MAX_QUEUED_FRAMES)
        self._socket.setsockopt(zmq.SNDHWM, max(num_frames, 1))  # 0 would be no limit
        self._socket.setsockopt(zmq.LINGER, 0)
        self._has_lost_hub = False
        partings: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        threading.Thread(
            target=self._watch, args=(partings,), name="steerscope-partings", daemon=True
        ).start()
        self._socket.connect(frames_address(endpoint))

    def has_lost_hub(self) -> bool:
        """Whether the hub went away since this was last asked."""
        is_lost = self._has_lost_hub
        if is_lost:
            self._has_lost_hub = False
        return is_lost

    def send(self, payload: bytes) -> bool:
        """Whether the frame was taken; the hub takes none that is larger than it allows."""
        if len(payload) > MAX_FRAME_BYTES:
            return False
        try:
            self._socket.send(payload, zmq.DONTWAIT)
        except zmq.ZMQError:
            return False
        return True

    def _watch(self, partings: zmq.Socket[bytes]) -> None:
        with contextlib.suppress(zmq.ContextTerminated):
            while partings.recv_multipart():
                self._has_lost_hub = True
