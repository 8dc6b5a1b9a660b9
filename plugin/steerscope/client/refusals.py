"""What the hub answers instead of a result, as our errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from steerscope.errors import HubError, SpecError


class CallError(HubError):
    """A call was refused, or did not reach the hub; its ``__cause__`` is gRPC's error.

    Attributes:
        code: the status.
        reason: the hub's own word for it, e.g. ``ETAG_MISMATCH``; empty where it gave none.
    """

    def __init__(self, code: grpc.StatusCode, reason: str, message: str) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.reason = reason


@contextlib.contextmanager
def our_errors() -> Iterator[None]:
    """Raise gRPC's errors as ours."""
    try:
        yield
    except grpc.RpcError as error:
        raise converted(error) from error


def converted(error: Any) -> SpecError | CallError:
    """``SpecError`` where the hub names a field, ``CallError`` for everything else."""
    reason = ""
    for detail in _details(error):
        bad, info = error_details_pb2.BadRequest(), error_details_pb2.ErrorInfo()
        if detail.Unpack(bad) and bad.field_violations:
            violation = bad.field_violations[0]
            return SpecError(violation.field, violation.description)
        if detail.Unpack(info):
            reason = info.reason
    return CallError(error.code(), reason, error.details() or "")


def _details(error: Any) -> Any:
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # the details are of another status: somebody between us and the hub
        return ()
    return status.details if status is not None else ()
