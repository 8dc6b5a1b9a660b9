"""Certificates made on the spot, identities, and ways to call any RPC by its descriptor."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import socket
import ssl
import time
from pathlib import Path
from typing import NamedTuple

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from google.protobuf import descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2  # noqa: F401  # puts its service into the pool
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from steerscope import config
from steerscope.client.channel import Credentials, open_channel
from steerscope.hub import launcher
from steerscope.hub.auth import tokens

DAY = datetime.timedelta(days=1)
LOOPBACK = {"grpc_address": "127.0.0.1:0", "http_address": "127.0.0.1:0"}


class Pair(NamedTuple):
    """A certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        certificate, key = folder / f"{name}.pem", folder / f"{name}.key"
        certificate.write_bytes(self.certificate_pem)
        key.write_bytes(self.key_pem)
        return certificate, key

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )


def issue(common_name: str, by: Pair | None = None, *names: x509.GeneralName) -> Pair:
    """A certificate signed by ``by``, or an authority of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example"),
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
        ]
    )
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Pair(builder.sign(by.key if by else key, hashes.SHA256()), key)


def issue_server(by: Pair) -> Pair:
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    return issue("hub", by, x509.DNSName("localhost"), address)


def issue_client(by: Pair, uri: str) -> Pair:
    return issue("client", by, x509.UniformResourceIdentifier(uri))


class Secured:
    """A folder with an authority, the server's certificate, and what settings need of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = issue("authority")
        self.ca, _ = self.authority.write(folder, "ca")
        self.certificate, self.key = issue_server(self.authority).write(folder, "hub")

    def tls(self, *, mutual: bool = False) -> dict:
        tree = {"certificate": str(self.certificate), "key": str(self.key)}
        return tree | {"client_ca": str(self.ca)} if mutual else tree

    def client(self, uri: str, by: Pair | None = None) -> Credentials:
        """The credentials of a client with a certificate of its own."""
        name = f"client-{time.monotonic_ns()}"
        certificate, key = issue_client(by or self.authority, uri).write(self.folder, name)
        return Credentials(ca=self.ca, certificate=certificate, key=key)


class Somebody(NamedTuple):
    """An identity's tree for the settings, and its token."""

    tree: dict
    token: str


def somebody(name: str, *scopes: str, **fields: object) -> Somebody:
    token, sha256 = tokens.new_token()
    return Somebody({"name": name, "token_sha256": sha256, "scopes": list(scopes), **fields}, token)


@contextlib.contextmanager
def hub_with(catalog_folder, hub=None, steering=None, **security):
    """A running hub of its own with that ``security`` tree."""
    tree = {
        "catalog": str(catalog_folder),
        "hub": hub or LOOPBACK,
        "steering": steering or {},
        "security": {"reload_seconds": 0.05, **security},
    }
    running = launcher.start_hub(config.from_tree(tree, base=Path("/"), where="test"))
    try:
        yield running
    finally:
        running.stop()


def channel_to(hub, credentials: Credentials) -> grpc.Channel:
    return open_channel(f"127.0.0.1:{hub.grpc_port}", credentials)


def methods_of(channel) -> dict:
    """The descriptors of every RPC that the hub says it has, by full method."""
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = stub.ServerReflectionInfo(iter([request]), timeout=5)
    (answer,) = call
    pool = descriptor_pool.Default()
    services = [
        pool.FindServiceByName(found.name) for found in answer.list_services_response.service
    ]
    return {
        f"/{service.full_name}/{method.name}": method
        for service in services
        for method in service.methods
    }


def outcome(channel, path: str, method, metadata=()) -> grpc.StatusCode:
    """How a call with an empty request ends; OK too for a stream that opened."""
    request = message_factory.GetMessageClass(method.input_type)()
    serialise = type(request).SerializeToString
    kind = "stream" if method.client_streaming else "unary"
    answer = "stream" if method.server_streaming else "unary"
    ask = getattr(channel, f"{kind}_{answer}")(path, serialise, lambda raw: raw)
    if not method.server_streaming:
        try:
            ask(request, timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK
    call = ask(
        iter([request]) if method.client_streaming else request, timeout=10, metadata=metadata
    )
    call.initial_metadata()
    deadline = time.monotonic() + 0.1  # a refusal comes at once, headers and status together
    while call.is_active() and time.monotonic() < deadline:
        time.sleep(0.005)
    if call.is_active():
        call.cancel()
        return grpc.StatusCode.OK
    return call.code()


def details(error: grpc.RpcError) -> dict:
    """The details of a refusal by message name."""
    found = {}
    for packed in rpc_status.from_call(error).details:
        kind = getattr(error_details_pb2, packed.TypeName().rpartition(".")[2])
        message = kind()
        assert packed.Unpack(message)
        found[kind.DESCRIPTOR.name] = message
    return found


def served_certificate(port: int, *, http: bool) -> bytes:
    """What a new connection is shown, in DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if not http:
        context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        context.wrap_socket(raw) as wrapped,
    ):
        return wrapped.getpeercert(binary_form=True)
