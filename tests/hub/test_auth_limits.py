"""How much a caller may ask, of the hub and of the parts that count."""

import asyncio
import contextlib
import ipaddress

import grpc
import grpc.aio
import httpx
import pytest
from auth_world import channel_to, details, hub_with, somebody
from hub_world import eventually
from steerscope.api.v1 import (
    catalog_pb2,
    catalog_pb2_grpc,
    telemetry_pb2,
    telemetry_pb2_grpc,
)
from steerscope.client.channel import Credentials
from steerscope.hub.auth import gate as gates
from steerscope.hub.auth import interceptor, limits
from steerscope.hub.auth.denials import DeniedError, ExhaustedError, UnauthenticatedError
from steerscope.hub.auth.identity import (
    authorise_spec,
    authorise_steers,
    authorise_use,
    current_identity,
)
from steerscope.security import Identity, Rate, Scope, Security
from steerscope.steering.interventions import Intervention, SteeringSpec

pytestmark = pytest.mark.timeout(60)


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def identity(name="team-a", scopes=(Scope.STEER,), **fields):
    return Identity(name=name, scopes=scopes, **fields)


def get_catalog(channel):
    return catalog_pb2_grpc.CatalogServiceStub(channel).GetCatalog(
        catalog_pb2.GetCatalogRequest(), timeout=5
    )


