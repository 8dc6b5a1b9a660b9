"""The headers of the HTTP request being served, carried to admission.

vLLM's API server tells the engine nothing of them. The middleware keeps them in a context variable
of the request's task, where admission finds them in the same process.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]
"""As ASGI has them."""

_Scope = MutableMapping[str, Any]
_App = Callable[[_Scope, Any, Any], Awaitable[None]]

_headers: ContextVar[Headers] = ContextVar("steerscope_headers", default=())


def current_headers() -> Headers:
    """The headers of the HTTP request that this task serves; none outside of one."""
    return _headers.get()


class HeadersMiddleware:
    """ASGI middleware: keeps each request's headers for as long as it is served."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: _Scope, receive: Any, send: Any) -> None:
        """See the ASGI specification."""
        if scope["type"] == "http":
            _headers.set(tuple(scope["headers"]))
        await self._app(scope, receive, send)
