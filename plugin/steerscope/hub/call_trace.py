"""The trace that an RPC belongs to, where its caller shows one (W3C trace context).

The audit log and the log lines of refusals name it. What is malformed is no trace, as the
specification says, and the call goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextvars import ContextVar

from steerscope.steering import traceparent

_current: ContextVar[str] = ContextVar("steerscope_trace_id", default="")


def current_trace_id() -> str:
    """Of the call that this task serves, in hexadecimal; empty for none, and outside of calls."""
    return _current.get()


def enter(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """The task serves a call with that metadata from here on."""
    shown = dict(metadata).get(traceparent.HEADER)  # gRPC itself keeps one of several
    found = traceparent.parse(shown) if isinstance(shown, str) else None
    _current.set(found.trace_id if found is not None else "")