def test_calls_beyond_the_rate_are_refused_with_when_to_come_back(catalog_folder):
    rate = {"requests_per_second": 0.01, "burst": 5}
    team, other = somebody("team-a", "observe", rate=rate), somebody("other", "observe")
    with (
        hub_with(catalog_folder, identities=[team.tree, other.tree]) as hub,
        channel_to(hub, Credentials(token=team.token)) as channel,
        channel_to(hub, Credentials(token=other.token)) as neighbour,
    ):
        for _ in range(5):
            get_catalog(channel)
        with pytest.raises(grpc.RpcError) as caught:
            get_catalog(channel)
        get_catalog(neighbour)
        url = f"http://127.0.0.1:{hub.http_port}/v1/steerscope/requests/a"
        headers = {"authorization": f"Bearer {team.token}"}
        over_http = httpx.get(url, headers=headers, timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    found = details(caught.value)
    assert found["ErrorInfo"].reason == "RATE_LIMITED"
    assert 60 < found["RetryInfo"].retry_delay.seconds <= 100
    assert over_http.status_code == 429
    assert 60 < int(over_http.headers["retry-after"]) <= 100


def test_streams_beyond_the_limit_are_refused_until_one_ends(catalog_folder):
    team = somebody("team-a", "observe", max_concurrent_streams=2)
    with (
        hub_with(catalog_folder, identities=[team.tree]) as hub,
        channel_to(hub, Credentials(token=team.token)) as channel,
    ):
        stub = telemetry_pb2_grpc.TelemetryServiceStub(channel)

        def watch():
            return stub.WatchRequests(telemetry_pb2.WatchRequestsRequest(), timeout=20)

        streams = [watch(), watch()]
        for stream in streams:
            stream.initial_metadata()
        with pytest.raises(grpc.RpcError) as caught:
            next(watch())
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert details(caught.value)["ErrorInfo"].reason == "TOO_MANY_STREAMS"
        streams[0].cancel()

        def opens_again():
            stream = watch()
            stream.initial_metadata()
            with contextlib.suppress(grpc.FutureTimeoutError):
                return stream.exception(timeout=0.1) is None
            return True

        eventually(opens_again)


def test_failures_are_throttled_but_good_credentials_always_pass(catalog_folder):
    team = somebody("team-a", "observe")
    with (
        hub_with(catalog_folder, identities=[team.tree]) as hub,
        channel_to(hub, Credentials(token="sst_wrong")) as attacker,
        channel_to(hub, Credentials(token=team.token)) as channel,
    ):
        seen = []
        for _ in range(limits.FAILURES.burst * 3):
            with pytest.raises(grpc.RpcError) as caught:
                get_catalog(attacker)
            seen.append(caught.value.code())
            if seen[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED:
                break
        assert set(seen[:-1]) == {grpc.StatusCode.UNAUTHENTICATED}
        assert seen[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "RetryInfo" in details(caught.value)
        get_catalog(channel)


def test_a_bucket_fills_at_its_rate_and_not_beyond_its_burst():
    usage, rate = limits.Usage(), Rate(requests_per_second=2.0, burst=3)
    assert [usage.take(rate, 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert usage.take(rate, 100.5) == 0.0
    assert usage.take(rate, 100.5) == 0.5
    assert [usage.take(rate, 1000.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_callers_are_forgotten_rather_than_kept_without_bound():
    counted = limits.Limits(Clock())
    error = UnauthenticatedError("NO_CREDENTIALS", "x")
    nobody = identity("anonymous", (Scope.OBSERVE,))
    for number in range(3 * limits.MAX_CALLERS):
        peer = f"ipv4:{ipaddress.IPv4Address(number)}:1"
        counted.failure(error, peer)
        counted.call(nobody, peer)
    assert len(counted._failed) == len(counted._anonymous) == limits.MAX_CALLERS


def test_strangers_are_told_apart_by_network():
    assert limits.network("ipv4:10.1.2.3:5555") == "10.1.2.3"
    assert limits.network("ipv6:%5B2001:db8::1%5D:5555") == "2001:db8::/64"
    assert limits.network("ipv6:[2001:db8::ffff:1]:5555") == "2001:db8::/64"
    assert limits.network("ipv6:%5B::ffff:10.1.2.3%5D:5555") == "10.1.2.3"
    assert limits.network("2001:db8::7") == "2001:db8::/64"
    assert limits.network("unix:/run/x") == "unknown"


def test_a_team_steers_no_more_requests_at_once_than_it_may():
    team = identity(max_concurrent_steers=2)
    authorise_steers(team, 1)
    with pytest.raises(ExhaustedError, match="steers 2 requests already, 2 are allowed"):
        authorise_steers(team, 2)


def test_a_policy_may_be_used_by_name_whatever_it_edits_but_not_whatever_its_dose():
    team = identity(policies=("force-*",), max_dose=0.5)
    edits = (Intervention(feature="secret", add=1.0),)
    authorise_use(team, "force-x", SteeringSpec(interventions=edits, max_dose=0.5))
    for name, dose in (("forced", 0.5), ("force-x", 0.6), ("force-x", None)):
        with pytest.raises(DeniedError):
            authorise_use(team, name, SteeringSpec(interventions=edits, max_dose=dose))


def test_edits_without_a_name_need_their_features_allowed():
    team = identity(features=("known",))
    authorise_spec(team, SteeringSpec(interventions=(Intervention(feature="known", add=1.0),)))
    with pytest.raises(DeniedError, match="'Known'"):
        authorise_spec(team, SteeringSpec(interventions=(Intervention(feature="Known", add=1.0),)))


def test_an_admin_is_not_bound_by_lists():
    edits = (Intervention(feature="any", add=1.0),)
    authorise_use(identity("boss", (Scope.ADMIN,)), "any", SteeringSpec(interventions=edits))


def test_outside_of_a_call_there_is_no_identity():
    with pytest.raises(LookupError):
        current_identity()


async def call_alone(behaviour, path="/steerscope.v1.CatalogService/GetCatalog"):
    """Serve one method by itself behind the gate of a hub for oneself, and call it."""
    addresses = {"hub.grpc_address": "127.0.0.1:0"}
    guarded = gates.guard(Security(), addresses)
    server = grpc.aio.server(interceptors=[interceptor.AccessInterceptor(guarded.gate)])
    service, method = path[1:].split("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(behaviour)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            return await channel.unary_unary(path)(b"")
    finally:
        await server.stop(0)


def test_an_rpc_that_the_table_does_not_hold_is_denied_even_to_an_admin():
    async def never(request, context):
        raise AssertionError("it was served")

    with pytest.raises(grpc.RpcError) as caught:
        asyncio.run(call_alone(never, "/steerscope.v1.CatalogService/DropEverything"))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_a_unary_call_without_a_deadline_ends_all_the_same(monkeypatch):
    monkeypatch.setattr(interceptor, "MAX_UNARY_SECONDS", 0.05)

    async def hangs(request, context):
        await asyncio.sleep(30)

    with pytest.raises(grpc.RpcError) as caught:
        asyncio.run(call_alone(hangs))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_services_know_who_calls():
    async def tells(request, context):
        return current_identity().name.encode()

    assert asyncio.run(call_alone(tells)) == b"anonymous"
