"""The client: our types in, the API's messages out, refusals as our errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import grpc
import msgspec
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from steerscope.api.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from steerscope.errors import HubError, SpecError
from steerscope.hub.conversions import FEATURES, POLICIES, REQUESTS, intervention_message
from steerscope.steering.interventions import Intervention, SteeringSpec, check_spec

DEADLINE_SECONDS = 10.0
PAGE_SIZE = 1000


class Client:
    """Talks to one hub.

    Methods raise ``SpecError`` where a field is refused, and ``HubError`` (whose
    ``__cause__`` is the ``grpc.RpcError``) for everything else.

    Args:
        address: ``host:port`` of the hub's gRPC server.
    """

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._catalog = catalog_pb2_grpc.CatalogServiceStub(self._channel)
        self._steering = steering_pb2_grpc.SteeringServiceStub(self._channel)
        self._telemetry = telemetry_pb2_grpc.TelemetryServiceStub(self._channel)

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
        """Close the channel."""
        self._channel.close()

    def get_catalog(self) -> catalog_pb2.Catalog:
        """The catalog in force with its signals, without its features."""
        request = catalog_pb2.GetCatalogRequest()
        with _our_errors():
            return self._catalog.GetCatalog(request, timeout=DEADLINE_SECONDS).catalog

    def get_feature(self, name: str) -> catalog_pb2.Feature:
        """One feature by its plain name."""
        request = catalog_pb2.GetFeatureRequest(name=FEATURES + name)
        with _our_errors():
            return self._catalog.GetFeature(request, timeout=DEADLINE_SECONDS).feature

    def list_features(self) -> list[catalog_pb2.Feature]:
        """Every feature of the catalog in force."""
        found: list[catalog_pb2.Feature] = []
        request = catalog_pb2.ListFeaturesRequest(page_size=PAGE_SIZE)
        with _our_errors():
            while True:
                page = self._catalog.ListFeatures(request, timeout=DEADLINE_SECONDS)
                found.extend(page.features)
                if not page.next_page_token:
                    return found
                request.page_token = page.next_page_token

    def create_policy(
        self,
        name: str,
        interventions: Iterable[Intervention | Mapping[str, Any]],
        *,
        max_dose: float | None = None,
        description: str = "",
        validate_only: bool = False,
    ) -> steering_pb2.Policy:
        """Store a policy; when this returns, requests may name it."""
        policy = steering_pb2.Policy(
            description=description,
            max_dose=max_dose,
            interventions=[intervention_message(edit) for edit in _checked(interventions)],
        )
        request = steering_pb2.CreatePolicyRequest(
            policy=policy, policy_id=name, validate_only=validate_only
        )
        with _our_errors():
            return self._steering.CreatePolicy(request, timeout=DEADLINE_SECONDS).policy

    def get_policy(self, name: str) -> steering_pb2.Policy:
        """One policy by its plain name."""
        request = steering_pb2.GetPolicyRequest(name=POLICIES + name)
        with _our_errors():
            return self._steering.GetPolicy(request, timeout=DEADLINE_SECONDS).policy

    def list_policies(self) -> list[steering_pb2.Policy]:
        """Every policy in force."""
        found: list[steering_pb2.Policy] = []
        request = steering_pb2.ListPoliciesRequest(page_size=PAGE_SIZE)
        with _our_errors():
            while True:
                page = self._steering.ListPolicies(request, timeout=DEADLINE_SECONDS)
                found.extend(page.policies)
                if not page.next_page_token:
                    return found
                request.page_token = page.next_page_token

    def delete_policy(self, name: str, *, etag: str = "") -> None:
        """Remove a policy that was created; with ``etag``, only that very version."""
        request = steering_pb2.DeletePolicyRequest(name=POLICIES + name, etag=etag)
        with _our_errors():
            self._steering.DeletePolicy(request, timeout=DEADLINE_SECONDS)

    def get_request_report(
        self, request_id: str, *, wait: float = 0.0
    ) -> telemetry_pb2.RequestReport:
        """What is known of a request, by the id in its response; waits for its end if asked.

        Args:
            request_id: the external id, e.g. ``chatcmpl-…``.
            wait: seconds to wait for the request to appear and finish, at most 30.
        """
        duration = Duration()
        duration.FromNanoseconds(int(wait * 1e9))
        request = telemetry_pb2.GetRequestReportRequest(name=REQUESTS + request_id, wait=duration)
        with _our_errors():
            deadline = DEADLINE_SECONDS + wait
            return self._telemetry.GetRequestReport(request, timeout=deadline).report

    def watch_requests(self) -> Iterator[telemetry_pb2.WatchRequestsResponse]:
        """Events from now on: the stream is open when this returns. Close it to stop."""
        stream = self._telemetry.WatchRequests(telemetry_pb2.WatchRequestsRequest())
        with _our_errors():
            stream.initial_metadata()
        return _events(stream)


def _events(stream: Any) -> Iterator[telemetry_pb2.WatchRequestsResponse]:
    try:
        with _our_errors():
            yield from stream
    finally:
        stream.cancel()


def _checked(edits: Iterable[Intervention | Mapping[str, Any]]) -> tuple[Intervention, ...]:
    """Refuse here what cannot even be put on the wire; the hub checks the rest."""
    converted = []
    for i, edit in enumerate(edits):
        try:
            converted.append(msgspec.convert(edit, Intervention))
        except msgspec.ValidationError as error:
            raise SpecError(f"policy.interventions[{i}]", str(error)) from None
    try:
        check_spec(SteeringSpec(interventions=tuple(converted)))
    except SpecError as error:
        raise error.under("policy") from None
    return tuple(converted)


@contextlib.contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        raise _converted(error) from error


def _converted(error: Any) -> SpecError | HubError:
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad) and bad.field_violations:
            violation = bad.field_violations[0]
            return SpecError(violation.field, violation.description)
    return HubError(f"{error.code().name}: {error.details()}")
