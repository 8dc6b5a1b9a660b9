"""The hub's HTTP pages: metrics for Prometheus, health for probes, reports as JSON."""

from __future__ import annotations

import asyncio
import gzip
import math

from google.rpc import code_pb2
from prometheus_client.exposition import choose_encoder, gzip_accepted
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steerscope.hub.auth.denials import (
    AccessError,
    DeniedError,
    ExhaustedError,
    UnauthenticatedError,
)
from steerscope.hub.auth.directory import Shown
from steerscope.hub.auth.gate import Gate, Guard
from steerscope.hub.auth.statuses import CODES
from steerscope.hub.pages import HubPages
from steerscope.security import Scope

GZIP_LEVEL = 1
"""A page is a tenth already; more costs more than it saves."""
_HTTP_STATUS = {UnauthenticatedError: 401, DeniedError: 403, ExhaustedError: 429}


def application(pages: HubPages, guard: Guard, *, metrics_open: bool) -> Starlette:
    """The ASGI application; it runs on the hub's loop and owns nothing."""

    async def metrics(request: Request) -> Response:
        if not metrics_open:
            _admit(guard.gate, request, "/metrics")
        accept = request.headers.get("accept", "")
        _, content_type = choose_encoder(accept)
        headers = {"content-type": content_type, "vary": "accept, accept-encoding"}
        body = pages.metrics(accept)
        if gzip_accepted(request.headers.get("accept-encoding", "")):
            headers["content-encoding"] = "gzip"
            body = await asyncio.to_thread(gzip.compress, body, GZIP_LEVEL, mtime=0)
        return Response(body, headers=headers)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "problems": guard.problems})

    async def report(request: Request) -> Response:
        _admit(guard.gate, request, "/v1/steerscope/requests")
        external_id = request.path_params["request_id"]
        found = await pages.report(external_id, 0.0, activations=True)
        if found is None:
            message = f"no request {external_id[:80]!r} is known"
            return JSONResponse({"error": {"code": "NOT_FOUND", "message": message}}, 404)
        return Response(found, media_type="application/json")

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/health", health),
            Route("/v1/steerscope/requests/{request_id}", report),
        ],
        exception_handlers={AccessError: _refuse},
    )


def _admit(gate: Gate, request: Request, target: str) -> None:
    """Let in who may observe; over HTTP a caller is known by bearer token only."""
    headers = request.headers.getlist("authorization")
    if len(headers) > 1:
        raise UnauthenticatedError("MALFORMED_CREDENTIALS", "more than one authorization is given")
    peer = request.client.host if request.client else ""
    gate.admit(Shown(peer, headers[0] if headers else None), Scope.OBSERVE, target)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, AccessError)
    headers = {}
    if isinstance(error, UnauthenticatedError):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, ExhaustedError) and error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    code = code_pb2.Code.Name(CODES[type(error)])
    body = {"error": {"code": code, "reason": error.reason, "message": str(error)}}
    return JSONResponse(body, _HTTP_STATUS[type(error)], headers)
