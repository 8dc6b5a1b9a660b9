"""The client for asyncio: the same calls as ``client.py``, awaited."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self

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
    open_async_channel,
)
from steerscope.client.refusals import our_errors
from steerscope.client.watch import AsyncWatch

P = ParamSpec("P")


def _calling(
    build: Callable[P, Call[Result]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, Result]]:
    @described_as(build)
    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return await client.call(build(*args, **kwargs))

    return method


def _listing(
    build: Callable[P, Listing[Item]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, list[Item]]]:
    @described_as(build)
    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> list[Item]:
        return await client.call_for_all(build(*args, **kwargs))

    return method


def _watching(
    build: Callable[P, Watching[Event]],
) -> Callable[Concatenate[AsyncClient, P], AsyncWatch[Event]]:
    @described_as(build)
    def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncWatch[Event]:
        return client.watch(build(*args, **kwargs))

    return method


class AsyncClient:
    """Talks to one hub; make it, use it and close it in one event loop. See ``Client``."""

    def __init__(
        self,
        address: str,
        credentials: Credentials = NO_CREDENTIALS,
        *,
        timeout: float = DEADLINE_SECONDS,
    ) -> None:
        self._timeout = timeout
        self._metadata = credentials.metadata
        self._channels = [
            open_async_channel(address, credentials, options) for options in (REPEATING, RECONNECT)
        ]
        self._repeating, self._once = map(Stubs, self._channels)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels:
            await channel.close(None)

    async def call(self, call: Call[Result]) -> Result:
        """Make a call of ``*_calls.py``."""
        stubs = self._repeating if call.is_repeatable else self._once
        deadline = call.deadline(self._timeout)
        metadata = (*self._metadata, *trace_metadata())
        with our_errors():
            answer = await stubs[call.rpc](call.request, timeout=deadline, metadata=metadata)
        return call.read(answer)

    async def call_for_all(self, listing: Listing[Item]) -> list[Item]:
        """The items of all pages."""
        found, token = await self.call(listing.page(""))
        while token:
            items, token = await self.call(listing.page(token))
            found += items
        return found

    def watch(self, watching: Watching[Event]) -> AsyncWatch[Event]:
        """A stream of events."""
        stub, metadata = self._once[watching.rpc], (*self._metadata, *trace_metadata())
        return AsyncWatch(watching, lambda request: stub(request, metadata=metadata))

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
