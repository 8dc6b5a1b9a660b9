"""State in Redis, shared by the hubs of a fleet.

Keys, all under the deployment's prefix: ``:format``, ``:mark`` and ``:rules`` (strings),
``:policies``, ``:answers`` (hashes) and ``:answer_times`` (a sorted set); ``:changed`` is a
channel. A change is one script, which does nothing unless the mark is still the one it was made
for.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Iterator
from types import MappingProxyType
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import redis.asyncio
from redis import exceptions
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from steerscope.hub.storage.documents import (
    EMPTY,
    MAX_REQUESTS,
    MICROSECONDS,
    REQUEST_SECONDS,
    Answered,
    Change,
    Snapshot,
    StaleStateError,
    StateAwayError,
    StateError,
    decode_answered,
    decode_document,
    decode_rules,
    encode,
    number,
)

FORMAT = "2"
READABLE = ("1", FORMAT)
"""The first one had no rules; a hub that knows only that must not take over any more."""
TIMEOUT_SECONDS = 2.0
"""For connecting, and for any answer."""

COMMIT = """
local prefix, base, mark, default = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
if (redis.call('GET', prefix .. ':mark') or default) ~= base then return 0 end
redis.call('SET', prefix .. ':format', ARGV[4])
local num_drop, num_put = tonumber(ARGV[5]), tonumber(ARGV[6])
if ARGV[7] ~= '' then redis.call('SET', prefix .. ':rules', ARGV[7]) end
local at = 8
for i = 1, num_drop do redis.call('HDEL', prefix .. ':policies', ARGV[at]); at = at + 1 end
for i = 1, num_put do
  redis.call('HSET', prefix .. ':policies', ARGV[at], ARGV[at + 1]); at = at + 2
end
if ARGV[at] then
  local answers, times = prefix .. ':answers', prefix .. ':answer_times'
  redis.call('HSET', answers, ARGV[at], ARGV[at + 1])
  redis.call('ZADD', times, ARGV[at + 2], ARGV[at])
  local old = redis.call('ZRANGEBYSCORE', times, '-inf', '(' .. ARGV[at + 3])
  for _, id in ipairs(old) do redis.call('HDEL', answers, id); redis.call('ZREM', times, id) end
  old = redis.call('ZRANGE', times, 0, -1 - tonumber(ARGV[at + 4]))
  for _, id in ipairs(old) do redis.call('HDEL', answers, id); redis.call('ZREM', times, id) end
end
redis.call('SET', prefix .. ':mark', mark)
redis.call('PUBLISH', prefix .. ':changed', mark)
return 1
"""

Result = TypeVar("Result")


class RedisStorage:
    """A ``PolicyStorage`` in the Redis at ``url``.

    Args:
        url: ``redis://`` or ``rediss://`` (TLS), with any options of redis-py's ``from_url``.
        prefix: of all keys; one per deployment.
        password: None for what the URL says.
    """

    def __init__(self, url: str, prefix: str, password: str | None = None) -> None:
        self._prefix = prefix
        parts = urlsplit(url)
        host = f"{parts.hostname}:{parts.port or 6379}"
        self._place = f"redis {host}{parts.path or '/0'} prefix {prefix!r}"
        given: dict[str, Any] = {} if password is None else {"password": password}
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url,
                socket_connect_timeout=TIMEOUT_SECONDS,
                socket_timeout=TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 0),  # a change sent twice would meet itself
                **given,
            )
        except (ValueError, TypeError) as error:
            raise StateError(f"state.redis.url: {error}") from None
        self._listening: PubSub | None = None

    @property
    def place(self) -> str:
        return self._place

    async def open(self) -> None:
        await self._mark()

    async def load(self, unless: str = "") -> Snapshot | None:
        if await self._mark() == unless:
            return None
        with self._told():
            async with self._redis.pipeline(transaction=True) as pipe:
                pipe.get(self._key("mark"))
                pipe.hgetall(self._key("policies"))
                pipe.get(self._key("rules"))
                kept, policies, rules = await self._answer(pipe.execute())
        mark = _text(kept) or EMPTY.mark
        number(mark)
        documents = {}
        for key, payload in policies.items():
            name = _text(key)
            documents[name] = decode_document(name, payload, self.place)
        return Snapshot(
            mark=mark,
            documents=MappingProxyType(documents),
            rules=None if rules is None else decode_rules(rules, self.place),
        )

    async def commit(self, base: Snapshot, change: Change) -> None:
        arguments: list[bytes | str | int] = [base.mark, change.mark, EMPTY.mark, FORMAT]
        arguments += [len(change.drop), len(change.put)]
        arguments += ["" if change.rules is None else encode(change.rules), *change.drop]
        for document in change.put:
            arguments += [document.name, encode(document)]
        if (answer := change.answered) is not None:
            oldest = answer.at - REQUEST_SECONDS * MICROSECONDS
            arguments += [answer.request_id, encode(answer), answer.at, oldest, MAX_REQUESTS]
        with self._told():
            script = self._redis.eval(COMMIT, 1, self._prefix, *arguments)
            done = await self._answer(cast("Awaitable[int]", script))
        if not done:
            raise StaleStateError(f"{self.place}: the state has changed")

    async def answered(self, request_id: str, since: int) -> Answered | None:
        with self._told():
            payload = await self._answer(
                cast("Awaitable[bytes | None]", self._redis.hget(self._key("answers"), request_id))
            )
        answer = None if payload is None else decode_answered(payload, self.place)
        return answer if answer is not None and answer.at >= since else None

    async def changes(self, seconds: float) -> None:
        try:
            with self._told():
                if self._listening is None:
                    self._listening = await self._listen()
                await self._listening.get_message(ignore_subscribe_messages=True, timeout=seconds)
        except StateError:  # the next look at the state will tell
            await self._hang_up()
            await asyncio.sleep(seconds)

    async def close(self) -> None:
        await self._hang_up()
        with contextlib.suppress(exceptions.RedisError, OSError):
            await self._redis.aclose()

    async def _mark(self) -> str:
        """The mark; a newer Steerscope may have taken over at any time."""
        with self._told():
            asked = self._redis.mget(self._key("format"), self._key("mark"))
            kept, mark = await self._answer(asked)
        if kept is not None and _text(kept) not in READABLE:
            raise StateError(
                f"{self.place}: format {_text(kept)[:20]!r} is of another Steerscope "
                f"(this one knows {FORMAT!r})"
            )
        return _text(mark) or EMPTY.mark

    async def _listen(self) -> PubSub:
        listening = self._redis.pubsub()
        await self._answer(listening.subscribe(self._key("changed")))
        return listening

    async def _hang_up(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            with contextlib.suppress(exceptions.RedisError, OSError):
                await listening.aclose()  # type: ignore[no-untyped-call]

    async def _answer(self, asked: Awaitable[Result]) -> Result:
        """The answer, in time: a server that stopped answering is away."""
        async with asyncio.timeout(2 * TIMEOUT_SECONDS):
            return await asked

    def _key(self, part: str) -> str:
        return f"{self._prefix}:{part}"

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Our errors for Redis's; what a wrong setting causes is not taken for absence."""
        try:
            yield
        except (exceptions.AuthenticationError, exceptions.NoPermissionError) as error:
            raise StateError(f"{self.place}: {error}") from None
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise StateAwayError(f"{self.place}: {error or type(error).__name__}") from None


def _text(kept: bytes | str | None) -> str:
    return kept.decode(errors="replace") if isinstance(kept, bytes) else kept or ""
