"""Wakes a thread that waits for its sockets, from any other, without a lock.

A ZeroMQ socket belongs to one thread; who has something for it to send leaves it in a queue and
rings. Between rings the thread sleeps: where vLLM's engine shares the process, one that looked in
every few milliseconds would take the interpreter from it each time.
"""

from __future__ import annotations

import math
import os
import weakref

import zmq


class Doorbell:
    """A pipe that a poller can watch."""

    def __init__(self) -> None:
        self._inside, self._outside = os.pipe()
        for end in (self._inside, self._outside):
            os.set_blocking(end, False)
            weakref.finalize(self, os.close, end).atexit = False  # the thread may be waiting then
        self._is_rung = False
        self._poller = zmq.Poller()
        self._poller.register(self._inside, zmq.POLLIN)

    def watch(self, socket: zmq.Socket[bytes]) -> None:
        """What comes for the socket wakes the thread too; for the thread itself to call."""
        self._poller.register(socket, zmq.POLLIN)

    def ring(self) -> None:
        """Wake the thread, if nobody has yet. What it shall find is in its queue already."""
        if not self._is_rung:
            self._is_rung = True
            os.write(self._outside, b"!")

    def wait(self, seconds: float) -> None:
        """Until somebody rings, something comes for a socket, or so much time is over."""
        awake = dict(self._poller.poll(math.ceil(max(seconds, 0.0) * 1000)))
        if self._inside in awake:
            # In this order: who rings between the two has left what the thread looks at next.
            os.read(self._inside, 4096)
            self._is_rung = False


def has_message(socket: zmq.Socket[bytes]) -> bool:
    """Whether ``recv`` would return at once."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
