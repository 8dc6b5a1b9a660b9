"""How much a caller may ask: token buckets and streams, in memory that is bounded."""

from __future__ import annotations

import contextlib
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from urllib.parse import unquote

from steerscope.hub.auth.denials import ExhaustedError, UnauthenticatedError
from steerscope.security import ANONYMOUS, Identity, Rate

MAX_CALLERS = 4096
"""Callers remembered at most, by name or by network; the one unseen longest is forgotten."""
FAILURES = Rate(requests_per_second=10.0, burst=200)
"""Failed authentications of one network: beyond these they are neither told apart nor logged."""

Clock = Callable[[], float]


class Usage:
    """What one caller has used."""

    __slots__ = ("_at", "_spent", "streams")

    def __init__(self) -> None:
        self._spent = 0.0
        self._at = 0.0
        self.streams = 0

    def take(self, rate: Rate, now: float) -> float:
        """Use one token; 0, or the seconds until there is one again."""
        spent = max(self._spent - (now - self._at) * rate.requests_per_second, 0.0)
        self._at = now
        allowed = spent + 1.0 <= rate.burst
        self._spent = spent + 1.0 if allowed else spent
        return 0.0 if allowed else (spent + 1.0 - rate.burst) / rate.requests_per_second


class Callers:
    """Usage by key, of the ``MAX_CALLERS`` seen last."""

    def __init__(self) -> None:
        self._usage: OrderedDict[str, Usage] = OrderedDict()

    def __len__(self) -> int:
        return len(self._usage)

    def of(self, key: str) -> Usage:
        """The caller's usage, new when it is not known (any more)."""
        usage = self._usage.setdefault(key, Usage())
        self._usage.move_to_end(key)
        if len(self._usage) > MAX_CALLERS:
            self._usage.popitem(last=False)
        return usage


class Limits:
    """Counts calls, streams and failures. Runs on the hub's loop."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._named = Callers()
        self._anonymous = Callers()
        self._failed = Callers()

    def call(self, identity: Identity, peer: str) -> None:
        """Count a call; raise ``ExhaustedError`` past the identity's rate."""
        if identity.rate is None:
            return
        wait = self._usage(identity, peer).take(identity.rate, self._clock())
        if wait > 0.0:
            raise ExhaustedError(
                "RATE_LIMITED",
                f"more than {identity.rate.requests_per_second:g} calls a second",
                wait,
                identity=identity.name,
            )

    @contextlib.contextmanager
    def stream(self, identity: Identity, peer: str) -> Iterator[None]:
        """Hold one stream; raise ``ExhaustedError`` past the identity's limit."""
        usage = self._usage(identity, peer)
        most = identity.max_concurrent_streams
        if most is not None and usage.streams >= most:
            raise ExhaustedError(
                "TOO_MANY_STREAMS", f"{most} streams are open already", identity=identity.name
            )
        usage.streams += 1
        try:
            yield
        finally:
            usage.streams -= 1

    def failure(self, error: UnauthenticatedError, peer: str) -> UnauthenticatedError:
        """Count a failed authentication; raise ``ExhaustedError`` instead past the limit.

        Whoever shows good credentials is never kept out by the failures of a neighbour.
        """
        wait = self._failed.of(network(peer)).take(FAILURES, self._clock())
        if wait > 0.0:
            raise ExhaustedError("TOO_MANY_FAILURES", "too many failed authentications", wait)
        return error

    def _usage(self, identity: Identity, peer: str) -> Usage:
        if identity.name == ANONYMOUS:
            return self._anonymous.of(network(peer))
        return self._named.of(identity.name)


def network(peer: str) -> str:
    """The IPv4 address or IPv6 /64 of gRPC's ``ipv4:1.2.3.4:5``, or of a bare address."""
    host = unquote(peer)
    if host.startswith(("ipv4:", "ipv6:")):
        host = host[5:].rpartition(":")[0].strip("[]")
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "unknown"
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((int(address), 64), strict=False))
