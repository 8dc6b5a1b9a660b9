"""Errors as google.rpc statuses: one ErrorInfo always, a BadRequest where a field is to blame."""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from steerscope.errors import SpecError, SteerscopeError
from steerscope.hub.audit.entries import AuditError
from steerscope.hub.auth.denials import AccessError
from steerscope.hub.auth.statuses import DOMAIN, access_status
from steerscope.hub.policies import (
    PolicyChangedError,
    PolicyConflictError,
    PolicyInUseError,
    PolicyLimitError,
    PolicyNotFoundError,
    PolicyReadOnlyError,
    RequestReusedError,
)
from steerscope.hub.storage.documents import StateError


class NotFoundError(SteerscopeError):
    """The resource named in a request does not exist."""


class SteeringDeclinedError(SteerscopeError):
    """An engine cannot steer the request as asked."""


class CursorLostError(SteerscopeError):
    """What followed a cursor is not known here, or not known any more."""


class _Kind(NamedTuple):
    code: int
    reason: str


_KINDS: dict[type[SteerscopeError], _Kind] = {
    SpecError: _Kind(code_pb2.INVALID_ARGUMENT, "INVALID_FIELD"),
    NotFoundError: _Kind(code_pb2.NOT_FOUND, "NOT_FOUND"),
    PolicyNotFoundError: _Kind(code_pb2.NOT_FOUND, "NOT_FOUND"),
    PolicyConflictError: _Kind(code_pb2.ALREADY_EXISTS, "POLICY_EXISTS"),
    PolicyReadOnlyError: _Kind(code_pb2.FAILED_PRECONDITION, "POLICY_READ_ONLY"),
    PolicyInUseError: _Kind(code_pb2.FAILED_PRECONDITION, "POLICY_IN_USE"),
    PolicyLimitError: _Kind(code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_POLICIES"),
    PolicyChangedError: _Kind(code_pb2.ABORTED, "ETAG_MISMATCH"),
    RequestReusedError: _Kind(code_pb2.ALREADY_EXISTS, "REQUEST_ID_REUSED"),
    SteeringDeclinedError: _Kind(code_pb2.FAILED_PRECONDITION, "STEERING_DECLINED"),
    CursorLostError: _Kind(code_pb2.OUT_OF_RANGE, "CURSOR_LOST"),
    AuditError: _Kind(code_pb2.UNAVAILABLE, "AUDIT_UNAVAILABLE"),
    StateError: _Kind(code_pb2.UNAVAILABLE, "STATE_UNAVAILABLE"),
}

Answer = TypeVar("Answer")


def refusing(
    method: Callable[..., Awaitable[Answer]],
) -> Callable[[Any, Any, Any], Awaitable[Answer]]:
    """Let an RPC method raise our errors; the caller gets their status."""

    @functools.wraps(method)
    async def answered(self: Any, request: Any, context: Any) -> Answer:
        try:
            return await method(self, request, context)
        except SteerscopeError as error:
            await context.abort_with_status(rpc_status.to_status(status(error)))
            raise AssertionError("abort raises") from error

    return answered


def refusing_stream(
    method: Callable[..., AsyncGenerator[Answer, None]],
) -> Callable[[Any, Any, Any], AsyncGenerator[Answer, None]]:
    """``refusing``, for an RPC method that answers with a stream."""

    @functools.wraps(method)
    async def answered(self: Any, request: Any, context: Any) -> AsyncGenerator[Answer, None]:
        try:
            async with aclosing(method(self, request, context)) as answers:
                async for answer in answers:
                    yield answer
        except SteerscopeError as error:
            await context.abort_with_status(rpc_status.to_status(status(error)))

    return answered


def status(error: SteerscopeError) -> status_pb2.Status:
    """The error's status, with its details."""
    if isinstance(error, AccessError):
        return access_status(error)
    kind = next(kind for known, kind in _KINDS.items() if isinstance(error, known))
    details = [_packed(error_details_pb2.ErrorInfo(reason=kind.reason, domain=DOMAIN))]
    if isinstance(error, SpecError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.reason
        )
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    return status_pb2.Status(code=kind.code, message=str(error), details=details)


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
