"""The hub's certificate, for gRPC and HTTP alike; new files are used by new connections."""

from __future__ import annotations

import ssl
from typing import Any

import grpc

from steerscope.errors import ConfigError
from steerscope.hub.auth.files import WatchedFiles
from steerscope.security import Tls


class Certificates(WatchedFiles):
    """Certificate, key and clients' CA as the files last had them in order.

    The CA is for gRPC: over HTTP a caller is known by bearer token only, so that probes and
    Prometheus need no certificate.
    """

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._served: grpc.ServerCertificateConfiguration | None = None
        paths = (tls.certificate, tls.key, *filter(None, [tls.client_ca]))
        super().__init__("security.tls", paths)

    def take(self, contents: tuple[bytes, ...]) -> None:
        """Put a new certificate in force."""
        context = self._context()
        if contents != self._contents():
            raise ConfigError("security.tls: the files changed while they were read")
        certificate, key = contents[:2]
        client_ca = contents[2] if len(contents) > 2 else None
        self._configuration = grpc.ssl_server_certificate_configuration(
            [(key, certificate)], client_ca
        )
        self._newest = context

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a secure port; asks for the newest certificate at each connection."""
        self._served = self._configuration
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._changed,  # type: ignore[arg-type]  # None is allowed, the stubs do not know
            self._tls.client_ca is not None,
        )

    def http_context(self) -> ssl.SSLContext:
        """For an HTTPS port; hands each connection on to the newest certificate."""
        context = self._newest

        def hand_on(connection: Any, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._newest

        context.sni_callback = hand_on
        return context

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Called by gRPC's threads before each handshake; None is no change."""
        newest = self._configuration
        if newest is self._served:
            return None
        self._served = newest
        return newest

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            # Without a password OpenSSL would ask for one at the terminal.
            context.load_cert_chain(self._tls.certificate, self._tls.key, password="")
        except (OSError, ValueError) as error:
            raise ConfigError(f"security.tls: certificate and key: {_reason(error)}") from None
        if self._tls.client_ca is not None:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(self._tls.client_ca)
            except (OSError, ValueError) as error:
                raise ConfigError(f"security.tls.client_ca: {_reason(error)}") from None
        return context


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "not PEM"
    return getattr(error, "strerror", None) or str(error)
