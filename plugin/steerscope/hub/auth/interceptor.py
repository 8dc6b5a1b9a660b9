"""Every RPC goes through the gate before its service sees it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from grpc_status import rpc_status

from steerscope.hub import call_trace
from steerscope.hub.auth import identity as callers
from steerscope.hub.auth.denials import AccessError, TimeUpError
from steerscope.hub.auth.directory import shown_over_grpc
from steerscope.hub.auth.gate import Gate
from steerscope.hub.auth.scopes import REQUIRED, is_open
from steerscope.hub.auth.statuses import access_status
from steerscope.security import Identity

MAX_UNARY_SECONDS = 60.0
"""A unary call ends by then, whatever deadline its caller set, or none."""

_MAKERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Wraps each method found, so that it runs as its caller or not at all."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        """The guarded handler; None when there is no such method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        call = _Call(self._gate, handler_call_details.method, handler)
        make = _MAKERS[handler.request_streaming, handler.response_streaming]
        return make(
            call.stream if handler.response_streaming else call.unary,
            handler.request_deserializer,
            handler.response_serializer,
        )


class _Call:
    """One call of one method."""

    def __init__(self, gate: Gate, method: str, handler: Any) -> None:
        self._gate = gate
        self._method = method
        self._serve = (
            handler.unary_unary
            or handler.unary_stream
            or handler.stream_unary
            or handler.stream_stream
        )

    async def unary(self, request: Any, context: Any) -> Any:
        """Serve it if the caller may, in time."""
        async with _refusing(context):
            self._admit(context)
            async with _in_time():
                return await self._serve(request, context)

    async def stream(self, request: Any, context: Any) -> None:
        """Serve it if the caller may, for as long as they may."""
        async with _refusing(context):
            caller = self._admit(context)
            with self._gate.limits.stream(caller, context.peer()):
                if asyncio.iscoroutinefunction(self._serve):
                    await self._serve(request, context)
                    return
                async with contextlib.aclosing(self._serve(request, context)) as messages:
                    async for message in messages:
                        self._gate.check_still(caller)
                        await context.write(message)

    def _admit(self, context: Any) -> Identity:
        metadata = context.invocation_metadata() or ()
        call_trace.enter(metadata)
        if is_open(self._method):
            caller = self._gate.directory.nobody
        else:
            shown = shown_over_grpc(context.peer(), metadata, context.auth_context())
            caller = self._gate.admit(shown, REQUIRED.get(self._method), self._method)
        callers.enter(caller)
        return caller


@contextlib.asynccontextmanager
async def _refusing(context: Any) -> AsyncIterator[None]:
    """Give the caller the status of what they are refused for."""
    try:
        yield
    except AccessError as error:
        await context.abort_with_status(rpc_status.to_status(access_status(error)))


@contextlib.asynccontextmanager
async def _in_time() -> AsyncIterator[None]:
    """End the call when its time is up."""
    limit = asyncio.timeout(MAX_UNARY_SECONDS)
    try:
        async with limit:
            yield
    except TimeoutError:
        if limit.expired():
            raise TimeUpError("CALL_TOO_LONG", f"a call may take {MAX_UNARY_SECONDS:g} s") from None
        raise
