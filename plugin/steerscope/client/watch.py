"""Streams of events that go on by themselves when the hub was away for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Final, Generic, Self

import grpc

from steerscope.client.call import Event, Watching
from steerscope.client.refusals import converted

ATTEMPTS: Final = 8
"""How often a stream is opened in vain, one time after the other, before that is an error."""
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 2.0


class Resumption(Generic[Event]):
    """Where a watch is, and whether it goes on after a failure.

    Attributes:
        missed: events that the hub says it dropped for us, so far.
        gaps: how often it had to begin anew without a cursor, so that nobody knows how many
            events were missed: the hub was restarted, or nothing had been received yet.
        cursor: of the last event received.
    """

    def __init__(self, watching: Watching[Event]) -> None:
        self._watching = watching
        self._failures = 0
        self.missed = 0
        self.gaps = 0
        self.cursor: str = watching.request.cursor

    def request(self) -> Any:
        """What is sent to open the stream, the first time or again."""
        request = type(self._watching.request)()
        request.CopyFrom(self._watching.request)
        request.cursor = self.cursor
        return request

    def received(self, event: Any) -> None:
        """Take note of an event."""
        self._failures = 0
        self.missed += event.missed
        self.cursor = event.cursor

    def failed(self, error: Any) -> float:
        """Seconds after which to open the stream again; raises the error if that is no use."""
        forgotten = error.code() is grpc.StatusCode.OUT_OF_RANGE and self._has_gone_on()
        if not forgotten and error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise converted(error) from error
        self._failures += 1
        if self._failures >= ATTEMPTS:
            raise converted(error) from error
        if forgotten:
            self.cursor = ""
        if not self.cursor and not self._watching.has_beginning:
            self.gaps += self._failures == 1 or forgotten
        return float(min(FIRST_PAUSE_SECONDS * 2 ** (self._failures - 1), LONGEST_PAUSE_SECONDS))

    def _has_gone_on(self) -> bool:
        """Whether the cursor is of an event of this watch, and another beginning makes sense."""
        asked = self._watching.request.cursor
        return self.cursor != asked and not self._watching.has_beginning


class _Told(Generic[Event]):
    """What both kinds of watch tell of themselves."""

    _resumption: Resumption[Event]

    @property
    def missed(self) -> int:
        """Events that the hub dropped because we were too slow, so far."""
        return self._resumption.missed

    @property
    def gaps(self) -> int:
        """How often an unknown number of events was missed: the hub was restarted, say."""
        return self._resumption.gaps

    @property
    def cursor(self) -> str:
        """Of the last event; with it another watch goes on after that."""
        return self._resumption.cursor


class Watch(_Told[Event], Iterator[Event]):
    """Events one by one; the stream is open once it is made. Close it to stop.

    Where the hub is away it tries again for some seconds and goes on after the last event.
    """

    def __init__(self, watching: Watching[Event], connect: Callable[[Any], Any]) -> None:
        self._resumption = Resumption(watching)
        self._connect = connect
        self._closed = False
        self._stream: Any = None
        self._open(0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream."""
        self._closed = True
        self._stream.cancel()

    def __next__(self) -> Event:
        while not self._closed:
            try:
                event: Event = next(self._stream)
            except grpc.RpcError as error:
                if self._closed:
                    break
                self._open(self._resumption.failed(error))
            else:
                self._resumption.received(event)
                return event
        raise StopIteration

    def _open(self, pause: float) -> None:
        while True:
            time.sleep(pause)
            self._stream = stream = self._connect(self._resumption.request())
            stream.initial_metadata()
            if stream.is_active() or stream.code() is grpc.StatusCode.OK:
                return
            pause = self._resumption.failed(stream)


class AsyncWatch(_Told[Event], AsyncIterator[Event]):
    """Events one by one, as ``Watch`` has them.

    The stream opens at the first event asked for, or at the beginning of ``async with``.
    """

    def __init__(self, watching: Watching[Event], connect: Callable[[Any], Any]) -> None:
        self._resumption = Resumption(watching)
        self._connect = connect
        self._closed = False
        self._stream: Any = None

    async def __aenter__(self) -> Self:
        await self._open(0.0)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream."""
        self._closed = True
        if self._stream is not None:
            self._stream.cancel()

    async def __anext__(self) -> Event:
        if self._stream is None:
            await self._open(0.0)
        while not self._closed:
            try:
                event: Any = await self._stream.read()
            except grpc.aio.AioRpcError as error:
                await self._open(self._resumption.failed(error))
            except asyncio.CancelledError:
                if self._closed:  # by us, not the task
                    break
                raise
            else:
                if event is grpc.aio.EOF:  # type: ignore[attr-defined]
                    break
                self._resumption.received(event)
                found: Event = event
                return found
        raise StopAsyncIteration

    async def _open(self, pause: float) -> None:
        while not self._closed:
            await asyncio.sleep(pause)
            self._stream = self._connect(self._resumption.request())
            try:
                await self._stream.initial_metadata()
                await self._stream.wait_for_connection()  # raises what ended it, if anything did
            except grpc.aio.AioRpcError as error:
                pause = self._resumption.failed(error)
            else:
                return
