"""The client: our types in, the API's messages out, refusals as our errors."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Self

from steerscope.client import catalog_calls, policy_calls, request_calls, rule_calls
from steerscope.client.call import (
    DEADLINE_SECONDS,
    Call,
    Event,
    Item,
    Listing,
    Result,
    Stubs,
    Watching,
    described_as,
    trace_metadata,
)
from steerscope.client.channel import (
    NO_CREDENTIALS,
    RECONNECT,
    REPEATING,
    Credentials,
    open_channel,
)
from steerscope.client.refusals import our_errors
from steerscope.client.watch import Watch

P = ParamSpec("P")


def _calling(build: Callable[P, Call[Result]]) -> Callable[Concatenate[Client, P], Result]:
    @described_as(build)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return client.call(build(*args, **kwargs))

    return method


def _listing(build: Callable[P, Listing[Item]]) -> Callable[Concatenate[Client, P], list[Item]]:
    @described_as(build)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> list[Item]:
        return client.call_for_all(build(*args, **kwargs))

    return method


def _watching(
    build: Callable[P, Watching[Event]],
) -> Callable[Concatenate[Client, P], Watch[Event]]:
    @described_as(build)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Watch[Event]:
        return client.watch(build(*args, **kwargs))

    return method


class Client:
    """Talks to one hub.

    Methods raise ``SpecError`` where a field is refused, and ``CallError`` (a ``HubError``,
    whose ``__cause__`` is gRPC's own) for everything else. Calls that may be repeated are, for
    about three seconds, while the hub cannot be reached; watches go on by themselves. What each
    method takes is told by the function it is made of.

    Args:
        address: ``host:port`` of the hub's gRPC server.
        credentials: what proves who we are; none for a hub on loopback that asks for none.
        timeout: seconds that a call may take, where the call itself does not say.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials = NO_CREDENTIALS,
        *,
        timeout: float = DEADLINE_SECONDS,
    ) -> None:
        self._timeout = timeout
        self._channels = [
            open_channel(address, credentials, options) for options in (REPEATING, RECONNECT)
        ]
        self._repeating, self._once = map(Stubs, self._channels)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            channel.close()

    def call(self, call: Call[Result]) -> Result:
        """Make a call of ``*_calls.py``."""
        stubs = self._repeating if call.is_repeatable else self._once
        deadline = call.deadline(self._timeout)
        with our_errors():
            answer = stubs[call.rpc](call.request, timeout=deadline, metadata=trace_metadata())
        return call.read(answer)

    def call_for_all(self, listing: Listing[Item]) -> list[Item]:
        """The items of all pages."""
        found, token = self.call(listing.page(""))
        while token:
            items, token = self.call(listing.page(token))
            found += items
        return found

    def watch(self, watching: Watching[Event]) -> Watch[Event]:
        """Open a stream of events."""
        stub, metadata = self._once[watching.rpc], trace_metadata()
        return Watch(watching, lambda request: stub(request, metadata=metadata))

    get_catalog = _calling(catalog_calls.get_catalog)
    get_feature = _calling(catalog_calls.get_feature)
    list_features = _listing(catalog_calls.list_features)

    create_policy = _calling(policy_calls.create_policy)
    get_policy = _calling(policy_calls.get_policy)
    list_policies = _listing(policy_calls.list_policies)
    list_policy_revisions = _listing(policy_calls.list_policy_revisions)
    update_policy = _calling(policy_calls.update_policy)
    delete_policy = _calling(policy_calls.delete_policy)

    get_rules = _calling(rule_calls.get_rules)
    update_rules = _calling(rule_calls.update_rules)

    steer_request = _calling(request_calls.steer_request)
    release_request = _calling(request_calls.release_request)
    get_request_report = _calling(request_calls.get_request_report)
    watch_requests = _watching(request_calls.watch_requests)
    watch_signals = _watching(request_calls.watch_signals)
    watch_activations = _watching(request_calls.watch_activations)
