"""How commands reach the hub: options that all of them have, and how they end."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from steerscope import config
from steerscope.cli.output import Format
from steerscope.errors import ConfigError, SteerscopeError

if TYPE_CHECKING:  # commands import what they need when they run
    from steerscope.client import Client

DEFAULT_ADDRESS = "127.0.0.1:50051"
MAX_TOKEN_BYTES = 4096


class NotThereError(SteerscopeError):
    """What a command names does not exist: it ends with 1, not 2."""


def options() -> argparse.ArgumentParser:
    """The parent of every command that talks to the hub."""
    parser = argparse.ArgumentParser(add_help=False)
    hub = parser.add_argument_group("the hub")
    hub.add_argument(
        "--address",
        metavar="HOST:PORT",
        help=f"of its gRPC; else $STEERSCOPE_ADDRESS, else {DEFAULT_ADDRESS}",
    )
    hub.add_argument(
        "--token-file", type=Path, help="holds a bearer token; else $STEERSCOPE_TOKEN, else none"
    )
    hub.add_argument("--ca", type=Path, help="TLS: PEM file of who signed the hub's certificate")
    hub.add_argument("--system-ca", action="store_true", help="TLS: trust what the system trusts")
    hub.add_argument("--certificate", type=Path, help="PEM file of your own certificate")
    hub.add_argument("--key", type=Path, help="PEM file of its key")
    hub.add_argument(
        "--timeout", type=_seconds, default=10.0, metavar="S", help="of a call (default 10)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Format,
        choices=list(Format),
        default=Format.TABLE,
        help="how to print (default table)",
    )
    return parser


@contextlib.contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[Client]:
    """A client of the hub that the options name; ``NotThereError`` for what it does not have."""
    import grpc

    from steerscope.client import CallError, Client, Credentials

    address, token = config.client_environment()
    address = arguments.address or address or DEFAULT_ADDRESS
    if not re.fullmatch(r"\S+:\d{1,5}", address):
        raise ConfigError(f"address: must be HOST:PORT, got {address!r}")
    credentials = Credentials(
        token=_read_token(arguments.token_file) if arguments.token_file else token,
        ca=arguments.ca,
        system_ca=arguments.system_ca,
        certificate=arguments.certificate,
        key=arguments.key,
    )
    with Client(address, credentials, timeout=arguments.timeout) as client:
        try:
            yield client
        except CallError as error:
            if error.code is grpc.StatusCode.NOT_FOUND:
                raise NotThereError(str(error)) from error
            if error.code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise SteerscopeError(f"{address}: {error}") from error
            raise


def _read_token(path: Path) -> str:
    try:
        with path.open("rb") as file:
            token = file.read(MAX_TOKEN_BYTES + 1).strip()
    except OSError as error:
        raise ConfigError(f"token-file: {path}: {error.strerror or error}") from None
    if not re.fullmatch(rb"[!-~]{1,%d}" % MAX_TOKEN_BYTES, token):
        raise ConfigError(f"token-file: {path}: must hold one token and nothing else")
    return token.decode()


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0.0 < seconds < 1e6:
        raise argparse.ArgumentTypeError("must be above zero")
    return seconds
