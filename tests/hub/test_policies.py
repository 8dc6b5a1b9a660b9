import math
import time
import uuid

import grpc
import msgspec
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hub_world import eventually
from steerscope.api.v1 import catalog_pb2, catalog_pb2_grpc, steering_pb2_grpc
from steerscope.api.v1 import steering_pb2 as pb
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


def changed(name, *paths, etag="", **policy):
    """An UpdatePolicyRequest."""
    return pb.UpdatePolicyRequest(
        policy=pb.Policy(name=f"policies/{name}", etag=etag, **policy),
        update_mask=FieldMask(paths=paths),
    )


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


def test_a_creation_asked_for_again_gets_the_same_answer(client):
    call = {"description": "once", "request_id": str(uuid.uuid4())}
    first = client.create_policy("once", [CLAMP], **call)
    assert client.create_policy("once", [CLAMP], **call) == first
    client.update_policy("once", description="since then changed")
    assert client.create_policy("once", [CLAMP], **call) == first
    assert client.get_policy("once").description == "since then changed"
    client.delete_policy("once")
    assert client.create_policy("once", [CLAMP], **call) == first
    with pytest.raises(HubError, match="NOT_FOUND"):
        client.get_policy("once")


def test_a_request_id_used_for_something_else_is_refused(client, stub):
    request = creation(pb.Intervention(feature="known", add=1.0), policy_id="first-use")
    request.request_id = str(uuid.uuid4())
    stub.CreatePolicy(request)
    request.policy_id = "second-use"
    code, reason, _ = refusal(lambda: stub.CreatePolicy(request))
    assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert "policies/second-use" not in [policy.name for policy in client.list_policies()]


@pytest.mark.parametrize("request_id", ["again", "{}", str(uuid.UUID(int=0)), str(uuid.uuid1())])
def test_a_request_id_that_is_no_random_uuid_is_refused(stub, request_id):
    request = creation(pb.Intervention(feature="known", add=1.0))
    request.request_id = request_id
    code, _, fields = refusal(lambda: stub.CreatePolicy(request))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["request_id"])


def test_an_update_changes_what_its_mask_names_and_nothing_else(client, stub):
    edit, other = pb.Intervention(feature="known", add=1.0), pb.Intervention(feature="known", add=2)
    old = client.create_policy("masked", [CLAMP], max_dose=0.5, description="old", ttl=60)
    request = changed(
        "masked", "interventions", interventions=[other], description="not named", max_dose=0.1
    )
    new = stub.UpdatePolicy(request).policy
    assert new.interventions[0].add == 2.0
    assert (new.description, new.max_dose, new.expire_time) == ("old", 0.5, old.expire_time)
    assert new.create_time == old.create_time
    assert new.update_time.ToNanoseconds() > old.update_time.ToNanoseconds()
    assert len({new.etag, old.etag}) == len({new.revision_id, old.revision_id}) == 2
    cleared = stub.UpdatePolicy(changed("masked", "max_dose", "ttl", interventions=[edit])).policy
    assert not cleared.HasField("max_dose")
    assert not cleared.HasField("expire_time")
    assert cleared.interventions[0].add == 2.0


def test_an_update_without_a_mask_changes_what_is_given(client, stub):
    client.create_policy("given", [CLAMP], max_dose=0.5, description="old")
    new = stub.UpdatePolicy(changed("given", description="new")).policy
    assert (new.description, new.max_dose, new.interventions[0].clamp) == ("new", 0.5, 6.0)


def test_a_mask_of_everything_replaces_everything(client, stub):
    client.create_policy("whole", [CLAMP], max_dose=0.5, annotations={"team": "search"}, ttl=60)
    edit = pb.Intervention(feature="unknown", scale=0.5)
    new = stub.UpdatePolicy(changed("whole", "*", interventions=[edit])).policy
    assert new.interventions[0].scale == 0.5
    assert not new.annotations
    assert not new.HasField("max_dose")
    assert not new.HasField("expire_time")


@pytest.mark.parametrize("path", ["origin", "etag", "interventions.feature", "nothing", ""])
def test_a_mask_of_what_cannot_be_updated_is_refused(client, stub, path):
    client.create_policy("unmoved", [CLAMP])
    code, _, fields = refusal(lambda: stub.UpdatePolicy(changed("unmoved", path)))
    client.delete_policy("unmoved")
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["update_mask"])


