"""The gRPC services: thin, each method reads its request, asks, and answers.

Run on the hub's loop; validation that names fields is done here, so that nothing
malformed reaches the store or a front end.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from steerscope.api.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from steerscope.catalog.model import ModelMatch
from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import SpecError
from steerscope.hub.announcements import Announcements
from steerscope.hub.control import ControlPlane
from steerscope.hub.conversions import (
    FEATURES,
    POLICIES,
    REQUESTS,
    catalog_message,
    feature_message,
    interventions,
    policy_message,
    report_message,
)
from steerscope.hub.policies import Origin, PolicyStore, StoredPolicy
from steerscope.hub.refusals import NotFoundError, page, plain_name, refusing
from steerscope.steering.admission import check_asked
from steerscope.steering.interventions import POLICY_NAME_PATTERN, Policy
from steerscope.telemetry.asked import AskedLog
from steerscope.telemetry.requests import RequestLedger
from steerscope.telemetry.tracks import RequestTrack

MAX_WAIT_SECONDS = 30.0
MAX_DESCRIPTION_CHARACTERS = 4096


class CatalogService(catalog_pb2_grpc.CatalogServiceServicer):
    """What exists."""

    def __init__(self, catalog: Catalog, model_match: ModelMatch) -> None:
        self._catalog = catalog
        self._model_match = model_match

    @refusing
    async def GetCatalog(
        self, request: catalog_pb2.GetCatalogRequest, context: Any
    ) -> catalog_pb2.GetCatalogResponse:
        found = catalog_message(self._catalog, self._model_match)
        return catalog_pb2.GetCatalogResponse(catalog=found)

    @refusing
    async def GetFeature(
        self, request: catalog_pb2.GetFeatureRequest, context: Any
    ) -> catalog_pb2.GetFeatureResponse:
        name = plain_name(request.name, FEATURES)
        if name not in self._catalog.addresses:
            raise NotFoundError(f"no feature {name[:80]!r} in the catalog")
        feature = feature_message(self._catalog, self._catalog.feature(name))
        return catalog_pb2.GetFeatureResponse(feature=feature)

    @refusing
    async def ListFeatures(
        self, request: catalog_pb2.ListFeaturesRequest, context: Any
    ) -> catalog_pb2.ListFeaturesResponse:
        names, token = page(list(self._catalog.addresses), request.page_size, request.page_token)
        found = [feature_message(self._catalog, self._catalog.feature(name)) for name in names]
        return catalog_pb2.ListFeaturesResponse(features=found, next_page_token=token)


class SteeringService(steering_pb2_grpc.SteeringServiceServicer):
    """What may be asked for by name."""

    def __init__(
        self,
        catalog: Catalog,
        settings: SteeringSettings,
        store: PolicyStore,
        control: ControlPlane,
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._store = store
        self._control = control

    @refusing
    async def CreatePolicy(
        self, request: steering_pb2.CreatePolicyRequest, context: Any
    ) -> steering_pb2.CreatePolicyResponse:
        policy = self._policy(request)
        self._store.check_free(policy.name)
        if request.validate_only:
            stored = StoredPolicy(policy, Origin.CREATED, "")
        else:
            stored = self._store.create(policy)
            await self._control.publish()
        return steering_pb2.CreatePolicyResponse(policy=policy_message(stored))

    @refusing
    async def GetPolicy(
        self, request: steering_pb2.GetPolicyRequest, context: Any
    ) -> steering_pb2.GetPolicyResponse:
        return steering_pb2.GetPolicyResponse(policy=policy_message(self._stored(request.name)))

    @refusing
    async def ListPolicies(
        self, request: steering_pb2.ListPoliciesRequest, context: Any
    ) -> steering_pb2.ListPoliciesResponse:
        stored = {each.policy.name: each for each in self._store.all()}
        names, token = page(list(stored), request.page_size, request.page_token)
        return steering_pb2.ListPoliciesResponse(
            policies=[policy_message(stored[name]) for name in names], next_page_token=token
        )

    @refusing
    async def DeletePolicy(
        self, request: steering_pb2.DeletePolicyRequest, context: Any
    ) -> steering_pb2.DeletePolicyResponse:
        stored = self._stored(request.name)
        self._store.delete(stored.policy.name, request.etag)
        await self._control.publish()
        return steering_pb2.DeletePolicyResponse()

    def _stored(self, name: str) -> StoredPolicy:
        plain = plain_name(name, POLICIES)
        stored = self._store.get(plain)
        if stored is None:
            raise NotFoundError(f"no policy {plain[:80]!r}")
        return stored

    def _policy(self, request: steering_pb2.CreatePolicyRequest) -> Policy:
        if not re.fullmatch(POLICY_NAME_PATTERN, request.policy_id):
            raise SpecError("policy_id", f"must match {POLICY_NAME_PATTERN}")
        if request.policy.name not in ("", POLICIES + request.policy_id):
            raise SpecError("policy.name", f"must be {POLICIES}{request.policy_id} or empty")
        if len(request.policy.description) > MAX_DESCRIPTION_CHARACTERS:
            raise SpecError(
                "policy.description", f"longer than {MAX_DESCRIPTION_CHARACTERS} characters"
            )
        policy = Policy(
            name=request.policy_id,
            interventions=interventions(request.policy.interventions),
            max_dose=request.policy.max_dose if request.policy.HasField("max_dose") else None,
            description=request.policy.description,
        )
        try:
            check_asked(self._catalog, self._settings, policy.spec)
        except SpecError as error:
            raise error.under("policy") from None
        return policy


class TelemetryService(telemetry_pb2_grpc.TelemetryServiceServicer):
    """What was seen."""

    def __init__(
        self,
        catalog: Catalog,
        ledger: RequestLedger,
        asked: AskedLog,
        announcements: Announcements,
        model_match: ModelMatch,
    ) -> None:
        self._catalog = catalog
        self._model_match = model_match
        self._ledger = ledger
        self._asked = asked
        self._announcements = announcements

    @refusing
    async def GetRequestReport(
        self, request: telemetry_pb2.GetRequestReportRequest, context: Any
    ) -> telemetry_pb2.GetRequestReportResponse:
        external_id = plain_name(request.name, REQUESTS)
        await self._announcements.wait_for(
            external_id, lambda: self._has_finished(external_id), _wait_seconds(request)
        )
        tracks = self._ledger.report(external_id)
        if not tracks:
            raise NotFoundError(f"no request {external_id[:80]!r} is known")
        return telemetry_pb2.GetRequestReportResponse(report=self._report(external_id, tracks))

    async def WatchRequests(
        self, request: telemetry_pb2.WatchRequestsRequest, context: Any
    ) -> AsyncIterator[telemetry_pb2.WatchRequestsResponse]:
        with self._announcements.watching() as events:
            # The headers tell the caller that it misses nothing from here on.
            await context.send_initial_metadata(())
            async for event in events:
                name, track = event.track.start.external_id, event.track
                report = self._report(name, (track,), features=False)
                kind = "finished" if event.finished else "started"
                if not event.finished:  # the track may have gone on since
                    report.state = report.completions[0].state = telemetry_pb2.REQUEST_STATE_RUNNING
                yield telemetry_pb2.WatchRequestsResponse(**{kind: report}, missed=event.missed)

    def _report(
        self, external_id: str, tracks: Sequence[RequestTrack], *, features: bool = True
    ) -> telemetry_pb2.RequestReport:
        asked = self._asked.digest(external_id)
        return report_message(
            external_id, tracks, self._catalog, asked, self._model_match, features=features
        )

    def _has_finished(self, external_id: str) -> bool:
        tracks = self._ledger.report(external_id)
        return bool(tracks) and all(track.finished for track in tracks)


def _wait_seconds(request: telemetry_pb2.GetRequestReportRequest) -> float:
    seconds = request.wait.seconds + request.wait.nanos * 1e-9
    if seconds < 0.0:
        raise SpecError("wait", "must not be negative")
    return min(seconds, MAX_WAIT_SECONDS)
