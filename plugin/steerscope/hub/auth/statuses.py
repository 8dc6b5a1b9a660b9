"""Refusals of callers as google.rpc statuses."""

from __future__ import annotations

from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from steerscope.hub.auth.denials import (
    AccessError,
    DeniedError,
    ExhaustedError,
    TimeUpError,
    UnauthenticatedError,
)

DOMAIN = "steerscope"

CODES: dict[type[AccessError], int] = {
    UnauthenticatedError: code_pb2.UNAUTHENTICATED,
    DeniedError: code_pb2.PERMISSION_DENIED,
    ExhaustedError: code_pb2.RESOURCE_EXHAUSTED,
    TimeUpError: code_pb2.DEADLINE_EXCEEDED,
}


def access_status(error: AccessError) -> status_pb2.Status:
    """The error's status: an ErrorInfo always, a RetryInfo where waiting helps."""
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if isinstance(error, ExhaustedError) and error.retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(retry)
    return status_pb2.Status(
        code=CODES[type(error)], message=str(error), details=map(_packed, details)
    )


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
