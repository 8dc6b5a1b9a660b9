"""Errors as google.rpc statuses: one ErrorInfo always, a BadRequest where a field is to blame."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, TypeVar

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from steerscope.errors import SpecError, SteerscopeError
from steerscope.hub.policies import (
    PolicyChangedError,
    PolicyConflictError,
    PolicyLimitError,
    PolicyReadOnlyError,
)

DOMAIN = "steerscope"


class NotFoundError(SteerscopeError):
    """The resource named in a request does not exist."""


class _Kind(NamedTuple):
    code: int
    reason: str


_KINDS: dict[type[SteerscopeError], _Kind] = {
    SpecError: _Kind(code_pb2.INVALID_ARGUMENT, "INVALID_FIELD"),
    NotFoundError: _Kind(code_pb2.NOT_FOUND, "NOT_FOUND"),
    PolicyConflictError: _Kind(code_pb2.ALREADY_EXISTS, "POLICY_EXISTS"),
    PolicyReadOnlyError: _Kind(code_pb2.FAILED_PRECONDITION, "POLICY_READ_ONLY"),
    PolicyLimitError: _Kind(code_pb2.RESOURCE_EXHAUSTED, "TOO_MANY_POLICIES"),
    PolicyChangedError: _Kind(code_pb2.ABORTED, "ETAG_MISMATCH"),
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


def status(error: SteerscopeError) -> status_pb2.Status:
    """The error's status, with its details."""
    kind = next(kind for known, kind in _KINDS.items() if isinstance(error, known))
    details = [_packed(error_details_pb2.ErrorInfo(reason=kind.reason, domain=DOMAIN))]
    if isinstance(error, SpecError):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.reason
        )
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    return status_pb2.Status(code=kind.code, message=str(error), details=details)


def page(names: list[str], page_size: int, page_token: str) -> tuple[list[str], str]:
    """The page of sorted ``names`` after ``page_token``, and the token of the next one."""
    if page_size < 0:
        raise SpecError("page_size", f"must not be negative, got {page_size}")
    size = min(page_size or 50, 1000)
    later = [name for name in sorted(names) if name > page_token]
    return later[:size], later[size - 1] if len(later) > size else ""


def plain_name(name: str, collection: str) -> str:
    """``force-known`` of ``policies/force-known``; raises ``SpecError`` on anything else."""
    if not name.startswith(collection) or name == collection:
        raise SpecError("name", f"must be {collection}{{id}}, got {name[:80]!r}")
    return name.removeprefix(collection)


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
