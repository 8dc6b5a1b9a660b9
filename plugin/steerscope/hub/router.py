"""A ROUTER socket of the hub's: many peers, typed messages to and from each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import msgspec
import zmq
import zmq.asyncio

Message = TypeVar("Message")

_log = logging.getLogger(__name__)


class Router(Generic[Message]):
    """On the hub's loop.

    Args:
        address: where it binds.
        kind: the union of what peers send.
        peer: what to call one of them in the log.
    """

    def __init__(self, address: str, kind: Any, peer: str) -> None:
        self._decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(kind)
        self._peer = peer
        self._socket = zmq.asyncio.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(address)

    async def run(self, take: Callable[[bytes, Message], Awaitable[None]]) -> None:
        """Hand on messages, each with its peer's identity, until cancelled.

        One that cannot be read is logged and dropped.
        """
        while True:
            parts = await self._socket.recv_multipart()
            try:
                identity, payload = parts
                message = self._decoder.decode(payload)
            except (ValueError, RecursionError, msgspec.MsgspecError) as error:
                _log.warning("malformed message from %s: %s", self._peer, error)
            else:
                await take(identity, message)
            await asyncio.sleep(0)  # a flood must not starve the other tasks

    async def send(self, identity: bytes, message: msgspec.Struct) -> None:
        """To one peer; lost if it is gone."""
        with contextlib.suppress(zmq.ZMQError):
            await self._socket.send_multipart([identity, msgspec.msgpack.encode(message)])

    def close(self) -> None:
        """Free the socket."""
        self._socket.close()
