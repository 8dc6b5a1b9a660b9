"""The client: our types in, the API's messages out, refusals as our errors."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import msgspec
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
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
from steerscope.client.channel import NO_CREDENTIALS, Credentials, open_channel
from steerscope.errors import HubError, SpecError
from steerscope.hub.conversions import FEATURES, POLICIES, REQUESTS, intervention_message
from steerscope.steering.interventions import Intervention, SteeringSpec, check_spec

DEADLINE_SECONDS = 10.0
PAGE_SIZE = 1000

Edit = Intervention | Mapping[str, Any]
Item = TypeVar("Item")


class Unset(enum.Enum):
    """Not given, which is not the same as None."""

    UNSET = enum.auto()


UNSET = Unset.UNSET


class Client:
    """Talks to one hub.

    Methods raise ``SpecError`` where a field is refused, and ``HubError`` (whose
    ``__cause__`` is the ``grpc.RpcError``) for everything else.

    Args:
        address: ``host:port`` of the hub's gRPC server.
        credentials: what proves who we are; none for a hub on loopback that asks for none.
    """

    def __init__(self, address: str, credentials: Credentials = NO_CREDENTIALS) -> None:
        self._channel = open_channel(address, credentials)
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

    def list_features(self, filter: str = "") -> list[catalog_pb2.Feature]:
        """The features of the catalog in force for which ``filter`` holds; it is AIP-160."""
        request = catalog_pb2.ListFeaturesRequest(page_size=PAGE_SIZE, filter=filter)
        return _every(self._catalog.ListFeatures, request, lambda page: page.features)

    def create_policy(
        self,
        name: str,
        interventions: Iterable[Edit],
        *,
        max_dose: float | None = None,
        description: str = "",
        ttl: float | None = None,
        annotations: Mapping[str, str] | None = None,
        request_id: str = "",
        validate_only: bool = False,
    ) -> steering_pb2.Policy:
        """Store a policy; when this returns, requests may name it.

        Args:
            name: its plain name.
            interventions: the edits, at least one.
            max_dose: caps the dose of every token.
            description: a text for people.
            ttl: seconds after which the policy is gone; None for never.
            annotations: your own.
            request_id: a UUID (version 4) with which it is safe to call again for an hour.
            validate_only: check everything, store nothing.
        """
        policy = steering_pb2.Policy(
            description=description,
            max_dose=max_dose,
            interventions=_messages(interventions),
            annotations=annotations,
            ttl=None if ttl is None else _duration(ttl),
        )
        request = steering_pb2.CreatePolicyRequest(
            policy=policy, policy_id=name, validate_only=validate_only, request_id=request_id
        )
        with _our_errors():
            return self._steering.CreatePolicy(request, timeout=DEADLINE_SECONDS).policy

    def get_policy(self, name: str, revision_id: str = "") -> steering_pb2.Policy:
        """One policy by its plain name, as it is or as it was at a revision."""
        full = POLICIES + name + (f"@{revision_id}" if revision_id else "")
        request = steering_pb2.GetPolicyRequest(name=full)
        with _our_errors():
            return self._steering.GetPolicy(request, timeout=DEADLINE_SECONDS).policy

    def list_policies(self, filter: str = "") -> list[steering_pb2.Policy]:
        """The policies for which ``filter`` holds, e.g. ``origin = "created"``; it is AIP-160."""
        request = steering_pb2.ListPoliciesRequest(page_size=PAGE_SIZE, filter=filter)
        return _every(self._steering.ListPolicies, request, lambda page: page.policies)

    def list_policy_revisions(self, name: str) -> list[steering_pb2.Policy]:
        """A policy as it is and as it was, newest first."""
        request = steering_pb2.ListPolicyRevisionsRequest(name=POLICIES + name, page_size=PAGE_SIZE)
        return _every(self._steering.ListPolicyRevisions, request, lambda page: page.policies)

    def update_policy(
        self,
        name: str,
        *,
        interventions: Iterable[Edit] | Unset = UNSET,
        max_dose: float | Unset | None = UNSET,
        description: str | Unset = UNSET,
        ttl: float | Unset | None = UNSET,
        annotations: Mapping[str, str] | Unset = UNSET,
        etag: str = "",
        allow_missing: bool = False,
        validate_only: bool = False,
    ) -> steering_pb2.Policy:
        """Change what is given of a policy that was created; None clears.

        Args:
            name: its plain name.
            interventions: the edits, all of them.
            max_dose: see ``create_policy``.
            description: see ``create_policy``.
            ttl: seconds from now.
            annotations: all of them.
            etag: change only that very version.
            allow_missing: create it if there is none.
            validate_only: check everything, change nothing.
        """
        policy = steering_pb2.Policy(name=POLICIES + name, etag=etag)
        given = {
            "interventions": interventions,
            "max_dose": max_dose,
            "description": description,
            "ttl": ttl,
            "annotations": annotations,
        }
        paths = [field for field, value in given.items() if value is not UNSET]
        if not isinstance(interventions, Unset):
            policy.interventions.extend(_messages(interventions))
        if isinstance(max_dose, float | int):
            policy.max_dose = max_dose
        if isinstance(description, str):
            policy.description = description
        if isinstance(ttl, float | int):
            policy.ttl.CopyFrom(_duration(ttl))
        if not isinstance(annotations, Unset):
            policy.annotations.update(annotations)
        request = steering_pb2.UpdatePolicyRequest(
            policy=policy,
            update_mask=FieldMask(paths=paths),
            allow_missing=allow_missing,
            validate_only=validate_only,
        )
        with _our_errors():
            return self._steering.UpdatePolicy(request, timeout=DEADLINE_SECONDS).policy

    def delete_policy(
        self, name: str, *, etag: str = "", allow_missing: bool = False, validate_only: bool = False
    ) -> None:
        """Remove a policy that was created; with ``etag``, only that very version."""
        request = steering_pb2.DeletePolicyRequest(
            name=POLICIES + name,
            etag=etag,
            allow_missing=allow_missing,
            validate_only=validate_only,
        )
        with _our_errors():
            self._steering.DeletePolicy(request, timeout=DEADLINE_SECONDS)

    def steer_request(
        self,
        request_id: str,
        *,
        policy: str = "",
        interventions: Iterable[Edit] = (),
        max_dose: float | None = None,
        ttl: float | None = None,
        validate_only: bool = False,
    ) -> steering_pb2.SteerRequestResponse:
        """Steer a request from its next token on, or one that will come from its first.

        Args:
            request_id: the external id, e.g. ``chatcmpl-…``.
            policy: a policy's plain name; either it or ``interventions``.
            interventions: the edits.
            max_dose: caps the dose of every token; only with ``interventions``.
            ttl: seconds to wait for a request that has not arrived; None for a minute.
            validate_only: check everything, change nothing.
        """
        edits = list(interventions)
        request = steering_pb2.SteerRequestRequest(
            name=REQUESTS + request_id,
            policy=POLICIES + policy if policy else "",
            interventions=_messages(edits) if edits else (),
            max_dose=max_dose,
            ttl=None if ttl is None else _duration(ttl),
            validate_only=validate_only,
        )
        with _our_errors():
            return self._steering.SteerRequest(request, timeout=DEADLINE_SECONDS)

    def release_request(self, request_id: str) -> list[steering_pb2.SteeredSequence]:
        """End a request's steering from its next token on; where each sequence is free."""
        request = steering_pb2.ReleaseRequestRequest(name=REQUESTS + request_id)
        with _our_errors():
            return list(self._steering.ReleaseRequest(request, timeout=DEADLINE_SECONDS).sequences)

    def get_request_report(
        self, request_id: str, *, wait: float = 0.0
    ) -> telemetry_pb2.RequestReport:
        """What is known of a request, by the id in its response; waits for its end if asked.

        Args:
            request_id: the external id, e.g. ``chatcmpl-…``.
            wait: seconds to wait for the request to appear and finish, at most 30.
        """
        request = telemetry_pb2.GetRequestReportRequest(
            name=REQUESTS + request_id, wait=_duration(wait)
        )
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


def _every(
    call: Callable[..., Any], request: Any, items: Callable[[Any], Iterable[Item]]
) -> list[Item]:
    """The items of all pages."""
    found: list[Item] = []
    with _our_errors():
        while True:
            page = call(request, timeout=DEADLINE_SECONDS)
            found.extend(items(page))
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def _messages(edits: Iterable[Edit]) -> list[steering_pb2.Intervention]:
    return [intervention_message(edit) for edit in _checked(edits)]


def _checked(edits: Iterable[Edit]) -> tuple[Intervention, ...]:
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
