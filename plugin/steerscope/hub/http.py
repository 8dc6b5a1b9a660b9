"""The hub's HTTP pages: metrics for Prometheus, health for probes, reports as JSON."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from steerscope.catalog.model import ModelMatch
from steerscope.catalog.store import Catalog
from steerscope.hub.conversions import report_message
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.requests import RequestLedger


def application(
    catalog: Catalog,
    ledger: RequestLedger,
    asked: AskedLog,
    registry: CollectorRegistry,
    model_match: ModelMatch,
) -> Starlette:
    """The ASGI application; it runs on the hub's loop and owns nothing."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def report(request: Request) -> Response:
        external_id = request.path_params["request_id"]
        tracks = ledger.report(external_id)
        if not tracks:
            message = f"no request {external_id[:80]!r} is known"
            return JSONResponse({"error": {"code": "NOT_FOUND", "message": message}}, 404)
        digest = asked.digest(external_id)
        made = report_message(external_id, tracks, catalog, digest, model_match)
        tree = MessageToDict(
            made, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        return JSONResponse(tree)

    return Starlette(
        routes=[
            Route("/metrics", metrics),
            Route("/health", health),
            Route("/v1/steerscope/requests/{request_id}", report),
        ]
    )
