"""What each RPC requires: the one table. An RPC that is not in it is denied to everyone.

Reading is ``observe``. What concerns one request, or policies that the caller's allow-list
names, is ``steer``. What holds for all traffic is ``admin``.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from steerscope.security import Scope

OPEN = None

REQUIRED: Mapping[str, Scope | None] = MappingProxyType(
    {
        "/grpc.health.v1.Health/Check": OPEN,
        "/grpc.health.v1.Health/List": Scope.OBSERVE,
        "/grpc.health.v1.Health/Watch": OPEN,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.OBSERVE,
        "/steerscope.v1.CatalogService/GetCatalog": Scope.OBSERVE,
        "/steerscope.v1.CatalogService/GetFeature": Scope.OBSERVE,
        "/steerscope.v1.CatalogService/ListFeatures": Scope.OBSERVE,
        "/steerscope.v1.SteeringService/CreatePolicy": Scope.STEER,
        "/steerscope.v1.SteeringService/GetPolicy": Scope.OBSERVE,
        "/steerscope.v1.SteeringService/ListPolicies": Scope.OBSERVE,
        "/steerscope.v1.SteeringService/UpdatePolicy": Scope.STEER,
        "/steerscope.v1.SteeringService/DeletePolicy": Scope.STEER,
        "/steerscope.v1.SteeringService/ListPolicyRevisions": Scope.OBSERVE,
        "/steerscope.v1.SteeringService/SteerRequest": Scope.STEER,
        "/steerscope.v1.SteeringService/ReleaseRequest": Scope.STEER,
        "/steerscope.v1.SteeringService/GetRules": Scope.OBSERVE,
        "/steerscope.v1.SteeringService/UpdateRules": Scope.ADMIN,
        "/steerscope.v1.TelemetryService/GetRequestReport": Scope.OBSERVE,
        "/steerscope.v1.TelemetryService/WatchActivations": Scope.OBSERVE,
        "/steerscope.v1.TelemetryService/WatchRequests": Scope.OBSERVE,
        "/steerscope.v1.TelemetryService/WatchSignals": Scope.OBSERVE,
    }
)
"""By full method, as gRPC names it."""


def is_open(method: str) -> bool:
    """Whether anyone may call it, credentials or not."""
    return method in REQUIRED and REQUIRED[method] is OPEN
