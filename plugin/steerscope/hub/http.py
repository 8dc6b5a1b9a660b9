"""The hub's HTTP pages: /metrics, /health and a request's report as JSON."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steerscope.hub import reports
from steerscope.hub.reader import ReportReader
from steerscope.hub.refusals import RefusalError
from steerscope.hub.watch import MAX_WAIT_SECONDS


def app(registry: CollectorRegistry, reader: ReportReader) -> Starlette:
    """The pages; handlers run on the hub's loop."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def report(request: Request) -> Response:
        try:
            wait = _wait(request)
            message = await reader.read(request.path_params["request_id"], wait)
        except ValueError as error:
            return _error(400, "INVALID_FIELD", str(error))
        except RefusalError as error:
            return _error(404, error.reason, str(error))
        return JSONResponse(reports.as_json(message))

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/health", health),
            Route("/v1/steerscope/requests/{request_id:path}", report),
        ]
    )


def _wait(request: Request) -> float:
    text = request.query_params.get("wait", "0")
    try:
        wait = float(text)
    except ValueError:
        wait = math.nan
    if not 0.0 <= wait <= MAX_WAIT_SECONDS:
        raise ValueError(f"wait: must be between 0 and {MAX_WAIT_SECONDS:g} seconds, got {text!r}")
    return wait


def _error(status: int, reason: str, message: str) -> Response:
    return JSONResponse({"error": {"reason": reason, "message": message}}, status)
