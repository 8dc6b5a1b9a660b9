"""An OTLP collector in a process of its own: gRPC and HTTP on real ports, kept in a file.

Run as a program it serves until it is killed, and appends a line for each request that it takes.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import json
import subprocess
import sys
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

METRICS, LOGS, TRACES = "metrics", "logs", "traces"
REQUESTS = {
    METRICS: metrics_service_pb2.ExportMetricsServiceRequest,
    LOGS: logs_service_pb2.ExportLogsServiceRequest,
    TRACES: trace_service_pb2.ExportTraceServiceRequest,
}
RESPONSES = {
    METRICS: metrics_service_pb2.ExportMetricsServiceResponse,
    LOGS: logs_service_pb2.ExportLogsServiceResponse,
    TRACES: trace_service_pb2.ExportTraceServiceResponse,
}


class Taken(NamedTuple):
    """One request, as it came over the wire."""

    kind: str
    protocol: str
    headers: dict[str, str]
    payload: bytes

    @property
    def message(self):
        return REQUESTS[self.kind].FromString(self.payload)


class Receiver:
    """The process, and what it took. It may be stopped and started again on its ports."""

    def __init__(self, folder: Path, tls: tuple[Path, Path] | None = None) -> None:
        self._kept = folder / "otlp.jsonl"
        self._kept.touch()
        self._tls = tls
        self._process: subprocess.Popen[bytes] | None = None
        self.ports = {"grpc": 0, "http": 0}

    def endpoint(self, protocol: str) -> str:
        scheme = "http" if self._tls is None else "https"
        return f"{scheme}://localhost:{self.ports[protocol]}"

    def start(self) -> None:
        command = [sys.executable, __file__, str(self._kept)]
        command += [f"--{protocol}-port={port}" for protocol, port in self.ports.items()]
        command += [f"--tls={path}" for path in self._tls or ()]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.ports = json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def taken(self, kind: str) -> list[Taken]:
        lines = self._kept.read_text().splitlines(keepends=True)
        taken = [json.loads(line) for line in lines if line.endswith("\n")]
        return [
            Taken(one["kind"], one["protocol"], one["headers"], base64.b64decode(one["payload"]))
            for one in taken
            if one["kind"] == kind
        ]

    def resources(self, kind: str) -> list:
        """Every ``ResourceMetrics``, ``ResourceLogs`` or ``ResourceSpans``."""
        fields = {METRICS: "resource_metrics", LOGS: "resource_logs", TRACES: "resource_spans"}
        return [r for taken in self.taken(kind) for r in getattr(taken.message, fields[kind])]

    def events(self) -> list:
        scopes = (scope for resource in self.resources(LOGS) for scope in resource.scope_logs)
        return [event for scope in scopes for event in scope.log_records]

    def spans(self) -> list:
        scopes = (scope for resource in self.resources(TRACES) for scope in resource.scope_spans)
        return [span for scope in scopes for span in scope.spans]


@contextlib.contextmanager
def receiving(folder: Path, tls: tuple[Path, Path] | None = None):
    receiver = Receiver(folder, tls)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def attributes(kept) -> dict[str, object]:
    """A message's attributes as plain values."""
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in kept.attributes}


class _Keeper:
    def __init__(self, path: Path) -> None:
        self._file = path.open("a")
        self._lock = threading.Lock()

    def keep(self, kind: str, protocol: str, headers: dict[str, str], payload: bytes) -> None:
        coded = base64.b64encode(payload).decode()
        line = {"kind": kind, "protocol": protocol, "headers": headers, "payload": coded}
        with self._lock:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()


class _GrpcService:
    def __init__(self, keeper: _Keeper, kind: str) -> None:
        self._keeper = keeper
        self._kind = kind

    def Export(self, request, context):
        headers = {k: v for k, v in context.invocation_metadata() if isinstance(v, str)}
        self._keeper.keep(self._kind, "grpc", headers, request.SerializeToString())
        return RESPONSES[self._kind]()


def _serve_grpc(keeper: _Keeper, port: int, tls: list[Path]) -> int:
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    adders = {
        METRICS: metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server,
        LOGS: logs_service_pb2_grpc.add_LogsServiceServicer_to_server,
        TRACES: trace_service_pb2_grpc.add_TraceServiceServicer_to_server,
    }
    for kind, add in adders.items():
        add(_GrpcService(keeper, kind), server)
    if tls:
        certificate, key = (path.read_bytes() for path in tls)
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        bound = server.add_secure_port(f"localhost:{port}", credentials)
    else:
        bound = server.add_insecure_port(f"localhost:{port}")
    server.start()
    _SERVERS.append(server)
    return bound


def _serve_http(keeper: _Keeper, port: int, tls: list[Path]) -> int:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            kind = self.path.removeprefix("/v1/")
            REQUESTS[kind].FromString(body)
            keeper.keep(kind, "http", {k.lower(): v for k, v in self.headers.items()}, body)
            answer = RESPONSES[kind]().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    if tls:
        import ssl

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*tls)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


_SERVERS: list[grpc.Server] = []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kept", type=Path)
    parser.add_argument("--grpc-port", type=int, default=0)
    parser.add_argument("--http-port", type=int, default=0)
    parser.add_argument("--tls", type=Path, action="append", default=[])
    arguments = parser.parse_args()
    keeper = _Keeper(arguments.kept)
    ports = {
        "grpc": _serve_grpc(keeper, arguments.grpc_port, arguments.tls),
        "http": _serve_http(keeper, arguments.http_port, arguments.tls),
    }
    print(json.dumps(ports), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
