"""``GET /v1/steerscope/requests/{request_id}`` on vLLM's own port: a request's report as JSON.

An endpoint plugin of vLLM's (``vllm.plugins.endpoint_plugins.interface``). Routes are attached
inside vLLM's own middleware, so ``--api-key`` guards ours as it guards all of ``/v1``. Beside that
it takes what the hub's own page takes (``security``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from steerscope.errors import HubError
from steerscope.hub.auth.denials import UnauthenticatedError

if TYPE_CHECKING:
    from steerscope.steering.frontend import FrontEnd

PATH: Final = "/v1/steerscope/requests/{request_id}"
_NO_STORE: Final = {"cache-control": "no-store"}


class ReportRoute:
    """One per API server.

    Args:
        is_configured: whether this process serves with Steerscope; if not, there is no route.
        front_end_of: our half of the front end that a client of vLLM's engine belongs to.
    """

    name = "steerscope"
    required_tasks = ("generate",)

    def __init__(self, is_configured: bool, front_end_of: Callable[[Any], FrontEnd | None]) -> None:
        self._is_configured = is_configured
        self._front_end_of = front_end_of
        self._front_end: FrontEnd | None = None

    def attach_router(self, app: Any) -> None:
        """Called once, with the FastAPI application."""
        if self._is_configured:
            app.add_api_route(PATH, self.report, methods=["GET"], tags=["steerscope"])

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Called once, when the engine can be reached, before any request."""
        if self._is_configured:
            self._front_end = self._front_end_of(engine_client)

    async def report(self, request_id: str, request: Request) -> Response:
        """What was seen and done in a request, by the id in its response."""
        if self._front_end is None:
            return _error(503, "ServiceUnavailableError", "steerscope does not serve this engine")
        try:
            found = await self._front_end.report(request_id, tuple(request.headers.raw))
        except UnauthenticatedError as error:
            return _error(401, "AuthenticationError", str(error), {"www-authenticate": "Bearer"})
        except HubError as error:
            return _error(503, "ServiceUnavailableError", str(error))
        if found is None:
            return _error(404, "NotFoundError", f"no request {request_id[:80]!r} is known")
        return Response(found, headers=_NO_STORE, media_type="application/json")


def _error(
    status: int, kind: str, message: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    """An error in the shape of vLLM's own."""
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)
