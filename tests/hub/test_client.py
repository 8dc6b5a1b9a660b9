"""Both clients against a real hub: they ask and answer alike."""

import asyncio
import dataclasses
import inspect
import socket
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from auth_world import Secured, hub_with, somebody
from hub_world import frame, start
from steerscope.api.v1 import steering_pb2 as pb
from steerscope.client import AsyncClient, CallError, Client, Credentials
from steerscope.client.call import Listing
from steerscope.client.policy_calls import list_policies
from steerscope.errors import ConfigError, SpecError
from steerscope.steering.rules import Binding, Match, Override, OverrideMode

pytestmark = pytest.mark.timeout(60)

CLAMP = {"feature": "known", "clamp": 6.0}
LOOP = asyncio.new_event_loop()
"""One for all: gRPC's threads do not like loops that are closed."""


class Blocking:
    """An ``AsyncClient`` whose methods are waited for, so that one test serves both clients."""

    def __init__(self, *arguments, **options):
        self.loop = LOOP

        async def make():
            return AsyncClient(*arguments, **options)

        self.client = self.loop.run_until_complete(make())

    def __getattr__(self, name):
        method = getattr(self.client, name)

        def waited_for(*arguments, **options):
            return self.loop.run_until_complete(method(*arguments, **options))

        return waited_for

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.loop.run_until_complete(self.client.close())


KINDS = {"sync": Client, "async": Blocking}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def either(kind, shared_hub):
    """One client of each kind in turn."""
    with kind(f"127.0.0.1:{shared_hub.grpc_port}") as client:
        yield client


@pytest.fixture
def name(request):
    """A policy's name that no other test has."""
    return "p" + "".join(c if c.isalnum() else "-" for c in request.node.name.lower())[-60:]


def public(kind):
    return {name for name in vars(kind) if not name.startswith("_")}


def test_both_clients_have_the_same_methods_with_the_same_parameters():
    assert public(Client) == public(AsyncClient)
    for name in public(Client) - {"call", "call_for_all", "watch"}:
        one, other = getattr(Client, name), getattr(AsyncClient, name)
        assert inspect.signature(one) == inspect.signature(other)
        assert one.__doc__


def test_a_method_shows_its_parameters_without_the_client(shared_hub):
    with Client("127.0.0.1:1") as client:
        assert list(inspect.signature(client.get_policy).parameters) == [
            "name",
            "revision_id",
            "timeout",
        ]


def test_features_and_the_catalog_are_read(either):
    assert either.get_catalog().num_features == 3
    assert either.get_feature("known").label == "Known entity"
    assert [f.name for f in either.list_features("layer > 1")] == ["features/late"]


def test_a_policy_is_created_changed_in_part_and_deleted(either, name):
    made = either.create_policy(name, [CLAMP], max_dose=0.5, annotations={"team": "a"})
    changed = either.update_policy(name, max_dose=None, description="free", etag=made.etag)
    assert not changed.HasField("max_dose")
    assert (changed.description, dict(changed.annotations)) == ("free", {"team": "a"})
    newest, oldest = either.list_policy_revisions(name)
    assert (newest.description, oldest.description) == ("free", "")
    assert either.get_policy(name, made.revision_id).max_dose == 0.5
    either.delete_policy(name, etag=changed.etag)
    with pytest.raises(CallError) as caught:
        either.get_policy(name)
    assert (caught.value.code, caught.value.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_an_etag_of_another_version_changes_nothing(either, name):
    made = either.create_policy(name, [CLAMP])
    either.update_policy(name, description="newer", etag=made.etag)
    for call in (
        lambda: either.update_policy(name, description="lost", etag=made.etag),
        lambda: either.delete_policy(name, etag=made.etag),
    ):
        with pytest.raises(CallError) as caught:
            call()
        assert (caught.value.code, caught.value.reason) == (
            grpc.StatusCode.ABORTED,
            "ETAG_MISMATCH",
        )
    assert either.get_policy(name).description == "newer"


def test_a_policy_may_end_at_a_moment(either, name):
    end = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)
    made = either.create_policy(name, [CLAMP], expire_time=end)
    assert made.expire_time.ToDatetime(UTC) == end
    assert not either.update_policy(name, expire_time=None).HasField("expire_time")


