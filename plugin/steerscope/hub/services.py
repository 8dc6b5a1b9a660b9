"""The gRPC services: thin, each method reads its request, asks, and answers.

Run on the hub's loop; validation that names fields is done here, so that nothing
malformed reaches the store or a front end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from steerscope.api.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    steering_pb2,
    steering_pb2_grpc,
)
from steerscope.catalog.model import ModelMatch
from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import SpecError
from steerscope.hub.audit.log import AuditUnavailableError
from steerscope.hub.auditing import Auditor
from steerscope.hub.auth.identity import (
    authorise_policy,
    authorise_policy_name,
    current_identity,
)
from steerscope.hub.control import ControlPlane
from steerscope.hub.conversions import (
    FEATURES,
    POLICIES,
    catalog_message,
    feature_message,
    policy_message,
)
from steerscope.hub.drafts import Drafting, repeatable, update_fields
from steerscope.hub.fields import page, page_after, plain_name
from steerscope.hub.filters import feature_filter, policy_filter
from steerscope.hub.governance import Governance
from steerscope.hub.live import LiveSteering
from steerscope.hub.policies import Draft, StoredPolicy
from steerscope.hub.policy_store import PolicyStore
from steerscope.hub.refusals import NotFoundError, refusing

Done = TypeVar("Done")


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
        is_wanted = feature_filter(request.filter, self._catalog)
        names = [f.name for f in self._catalog.document.features if is_wanted(f)]
        names, token = page(names, request.page_size, request.page_token)
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
        live: LiveSteering,
        governance: Governance,
        auditor: Auditor,
    ) -> None:
        self._auditor = auditor
        self._live = live
        self._governance = governance
        self._drafting = Drafting(catalog, settings)
        self._store = store
        self._control = control

    @refusing
    async def CreatePolicy(
        self, request: steering_pb2.CreatePolicyRequest, context: Any
    ) -> steering_pb2.CreatePolicyResponse:
        if request.policy.name not in ("", POLICIES + request.policy_id):
            raise SpecError("policy.name", f"must be {POLICIES}{request.policy_id} or empty")
        draft = self._drafting.new(request.policy_id, "policy_id", request.policy)
        caller = current_identity()
        authorise_policy(caller, draft.policy)
        call = repeatable(request, caller.name)
        stored = await self._carried_out(
            self._store.create(draft, call, validate_only=request.validate_only),
            request.validate_only,
            lambda stored: self._auditor.policy_stored(stored, None, caller.name),
        )
        return steering_pb2.CreatePolicyResponse(policy=policy_message(stored))

    @refusing
    async def GetPolicy(
        self, request: steering_pb2.GetPolicyRequest, context: Any
    ) -> steering_pb2.GetPolicyResponse:
        name, at, revision_id = plain_name(request.name, POLICIES).partition("@")
        revisions = self._revisions(name)
        if at:
            revisions = [r for r in revisions if r.revision_id == revision_id]
        if not revisions:
            raise NotFoundError(f"policy {name!r} has no revision {revision_id[:80]!r}")
        found = policy_message(revisions[0], with_revision=bool(at))
        return steering_pb2.GetPolicyResponse(policy=found)

    @refusing
    async def ListPolicies(
        self, request: steering_pb2.ListPoliciesRequest, context: Any
    ) -> steering_pb2.ListPoliciesResponse:
        is_wanted = policy_filter(request.filter)
        stored = {each.policy.name: each for each in self._store.all() if is_wanted(each)}
        names, token = page(list(stored), request.page_size, request.page_token)
        return steering_pb2.ListPoliciesResponse(
            policies=[policy_message(stored[name]) for name in names], next_page_token=token
        )

    @refusing
    async def ListPolicyRevisions(
        self, request: steering_pb2.ListPolicyRevisionsRequest, context: Any
    ) -> steering_pb2.ListPolicyRevisionsResponse:
        revisions = self._revisions(plain_name(request.name, POLICIES))
        found, token = page_after(
            revisions, lambda r: r.revision_id, request.page_size, request.page_token
        )
        return steering_pb2.ListPolicyRevisionsResponse(
            policies=[policy_message(each, with_revision=True) for each in found],
            next_page_token=token,
        )

    @refusing
    async def UpdatePolicy(
        self, request: steering_pb2.UpdatePolicyRequest, context: Any
    ) -> steering_pb2.UpdatePolicyResponse:
        message, caller = request.policy, current_identity()
        name = plain_name(message.name, POLICIES, "policy.name")
        authorise_policy_name(caller, name)
        fields = update_fields(request)
        before = self._store.get(name)

        def merge(current: StoredPolicy | None) -> Draft:
            if current is None:
                draft = self._drafting.new(name, "policy.name", message)
            else:
                draft = self._drafting.merged(current, message, fields)
            authorise_policy(caller, draft.policy)
            return draft

        stored = await self._carried_out(
            self._store.update(
                name,
                merge,
                etag=message.etag,
                allow_missing=request.allow_missing,
                validate_only=request.validate_only,
            ),
            request.validate_only,
            lambda stored: self._auditor.policy_stored(stored, before, caller.name),
        )
        return steering_pb2.UpdatePolicyResponse(policy=policy_message(stored))

    @refusing
    async def DeletePolicy(
        self, request: steering_pb2.DeletePolicyRequest, context: Any
    ) -> steering_pb2.DeletePolicyResponse:
        name = plain_name(request.name, POLICIES)
        caller = current_identity()
        authorise_policy_name(caller, name)
        before = self._store.get(name)
        deletion = self._store.delete(
            name,
            etag=request.etag,
            allow_missing=request.allow_missing,
            validate_only=request.validate_only,
        )

        def tell(_: object) -> None:
            if before is not None:
                self._auditor.policy_deleted(before, caller.name)

        await self._carried_out(deletion, request.validate_only, tell)
        return steering_pb2.DeletePolicyResponse()

    @refusing
    async def SteerRequest(
        self, request: steering_pb2.SteerRequestRequest, context: Any
    ) -> steering_pb2.SteerRequestResponse:
        return await self._live.steer(request, context)

    @refusing
    async def ReleaseRequest(
        self, request: steering_pb2.ReleaseRequestRequest, context: Any
    ) -> steering_pb2.ReleaseRequestResponse:
        return await self._live.release(request, context)

    @refusing
    async def GetRules(
        self, request: steering_pb2.GetRulesRequest, context: Any
    ) -> steering_pb2.GetRulesResponse:
        return self._governance.get()

    @refusing
    async def UpdateRules(
        self, request: steering_pb2.UpdateRulesRequest, context: Any
    ) -> steering_pb2.UpdateRulesResponse:
        return await self._governance.update(request)

    def _revisions(self, name: str) -> list[StoredPolicy]:
        """A policy's revisions, newest first; ``NotFoundError`` if there is no such policy."""
        revisions = self._store.revisions(name)
        if not revisions:
            raise NotFoundError(f"no policy {name[:80]!r}")
        return list(revisions)

    async def _carried_out(
        self,
        change: Coroutine[Any, Any, Done],
        validate_only: bool,
        tell: Callable[[Done], object],
    ) -> Done:
        """Store, tell the audit log, publish, also if the caller hangs up.

        Refused beforehand while the audit log cannot be written and must be.
        """
        try:
            self._auditor.check()
        except AuditUnavailableError:
            change.close()
            raise

        async def both() -> Done:
            done = await change
            if not validate_only:
                tell(done)
                await self._control.publish()
            return done

        return await asyncio.shield(both())
