import math

import grpc
import msgspec
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from steerscope.api.v1 import steering_pb2 as pb
from steerscope.api.v1 import steering_pb2_grpc
from steerscope.client import Client
from steerscope.config import SteeringSettings
from steerscope.errors import HubError, SpecError
from steerscope.hub import launcher
from steerscope.hub.link import FrontendLink
from steerscope.steering.interventions import Intervention, Phase, When

pytestmark = pytest.mark.timeout(60)

CLAMP = {"feature": "known", "clamp": 6.0}


@pytest.fixture
def stub(shared_hub):
    with grpc.insecure_channel(f"127.0.0.1:{shared_hub.grpc_port}") as channel:
        yield steering_pb2_grpc.SteeringServiceStub(channel)


def refusal(call):
    """The status code, the only ErrorInfo, and the BadRequest's field of a refused call."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    status = rpc_status.from_call(caught.value)
    infos, fields = [], []
    for detail in status.details:
        info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
        if detail.Unpack(info):
            infos.append(info)
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
    (info,) = infos
    assert info.domain == "steerscope"
    return caught.value.code(), info.reason, fields


def creation(*interventions, policy_id="refused", **policy):
    return pb.CreatePolicyRequest(
        policy_id=policy_id, policy=pb.Policy(interventions=interventions, **policy)
    )


def test_a_policy_comes_back_as_it_was_created(client):
    edit = Intervention(
        feature="known",
        at_least=2.5,
        phase=Phase.GENERATION,
        only_if_active=True,
        when=When(feature="unknown", above=0.5),
        span=(3, 9),
    )
    created = client.create_policy("round-trip", [edit], max_dose=0.5, description="all of it")
    assert created == client.get_policy("round-trip")
    assert created.max_dose == 0.5
    assert created.name == "policies/round-trip"
    assert created.description == "all of it"
    assert created.origin == pb.POLICY_ORIGIN_CREATED
    assert created.etag
    (got,) = created.interventions
    assert (got.feature, got.at_least, got.phase) == ("known", 2.5, pb.PHASE_GENERATION)
    assert (got.when.feature, got.when.above, got.when.HasField("below")) == ("unknown", 0.5, False)
    assert (got.only_if_active, got.span.start, got.span.end) == (True, 3, 9)


@pytest.mark.parametrize("dose", [0.0, -1.0, float("nan"), float("inf")])
def test_a_dose_that_is_none_is_refused_by_field(client, dose):
    with pytest.raises(SpecError) as caught:
        client.create_policy("dosed", [CLAMP], max_dose=dose)
    assert caught.value.field == "policy.max_dose"
    assert "dosed" not in [policy.name for policy in client.list_policies()]


def test_a_dose_over_the_operators_cap_is_refused_by_field(settings):
    capped = msgspec.structs.replace(settings, steering=SteeringSettings(max_dose=0.5))
    hub = launcher.start_hub(capped)
    try:
        with Client(f"127.0.0.1:{hub.grpc_port}") as client:
            assert client.create_policy("within", [CLAMP], max_dose=0.5).max_dose == 0.5
            with pytest.raises(SpecError, match=r"0\.6 is over the cap of 0\.5") as caught:
                client.create_policy("beyond", [CLAMP], max_dose=0.6)
            assert caught.value.field == "policy.max_dose"
    finally:
        hub.stop()


@pytest.mark.parametrize("op", ["clamp", "ablate", "at_least", "at_most", "scale", "add"])
def test_every_operation_can_be_stored(client, op):
    value = True if op == "ablate" else 1.5
    created = client.create_policy(f"op-{op.replace('_', '-')}", [{"feature": "known", op: value}])
    assert created.interventions[0].WhichOneof("op") == op


def test_a_feature_may_be_given_by_its_resource_name(stub):
    request = creation(pb.Intervention(feature="features/known", add=1.0), policy_id="by-resource")
    assert stub.CreatePolicy(request).policy.interventions[0].feature == "known"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (creation(pb.Intervention(feature="nobody", clamp=1.0)), "policy.interventions[0].feature"),
        (creation(pb.Intervention(feature="late", clamp=1.0)), "policy.interventions[0].feature"),
        (
            creation(pb.Intervention(feature="known", clamp=math.nan)),
            "policy.interventions[0].clamp",
        ),
        (creation(pb.Intervention(feature="known", add=math.inf)), "policy.interventions[0].add"),
        (creation(pb.Intervention(feature="known")), "policy.interventions[0]"),
        (
            creation(pb.Intervention(feature="known", ablate=False)),
            "policy.interventions[0].ablate",
        ),
        (creation(), "policy.interventions"),
        (
            creation(pb.Intervention(feature="known", add=1.0, span=pb.Span(start=4, end=4))),
            "policy.interventions[0].span",
        ),
        (
            creation(
                pb.Intervention(feature="known", add=1.0, when=pb.When(feature="late", above=0))
            ),
            "policy.interventions[0].when.feature",
        ),
        (
            creation(pb.Intervention(feature="known", add=1.0, when=pb.When(feature="unknown"))),
            "policy.interventions[0].when",
        ),
        (
            creation(*[pb.Intervention(feature="known", add=1.0)] * 2),
            "policy.interventions[1].feature",
        ),
        (creation(pb.Intervention(feature="known", add=1.0), policy_id="Bad Name"), "policy_id"),
        (creation(pb.Intervention(feature="known", add=1.0), name="policies/other"), "policy.name"),
    ],
)
def test_a_bad_policy_is_refused_with_the_path_of_its_field(stub, request_, field):
    code, reason, fields = refusal(lambda: stub.CreatePolicy(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert reason
    assert fields == [field]


def test_the_client_refuses_two_operations_in_one_edit(client):
    with pytest.raises(SpecError) as caught:
        client.create_policy("two", [{"feature": "known", "clamp": 1.0, "ablate": True}])
    assert caught.value.field == "policy.interventions[0]"


def test_the_client_raises_the_hubs_refusal_with_its_field(client):
    with pytest.raises(SpecError) as caught:
        client.create_policy("nobody", [{"feature": "nobody", "clamp": 1.0}])
    assert caught.value.field == "policy.interventions[0].feature"


def test_validate_only_stores_nothing(client):
    assert client.create_policy("checked", [CLAMP], validate_only=True).etag == ""
    with pytest.raises(HubError, match="NOT_FOUND"):
        client.get_policy("checked")


def test_validate_only_refuses_what_creation_would(client):
    with pytest.raises(SpecError):
        client.create_policy("checked", [{"feature": "nobody", "add": 1.0}], validate_only=True)


@pytest.mark.parametrize("name", ["force-known", "inline", "unknown", "taken"])
def test_a_name_that_is_taken_or_reserved_is_refused(client, stub, name):
    if name == "taken":
        client.create_policy("taken", [CLAMP])
    request = creation(pb.Intervention(feature="known", add=1.0), policy_id=name)
    code, reason, _ = refusal(lambda: stub.CreatePolicy(request))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "POLICY_EXISTS")


def test_a_policy_of_the_catalog_cannot_be_deleted(stub):
    request = pb.DeletePolicyRequest(name="policies/force-known")
    code, reason, _ = refusal(lambda: stub.DeletePolicy(request))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POLICY_READ_ONLY")


def test_a_stale_etag_protects_a_policy_from_deletion(client, stub):
    old = client.create_policy("fickle", [CLAMP])
    client.delete_policy("fickle")
    new = client.create_policy("fickle", [CLAMP])
    assert new.etag != old.etag
    request = pb.DeletePolicyRequest(name="policies/fickle", etag=old.etag)
    code, reason, _ = refusal(lambda: stub.DeletePolicy(request))
    assert (code, reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    client.delete_policy("fickle", etag=new.etag)
    assert refusal(lambda: stub.GetPolicy(pb.GetPolicyRequest(name="policies/fickle")))[0] is (
        grpc.StatusCode.NOT_FOUND
    )


@pytest.mark.parametrize("name", ["", "force-known", "policies/", "features/known"])
def test_a_malformed_resource_name_is_an_invalid_argument(stub, name):
    code, _, fields = refusal(lambda: stub.GetPolicy(pb.GetPolicyRequest(name=name)))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["name"])


def test_pages_hold_every_policy_once_in_order(client, stub):
    for i in range(5):
        client.create_policy(f"page-{i}", [CLAMP])
    names, token = [], ""
    while True:
        page = stub.ListPolicies(pb.ListPoliciesRequest(page_size=2, page_token=token))
        assert len(page.policies) <= 2
        names += [policy.name for policy in page.policies]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(set(names))
    assert {f"policies/page-{i}" for i in range(5)} <= set(names)
    assert names == [policy.name for policy in client.list_policies()]


def test_a_negative_page_size_is_refused(stub):
    code, _, fields = refusal(lambda: stub.ListPolicies(pb.ListPoliciesRequest(page_size=-1)))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_size"])


def test_a_front_end_has_a_policy_as_soon_as_its_creation_returns(hub, catalog):
    link = FrontendLink(hub.endpoint, catalog.digest)
    link.start()
    try:
        with Client(f"127.0.0.1:{hub.grpc_port}") as client:
            for i in range(20):
                client.create_policy(f"fresh-{i}", [CLAMP])
                assert f"fresh-{i}" in link.policies
            client.delete_policy("fresh-3")
            assert "fresh-3" not in link.policies
    finally:
        link.close()


def test_a_phase_that_the_enum_does_not_have_is_refused(stub):
    edit = pb.Intervention(feature="known", add=1.0, phase=99)
    code, _, fields = refusal(lambda: stub.CreatePolicy(creation(edit)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields == ["policy.interventions[0].phase"]
