"""The hub's google.rpc statuses as our own errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from steerscope.errors import HubError, SpecError, SteerscopeError, UnknownFeatureError


class CallError(HubError):
    """A call failed for another reason than a bad field.

    Attributes:
        code: the gRPC status code, e.g. ``grpc.StatusCode.NOT_FOUND``.
        reason: the hub's ErrorInfo reason, e.g. ``POLICY_NOT_FOUND``; empty when the
            hub was not reached.
    """

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason


@contextmanager
def translated() -> Iterator[None]:
    """Raise a ``SpecError`` for a bad field, and a ``CallError`` for all else that gRPC raises."""
    try:
        yield
    except grpc.RpcError as error:
        raise _translate(error) from None


def _translate(error: grpc.RpcError) -> SteerscopeError:
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(bad_request)
    for violation in bad_request.field_violations:
        refused = UnknownFeatureError if info.reason == "UNKNOWN_FEATURE" else SpecError
        return refused(violation.field, violation.description)
    return CallError(error.code(), info.reason, error.details() or error.code().name)