def test_an_update_of_another_version_than_meant_is_aborted(client, stub):
    old = client.create_policy("contested", [CLAMP])
    new = client.update_policy("contested", description="theirs", etag=old.etag)
    request = changed("contested", description="ours", etag=old.etag)
    code, reason, _ = refusal(lambda: stub.UpdatePolicy(request))
    assert (code, reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert client.get_policy("contested") == new


def test_an_update_that_changes_nothing_makes_no_revision(client):
    created = client.create_policy("steady", [CLAMP], description="as it is")
    assert client.update_policy("steady", description="as it is") == created
    assert len(client.list_policy_revisions("steady")) == 1


def test_a_bad_update_is_refused_with_its_field_and_changes_nothing(client, stub):
    created = client.create_policy("guarded", [CLAMP])
    edit = pb.Intervention(feature="nobody", add=1.0)
    code, _, fields = refusal(
        lambda: stub.UpdatePolicy(changed("guarded", interventions=[edit], description="x"))
    )
    assert (code, fields) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        ["policy.interventions[0].feature"],
    )
    assert client.get_policy("guarded") == created


def test_a_missing_policy_is_updated_only_if_that_is_allowed(client, stub):
    request = changed("absent", interventions=[pb.Intervention(feature="known", add=1.0)])
    assert refusal(lambda: stub.UpdatePolicy(request))[0] is grpc.StatusCode.NOT_FOUND
    made = client.update_policy("absent", interventions=[CLAMP], allow_missing=True)
    assert client.get_policy("absent") == made
    with pytest.raises(SpecError) as caught:
        client.update_policy("Bad Name", interventions=[CLAMP], allow_missing=True)
    assert caught.value.field == "policy.name"


def test_validate_only_updates_and_deletes_nothing(client):
    created = client.create_policy("tried", [CLAMP])
    assert client.update_policy("tried", description="x", validate_only=True).description == "x"
    client.delete_policy("tried", validate_only=True)
    assert client.get_policy("tried") == created
    with pytest.raises(HubError, match="ABORTED"):
        client.delete_policy("tried", etag="other", validate_only=True)


def test_a_missing_policy_is_deleted_only_if_that_is_allowed(client):
    client.delete_policy("never-was", allow_missing=True)
    with pytest.raises(HubError, match="NOT_FOUND"):
        client.delete_policy("never-was")


def test_a_policy_of_the_catalog_cannot_be_updated(stub):
    code, reason, _ = refusal(lambda: stub.UpdatePolicy(changed("force-known", description="x")))
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "POLICY_READ_ONLY")


def test_revisions_are_kept_newest_first_and_can_be_asked_for(client, stub):
    made = [client.create_policy("history", [CLAMP], description="0")]
    made += [client.update_policy("history", description=str(i)) for i in range(1, 25)]
    kept = client.list_policy_revisions("history")
    assert [p.description for p in kept] == [str(i) for i in range(24, 4, -1)]
    assert kept[0].name == f"policies/history@{made[-1].revision_id}"
    assert client.get_policy("history", made[10].revision_id).description == "10"
    with pytest.raises(HubError, match="NOT_FOUND"):
        client.get_policy("history", made[0].revision_id)
    page = stub.ListPolicyRevisions(
        pb.ListPolicyRevisionsRequest(name="policies/history", page_size=15)
    )
    rest = stub.ListPolicyRevisions(
        pb.ListPolicyRevisionsRequest(
            name="policies/history", page_size=15, page_token=page.next_page_token
        )
    )
    assert [*page.policies, *rest.policies] == kept
    assert not rest.next_page_token


def test_an_expired_policy_is_gone_from_the_hub_and_its_front_ends_on_time(hub, front_end):
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:
        made = client.create_policy("brief", [CLAMP], ttl=0.5)
        assert "brief" in front_end.policies
        expires = made.expire_time.ToNanoseconds() / 1e9
        eventually(lambda: "brief" not in front_end.policies, 3.0)
        assert expires <= time.time() < expires + 1.0
        assert "policies/brief" not in [policy.name for policy in client.list_policies()]
        with pytest.raises(HubError, match="NOT_FOUND"):
            client.update_policy("brief", description="too late")
        again = client.create_policy("brief", [CLAMP])
        assert len(client.list_policy_revisions("brief")) == 1
        assert again.etag != made.etag


def test_a_policy_can_be_given_more_time(hub, front_end):
    with Client(f"127.0.0.1:{hub.grpc_port}") as client:
        client.create_policy("extended", [CLAMP], ttl=0.6)
        client.update_policy("extended", ttl=None)
        time.sleep(0.8)
        assert "extended" in front_end.policies


