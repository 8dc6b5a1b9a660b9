"""The HTTP request being served and its response, for admission and for reports.

vLLM's API server tells the engine nothing of the headers, and the engine nothing of ours to the
response. One ASGI middleware does both: it keeps each request's headers where admission finds them,
in a context variable of the request's task, and writes into the response the reports that admission
noted there.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]
"""As ASGI has them."""
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Any, Send], Awaitable[None]]
Report = Callable[[], Awaitable[bytes]]
"""A JSON object, in one line."""

RESPONSE_KEY = "steerscope"
"""Where a response holds its report."""

_DONE = b"data: [DONE]"
_LIKE_A_CHUNK = ("id", "object", "created", "model")


@dataclass(slots=True)
class Exchange:
    """One HTTP request; ``reports`` are to be fetched once its response is there."""

    headers: Headers = ()
    reports: list[Report] = field(default_factory=list)

    async def told(self) -> bytes:
        """The report; of several prompts in one request, all under ``reports``."""
        found = [await report() for report in self.reports]
        return found[0] if len(found) == 1 else b'{"reports":[' + b",".join(found) + b"]}"


_current: ContextVar[Exchange | None] = ContextVar("steerscope_exchange", default=None)


def current_exchange() -> Exchange | None:
    """The HTTP exchange that this task serves; None outside of one."""
    return _current.get()


def current_headers() -> Headers:
    """The headers of the HTTP request that this task serves; none outside of one."""
    exchange = _current.get()
    return exchange.headers if exchange is not None else ()


class ExchangeMiddleware:
    """ASGI middleware around vLLM's API server.

    Args:
        app: what it wraps.
        metrics: fetches our own metrics page, given what the scraper accepts; None where there
            is no such page.
    """

    def __init__(self, app: App, metrics: Callable[[str], Awaitable[bytes] | None]) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """See the ASGI specification."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(tuple(scope["headers"]))
        _current.set(exchange)
        if scope["path"].rstrip("/") == "/metrics" and scope["method"] == "GET":
            send = _Appended(send, self._metrics).send
        else:
            send = _Reported(send, exchange).send
        await self._app(scope, receive, send)


class _Held:
    """A response whose start waits for its whole body."""

    def __init__(self, start: Message) -> None:
        self._start = start
        self.body = bytearray()

    def content_type(self) -> str:
        return _content_type(self._start)

    async def release(self, send: Send, body: bytes) -> None:
        length = (b"content-length", str(len(body)).encode())
        kept = [(n, v) for n, v in self._start["headers"] if n.lower() != b"content-length"]
        await send({**self._start, "headers": [*kept, length]})
        await send({"type": "http.response.body", "body": body})


class _Reported:
    """Puts the reports into a response: a JSON object, or a stream of events."""

    def __init__(self, send: Send, exchange: Exchange) -> None:
        self._send = send
        self._exchange = exchange
        self._held: _Held | None = None
        self._streams = False
        self._last = b""
        self._is_told = False

    async def send(self, message: Message) -> None:
        """See the ASGI specification."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._held is not None:
            await self._hold(self._held, message)
        elif self._streams and self._exchange.reports and not self._is_told:
            await self._stream(message)
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        kind = _content_type(message)
        if kind == "application/json" and message["status"] == 200 and self._exchange.reports:
            self._held = _Held(message)
            return
        self._streams = kind == "text/event-stream"
        await self._send(message)

    async def _hold(self, held: _Held, message: Message) -> None:
        held.body += message.get("body", b"")
        if message.get("more_body", False):
            return
        await held.release(self._send, _with(bytes(held.body), await self._exchange.told()))

    async def _stream(self, message: Message) -> None:
        """The report goes before the end: as a chunk like that of the usage, or as an event."""
        body = message.get("body", b"")
        before, done, after = body.partition(_DONE)
        if not done and message.get("more_body", False):
            self._last = body or self._last
            await self._send(message)
            return
        self._is_told = True
        last = _data(before) or _data(self._last)
        told = await self._exchange.told()
        if done:
            chunk = {key: last[key] for key in _LIKE_A_CHUNK if key in last}
            event = _event(_with(json.dumps({**chunk, "choices": []}).encode(), told))
        else:
            event = f"event: {RESPONSE_KEY}\n".encode() + _event(told)
        await self._send({**message, "body": before + event + done + after})


class _Appended:
    """Adds our metrics to vLLM's own page."""

    def __init__(self, send: Send, metrics: Callable[[str], Awaitable[bytes] | None]) -> None:
        self._send = send
        self._metrics = metrics
        self._held: _Held | None = None

    async def send(self, message: Message) -> None:
        """See the ASGI specification."""
        if message["type"] == "http.response.start" and message["status"] == 200:
            self._held = _Held(message)
        elif self._held is None or message["type"] != "http.response.body":
            await self._send(message)
        else:
            self._held.body += message.get("body", b"")
            if not message.get("more_body", False):
                await self._held.release(self._send, await self._page(self._held))

    async def _page(self, held: _Held) -> bytes:
        asked = self._metrics(held.content_type())
        page, ours = bytes(held.body), await asked if asked is not None else b""
        # OpenMetrics has one end: ours, which has it if theirs has.
        return page.removesuffix(b"# EOF\n") + ours if ours else page


def _content_type(start: Message) -> str:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-type":
            found: str = value.decode("latin-1").partition(";")[0].strip().lower()
            return found
    return ""


def _data(events: bytes) -> dict[str, Any]:
    """The last JSON object among server-sent events; empty for none."""
    for line in reversed(events.splitlines()):
        if line.startswith(b"data: {"):
            found: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
            return found
    return {}


def _with(reply: bytes, report: bytes) -> bytes:
    """The JSON object ``reply`` with the report in it; what was there stays, byte for byte."""
    members = reply.rstrip().removesuffix(b"}")
    return b'%b,"%b":%b}' % (members, RESPONSE_KEY.encode(), report)


def _event(tree: bytes) -> bytes:
    return b"data: " + tree + b"\n\n"
