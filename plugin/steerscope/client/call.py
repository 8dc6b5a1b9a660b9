"""A call before it is made: what is sent, how the answer is read, whether it may be repeated.

Both clients are made of the functions that return these (``*_calls.py``), and add only a
channel to them.
"""

from __future__ import annotations

import enum
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from steerscope.api.v1 import catalog_pb2_grpc, steering_pb2_grpc, telemetry_pb2_grpc
from steerscope.steering.traceparent import HEADER

DEADLINE_SECONDS: Final = 10.0
"""Of a unary call, its repetitions included."""
PAGE_SIZE: Final = 1000

Result = TypeVar("Result")
Item = TypeVar("Item")
Event = TypeVar("Event")
Method = TypeVar("Method", bound=Callable[..., Any])


class Unset(enum.Enum):
    """Not given, which is not the same as None."""

    UNSET = enum.auto()


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[Result]):
    """One unary call.

    Attributes:
        rpc: the method's name.
        request: what is sent.
        read: the result of an answer.
        is_repeatable: whether a second time changes nothing that the first did not.
        timeout: its deadline in seconds; None for the client's.
        hub_waits: seconds that the hub may take on purpose, added to the deadline.
    """

    rpc: str
    request: Message
    read: Callable[[Any], Result]
    is_repeatable: bool
    timeout: float | None
    hub_waits: float = 0.0

    def deadline(self, default: float) -> float:
        """Seconds that it may take."""
        return (default if self.timeout is None else self.timeout) + self.hub_waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing(Generic[Item]):
    """Calls for one page after the other; each may be repeated, and has a deadline of its own."""

    rpc: str
    request: Any
    items: Callable[[Any], Iterable[Item]]
    timeout: float | None

    def page(self, token: str) -> Call[tuple[list[Item], str]]:
        """The call for the page that the token stands for: its items, and the next token."""
        request = type(self.request)()
        request.CopyFrom(self.request)
        request.page_token = token
        return Call(
            rpc=self.rpc,
            request=request,
            read=lambda page: (list(self.items(page)), page.next_page_token),
            is_repeatable=True,
            timeout=self.timeout,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Watching(Generic[Event]):
    """A stream of events, each with a cursor to go on after it.

    Attributes:
        rpc: the method's name.
        request: what is sent; it has a field ``cursor``.
        event: the type of the events.
        has_beginning: without a cursor it begins with what there is, not with now.
    """

    rpc: str
    request: Any
    event: type[Event]
    has_beginning: bool = False


class Stubs:
    """Every method of the API on one channel, by its name."""

    def __init__(self, channel: Any) -> None:
        self._methods: dict[str, Any] = {
            **vars(catalog_pb2_grpc.CatalogServiceStub(channel)),
            **vars(steering_pb2_grpc.SteeringServiceStub(channel)),
            **vars(telemetry_pb2_grpc.TelemetryServiceStub(channel)),
        }

    def __getitem__(self, rpc: str) -> Any:
        return self._methods[rpc]


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """What names the trace that the call belongs to: that of the span which is active, if any.

    Whoever has one has imported OpenTelemetry's API; we import it for nobody else.
    """
    if "opentelemetry.trace" not in sys.modules:
        return ()
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(item for item in carrier.items() if item[0] == HEADER)


def described_as(build: Callable[..., object]) -> Callable[[Method], Method]:
    """Give a client's method the name, text and parameters of what it is made of."""

    def describe(method: Method) -> Method:
        signature = inspect.signature(build)
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        method.__name__ = build.__name__
        method.__doc__ = build.__doc__
        method.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[own, *signature.parameters.values()], return_annotation=signature.empty
        )
        return method

    return describe


def duration(seconds: float) -> Duration:
    """Seconds as the API has them."""
    made = Duration()
    made.FromNanoseconds(int(seconds * 1e9))
    return made