@pytest.mark.parametrize(
    ("when", "field"),
    [
        ({"expire_time": datetime(2100, 1, 1)}, "expire_time"),
        ({"expire_time": datetime(2100, 1, 1, tzinfo=UTC), "ttl": 3.0}, "expire_time"),
    ],
)
def test_an_end_that_says_too_little_or_too_much_is_refused(either, name, when, field):
    with pytest.raises(SpecError) as caught:
        either.create_policy(name, [CLAMP], **when)
    assert caught.value.field == field


def test_lists_are_whole_however_small_their_pages(either, name):
    for i in range(5):
        either.create_policy(f"{name[:50]}-{i}", [CLAMP], annotations={"of": name})
    listing = list_policies(f'annotations.of = "{name}"')
    assert isinstance(listing, Listing)
    request = type(listing.request)()
    request.CopyFrom(listing.request)
    request.page_size = 2
    found = either.call_for_all(dataclasses.replace(listing, request=request))
    assert [policy.name for policy in found] == [f"policies/{name[:50]}-{i}" for i in range(5)]


def test_a_refused_field_is_told_by_its_path(either, name):
    with pytest.raises(SpecError) as caught:
        either.create_policy(name, [{"feature": "nobody", "clamp": 1.0}])
    assert caught.value.field == "policy.interventions[0].feature"


def test_an_order_names_its_own_fields_without_a_policy_before_them(either):
    with pytest.raises(SpecError) as caught:
        either.steer_request("chatcmpl-x", interventions=[{"feature": "known"}])
    assert caught.value.field == "interventions[0]"


def test_an_order_waits_and_is_voided(either, name):
    told = either.steer_request(f"chatcmpl-{name}", policy="force-known", ttl=30.0)
    assert told.state == pb.STEER_STATE_WAITING
    assert either.release_request(f"chatcmpl-{name}") == []


def test_rules_come_back_as_they_were_given(either):
    try:
        binding = Binding(name="beta", match=Match(model="demo"), policy="force-known")
        override = Override(mode=OverrideMode.OFF, reason="drill")
        told = either.update_rules(
            default_policy="force-known", bindings=[binding], override=override
        )
        now = either.get_rules()
        assert told.in_force == now
        assert now.rules.default_policy == "force-known"
        assert now.rules.bindings == (binding,)
        assert now.rules.override == override
        assert now.update_time is not None
        either.update_rules(override=None, etag=now.etag)
        assert either.get_rules().rules.override is None
        assert either.get_rules().rules.bindings == (binding,)
        with pytest.raises(CallError) as caught:
            either.update_rules(default_policy=None, etag=now.etag)
        assert caught.value.code is grpc.StatusCode.ABORTED
        assert either.get_rules().rules.default_policy == "force-known"
    finally:
        either.update_rules(default_policy=None, bindings=[], override=None)


def test_rules_that_are_only_checked_are_not_in_force(either):
    told = either.update_rules(default_policy="force-known", validate_only=True)
    assert told.in_force.rules.default_policy == "force-known"
    assert either.get_rules().rules.default_policy is None


def test_a_report_is_waited_for(either, shared_hub, worker_of, catalog, name):
    worker = worker_of(shared_hub)
    worker.send(frame(catalog, (name, 0, 2), started=(start(name, 2),), finished=(name,)))
    report = either.get_request_report(name, wait=5.0)
    assert report.completions[0].complete


@pytest.mark.parametrize("where", ["call", "client"])
def test_a_deadline_holds_for_a_hub_that_does_not_answer(kind, where):
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        limits = ({}, {"timeout": 0.3}) if where == "call" else ({"timeout": 0.3}, {})
        with kind(address, **limits[0]) as client, pytest.raises(CallError) as caught:
            client.get_catalog(**limits[1])
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_tokens_and_certificates_are_shown(kind, catalog_folder, tmp_path):
    secured, team = Secured(tmp_path), somebody("team-a", "observe")
    with hub_with(catalog_folder, tls=secured.tls(), identities=[team.tree]) as hub:
        address = f"127.0.0.1:{hub.grpc_port}"
        with kind(address, Credentials(ca=secured.ca, token=team.token)) as client:
            assert client.get_catalog().num_features == 3
            with pytest.raises(CallError) as caught:
                client.create_policy("mine", [CLAMP])
            assert caught.value.code is grpc.StatusCode.PERMISSION_DENIED
        with kind(address, Credentials(ca=secured.ca)) as client:
            with pytest.raises(CallError) as caught:
                client.get_catalog()
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED


def test_no_token_is_sent_in_cleartext_beyond_loopback(kind):
    with pytest.raises(ConfigError, match="beyond loopback"):
        kind("hub.example:50051", Credentials(token="sst_x"))
