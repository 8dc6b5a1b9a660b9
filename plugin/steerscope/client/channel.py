"""Channels to the hub: TLS, client certificates, bearer tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc

from steerscope.errors import ConfigError
from steerscope.security import is_loopback

Options = Sequence[tuple[str, Any]]

RECONNECT: Final[Options] = (
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
"""gRPC itself waits for up to two minutes before it looks for a hub that was away."""

REPEATING: Final[Options] = (
    *RECONNECT,
    (
        "grpc.service_config",
        json.dumps(
            {
                "methodConfig": [
                    {
                        "name": [{}],
                        "retryPolicy": {
                            "maxAttempts": 5,
                            "initialBackoff": "0.2s",
                            "maxBackoff": "2s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": ["UNAVAILABLE"],
                        },
                    }
                ]
            }
        ),
    ),
)
"""For calls that are safe to make again: some three seconds of trying, within their deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """What proves who we are, and whom we trust.

    Attributes:
        token: a bearer token. Without TLS it is only sent to loopback.
        ca: PEM file of who signed the hub's certificate; ``system_ca`` for the system's own.
        system_ca: TLS, trusting what the system trusts.
        certificate: PEM file of our own certificate, for a hub that asks for one.
        key: PEM file of its key.
    """

    token: str | None = field(default=None, repr=False)
    ca: Path | None = None
    system_ca: bool = False
    certificate: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise ConfigError("certificate and key: give both or neither")
        if self.certificate is not None and not self.is_tls:
            raise ConfigError("certificate: needs TLS, so ca or system_ca")

    @property
    def is_tls(self) -> bool:
        """Whether the channel is encrypted."""
        return self.ca is not None or self.system_ca

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What shows the token with a call."""
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)


NO_CREDENTIALS = Credentials()


def open_channel(address: str, credentials: Credentials, options: Options = ()) -> grpc.Channel:
    """A channel that shows the credentials; raise ``ConfigError`` where that is not safe."""
    if credentials.is_tls:
        channel = grpc.secure_channel(address, tls_credentials(credentials), options)
    else:
        check_cleartext(address, credentials)
        channel = grpc.insecure_channel(address, options)
    if credentials.token is None:
        return channel
    return grpc.intercept_channel(channel, _Bearer(credentials))


def open_async_channel(
    address: str, credentials: Credentials, options: Options = ()
) -> grpc.aio.Channel:
    """The same for asyncio; whoever calls shows ``credentials.metadata`` with each call."""
    if credentials.is_tls:
        return grpc.aio.secure_channel(address, tls_credentials(credentials), options)
    check_cleartext(address, credentials)
    return grpc.aio.insecure_channel(address, options)


def tls_credentials(credentials: Credentials) -> grpc.ChannelCredentials:
    """The TLS half, for a channel of any kind; raise ``ConfigError`` naming a missing file."""
    return grpc.ssl_channel_credentials(
        _read("ca", credentials.ca),
        _read("key", credentials.key),
        _read("certificate", credentials.certificate),
    )


def check_cleartext(address: str, credentials: Credentials) -> None:
    """Raise ``ConfigError`` if a token would travel where others can read it."""
    if credentials.token is not None and not is_loopback(address):
        raise ConfigError(f"token: {address} is beyond loopback, which needs ca or system_ca")


class _Details(NamedTuple):
    """A call as gRPC's interceptors describe it."""

    method: str
    timeout: float | None
    metadata: Any
    credentials: grpc.CallCredentials | None
    wait_for_ready: bool | None
    compression: grpc.Compression | None


class _Bearer(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.UnaryStreamClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[type-arg]
    grpc.StreamStreamClientInterceptor,  # type: ignore[type-arg]
):
    """Adds the token to each call."""

    def __init__(self, credentials: Credentials) -> None:
        self._metadata = credentials.metadata

    def _intercept(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        return continuation(self._shown(client_call_details), request)

    intercept_unary_unary = _intercept
    intercept_unary_stream = _intercept
    intercept_stream_unary = _intercept  # type: ignore[assignment]
    intercept_stream_stream = _intercept  # type: ignore[assignment]

    def _shown(self, details: Any) -> _Details:
        return _Details(
            details.method,
            details.timeout,
            (*(details.metadata or ()), *self._metadata),
            details.credentials,
            details.wait_for_ready,
            details.compression,
        )


def _read(name: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror or error}") from None
