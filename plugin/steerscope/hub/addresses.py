"""Where the hub may listen, found out before anything is served."""

from __future__ import annotations

import ipaddress
import os
import socket

from steerscope.errors import HubError


def claim(field: str, address: str) -> socket.socket:
    """A socket bound to ``host:port``; raise ``HubError`` naming the field.

    Only loopback is allowed: the hub has no credentials to ask anyone for.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not _is_loopback(host):
        raise HubError(
            f"{field}: {address}: only loopback addresses are allowed, because the hub "
            "does not authenticate its callers"
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    claimed = socket.socket(family, socket.SOCK_STREAM)
    try:
        claimed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claimed.bind((host, int(port)))
        claimed.listen(128)
    except (OSError, OverflowError) as error:
        claimed.close()
        raise HubError(f"{field}: {address}: {_reason(error)}") from None
    return claimed


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _reason(error: OSError | OverflowError) -> str:
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno).lower()
    return str(error)