@pytest.mark.parametrize(
    ("expiration", "field"),
    [
        ({"expire_time": Timestamp(seconds=1)}, "policy.expire_time"),
        ({"expire_time": Timestamp(seconds=2**60)}, "policy.expire_time"),
        ({"expire_time": Timestamp(seconds=4_000_000_000, nanos=-1)}, "policy.expire_time"),
        ({"ttl": {}}, "policy.ttl"),
        ({"ttl": {"seconds": -5}}, "policy.ttl"),
        ({"ttl": {"seconds": 2**50}}, "policy.ttl"),
    ],
)
def test_a_time_that_cannot_be_is_refused(stub, expiration, field):
    request = creation(pb.Intervention(feature="known", add=1.0), **expiration)
    code, _, fields = refusal(lambda: stub.CreatePolicy(request))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


@pytest.mark.parametrize(
    "annotations",
    [
        {"Team": "x"},
        {"": "x"},
        {"a" * 64: "x"},
        {"a": "x" * 1025},
        {f"k{i}": "" for i in range(17)},
    ],
)
def test_annotations_are_bounded(client, annotations):
    with pytest.raises(SpecError) as caught:
        client.create_policy("noted", [CLAMP], annotations=annotations)
    assert caught.value.field == "policy.annotations"


def test_a_filter_keeps_what_it_describes(client):
    client.create_policy("team-a", [CLAMP], annotations={"team": 'the "a"'})
    client.create_policy("team-b", [{"feature": "unknown", "add": 1.0}], annotations={"team": "b"})
    gate = {"feature": "known", "above": 1.0}
    client.create_policy("gated", [{"feature": "unknown", "add": 1.0, "when": gate}])

    def named(filter):
        return {policy.name.removeprefix("policies/") for policy in client.list_policies(filter)}

    assert named("") >= {"team-a", "team-b", "gated", "force-known"}
    assert named('origin = "catalog"') == named("origin!=created") == {"force-known"}
    assert named('annotations.team = "the \\"a\\""') == {"team-a"}
    assert named("annotations.team != b AND annotations.team != nobody") >= {"team-a", "gated"}
    both = named('origin = created AND feature:"known"')
    assert {"team-a", "gated"} <= both
    assert not both & {"team-b", "force-known"}
    assert named("name = policies/gated") == named("name=gated") == {"gated"}
    assert named("state = invalid") == set()


@pytest.mark.parametrize(
    ("filter", "told"),
    [
        ("colour = red", "'colour'"),
        ("origin = theirs", "origin: 'theirs'"),
        ("feature = known", "feature: '='"),
        ("origin < created", "origin: '<'"),
        ("origin = created OR origin = config", "'OR'"),
        ("NOT origin = created", "NOT"),
        ("(origin = created)", r"'\(origin"),
        ("origin = created AND", "not a comparison"),
        ("origin created", "not a comparison"),
        ("origin = *", r"'\*'"),
        ('name = "open', '"open'),
        (" AND ".join(["name=a"] * 17), "16"),
        ("name=" + "a" * 1024, "1024"),
    ],
)
def test_a_filter_beyond_what_is_supported_is_refused_by_name(client, filter, told):
    with pytest.raises(SpecError, match=told) as caught:
        client.list_policies(filter)
    assert caught.value.field == "filter"


@pytest.mark.parametrize(
    ("filter", "names"),
    [
        ("", {"known", "unknown", "late"}),
        ("layer >= 2", {"late"}),
        ("layer < 2 AND steerable = true", {"known", "unknown"}),
        ("steerable = false", {"late"}),
        ("kind = sae_latent", set()),
        ('site = "resid_post" AND layer != 1', {"late"}),
    ],
)
def test_features_can_be_filtered(client, filter, names):
    assert {feature.name for feature in client.list_features(filter)} == {
        f"features/{name}" for name in names
    }


@pytest.mark.parametrize(
    "filter", ["layer = one", "steerable = yes", "label = x", "site = nowhere"]
)
def test_a_filter_that_no_feature_can_meet_is_refused(shared_hub, filter):
    with grpc.insecure_channel(f"127.0.0.1:{shared_hub.grpc_port}") as channel:
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)
        request = catalog_pb2.ListFeaturesRequest(filter=filter)
        code, _, fields = refusal(lambda: stub.ListFeatures(request))
    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["filter"])
