"""Rules over gRPC: from the call to front ends and engines, over a real hub."""

import asyncio
import threading

import grpc
import pytest
from google.protobuf import field_mask_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from hub_world import eventually
from steerscope.api.v1 import steering_pb2, steering_pb2_grpc
from steerscope.engine.orders import EngineLink, Limits, OrderBook
from steerscope.engine.scheduling import SchedulerSide
from steerscope.hub.link import FrontendLink
from steerscope.steering.rules import OverrideMode, SteeringSource
from steerscope.steering.stamp import Stamp

pytestmark = pytest.mark.timeout(60)

OFF, FORCE = steering_pb2.OVERRIDE_MODE_OFF, steering_pb2.OVERRIDE_MODE_FORCE


@pytest.fixture
def hub(shared_hub):
    return shared_hub


@pytest.fixture
def steering(hub):
    with grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel:
        stub = steering_pb2_grpc.SteeringServiceStub(channel)
        yield stub
        update(stub, mask=["*"])


@pytest.fixture
def link(hub, catalog):
    made = FrontendLink(hub.endpoint, catalog.digest)
    made.start()
    yield made
    made.close()


def update(steering, mask=None, validate_only=False, **rules):
    request = steering_pb2.UpdateRulesRequest(
        rules=steering_pb2.Rules(**rules), validate_only=validate_only
    )
    if mask is not None:
        request.update_mask.CopyFrom(field_mask_pb2.FieldMask(paths=mask))
    return steering.UpdateRules(request, timeout=10)


def refused(call):
    with pytest.raises(grpc.RpcError) as caught:
        call()
    details = rpc_status.from_call(caught.value).details
    request = error_details_pb2.BadRequest()
    fields = [v.field for d in details if d.Unpack(request) for v in request.field_violations]
    return caught.value.code(), fields


def current(steering):
    return steering.GetRules(steering_pb2.GetRulesRequest(), timeout=5).rules


def binding(name="loras", policy="policies/force-known", **match):
    return steering_pb2.Binding(
        binding=name, match=steering_pb2.Match(**(match or {"lora": "tuned"})), policy=policy
    )


class Core:
    """An engine core's half of ours, stepping in a thread."""

    def __init__(self, endpoint, catalog_digest, max_rows=4):
        self.requests = {}
        self.link = EngineLink(endpoint, "0", catalog_digest, self._stamps)
        limits = Limits(catalog_digest, max_rows)
        book = OrderBook(self.link.arrived, self.link.answer, limits, self._stamps)
        self.side = SchedulerSide(False, book)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._step)
        self._thread.start()

    def close(self):
        self._done.set()
        self._thread.join()

    def _step(self):
        def restamp(req_id, _, stamp):
            self.requests[req_id].stamp = stamp

        while not self._done.wait(0.002):
            self.side.before_step(self.requests, restamp)

    def _stamps(self, req_ids):
        running = list(self.requests.items())
        wanted = self.requests if req_ids is None else req_ids
        return {i: (r.stamp, r.num_prompt_tokens) for i, r in running if i in wanted}


class Running:
    def __init__(self, external_id, computed, stamp=None):
        self.stamp = stamp or Stamp(external_id)
        self.num_computed_tokens, self.num_prompt_tokens = computed, 10
        self.num_tokens, self.num_output_tokens = computed + 1, computed + 1 - 10


@pytest.fixture
def core(hub, catalog):
    made = Core(hub.endpoint, catalog.digest)
    yield made
    made.close()


def test_there_are_none_at_first(steering):
    rules = current(steering)
    assert rules.name == "rules"
    assert not rules.default_policy
    assert not rules.bindings
    assert not rules.HasField("override")
    assert not rules.HasField("update_time")
    assert rules.etag


def test_front_ends_have_them_when_the_call_returns(steering, link):
    update(steering, default_policy="policies/force-known", bindings=[binding()])
    assert link.rules.default_policy == "force-known"
    assert link.rules.bindings[0].match.lora == "tuned"
    update(steering, mask=["override"], override={"mode": OFF, "reason": "incident 7"})
    assert link.rules.override.mode is OverrideMode.OFF
    assert link.rules.default_policy == "force-known"
    update(steering, mask=["*"])
    assert not list(link.rules.policies())
    assert link.rules.override is None


def test_what_is_given_changes_and_nothing_else_where_there_is_no_mask(steering):
    update(steering, default_policy="policies/force-known")
    after = update(steering, bindings=[binding()]).rules
    assert after.default_policy == "policies/force-known"
    assert [b.binding for b in after.bindings] == ["loras"]


def test_an_etag_protects_and_a_trial_run_changes_nothing(steering):
    before = current(steering)
    tried = update(steering, validate_only=True, default_policy="policies/force-known").rules
    assert tried.default_policy == "policies/force-known"
    assert current(steering) == before
    update(steering, etag=before.etag, default_policy="policies/force-known")
    with pytest.raises(grpc.RpcError) as caught:
        update(steering, etag=before.etag, mask=["default_policy"])
    assert caught.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize(
    ("rules", "mask", "field"),
    [
        ({"default_policy": "policies/nobody"}, None, "rules.default_policy"),
        ({"default_policy": "force-known"}, None, "rules.default_policy"),
        ({"bindings": [binding(policy="policies/nobody")]}, None, "rules.bindings[0].policy"),
        ({"bindings": [binding(), binding()]}, None, "rules.bindings[1].binding"),
        ({"bindings": [binding(name="Not A Name")]}, None, "rules.bindings[0].name"),
        (
            {"bindings": [binding(headers={"x-team": "1"})]},
            None,
            "rules.bindings[0].match.headers",
        ),
        ({"bindings": [binding(headers={"X Y": "1"})]}, None, "rules.bindings[0].match.headers"),
        ({"bindings": [binding(model="x" * 300)]}, None, "rules.bindings[0].match.model"),
        ({"bindings": [steering_pb2.Binding(binding="b")]}, None, "rules.bindings[0].match"),
        ({"override": {"mode": FORCE}}, None, "rules.override.policy"),
        ({"override": {"reason": "?"}}, None, "rules.override.mode"),
        ({"override": {"mode": 9}}, None, "rules.override.mode"),
        ({"override": {"mode": OFF, "reason": "x" * 300}}, None, "rules.override.reason"),
        ({}, ["etag"], "update_mask"),
        ({}, ["*", "override"], "update_mask"),
    ],
)
def test_bad_rules_are_refused_and_the_field_named(steering, rules, mask, field):
    before = current(steering)
    code, fields = refused(lambda: update(steering, mask=mask, **rules))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields == [field]
    assert current(steering) == before


def test_a_policy_that_rules_name_stays(steering, client):
    client.create_policy("kept", [{"feature": "known", "clamp": 1.0}])
    update(steering, default_policy="policies/kept")
    with pytest.raises(grpc.RpcError) as caught:
        steering.DeletePolicy(steering_pb2.DeletePolicyRequest(name="policies/kept"))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "rules.default_policy names it" in caught.value.details()
    ending = steering_pb2.UpdatePolicyRequest(policy={"name": "policies/kept"})
    ending.policy.ttl.seconds = 5
    with pytest.raises(grpc.RpcError) as caught:
        steering.UpdatePolicy(ending)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    update(steering, mask=["default_policy"])
    client.delete_policy("kept")


def test_a_policy_that_ends_by_itself_cannot_be_in_rules(steering):
    policy = steering_pb2.Policy(interventions=[{"feature": "known", "clamp": 1.0}])
    policy.ttl.seconds = 60
    steering.CreatePolicy(steering_pb2.CreatePolicyRequest(policy=policy, policy_id="ending"))
    _, fields = refused(lambda: update(steering, default_policy="policies/ending"))
    assert fields == ["rules.default_policy"]


def test_the_kill_switch_reaches_what_runs_and_the_answer_says_from_where(steering, core, catalog):
    core.requests["r-1"] = Running("r", 14)
    update(steering, override={"mode": FORCE, "policy": "policies/force-known"})
    eventually(lambda: core.requests["r-1"].stamp.policy == "force-known", 5)
    stamp = core.requests["r-1"].stamp
    assert (stamp.source, stamp.changed_at) == (SteeringSource.OVERRIDE, 14)
    # Whoever comes later with another stamp is taken too, and so is one that was let in before.
    core.requests["late-1"] = Running("late", 0)
    eventually(lambda: core.requests["late-1"].stamp.policy == "force-known", 5)
    core.requests["r-1"].num_computed_tokens, core.requests["r-1"].num_tokens = 20, 21
    update(steering, mask=["override"], override={"mode": OFF})
    eventually(lambda: core.requests["r-1"].stamp.current == (), 5)
    assert core.requests["r-1"].stamp.source is SteeringSource.OVERRIDE

    def told():
        return update(steering, mask=["override"], override={"mode": OFF}).sequences

    eventually(
        lambda: {("r-1", 20), ("late-1", 0)} == {(s.request_id, s.first_position) for s in told()},
        5,
    )
    # Lifted, what runs stays as it is.
    update(steering, mask=["override"])
    core.requests["new-1"] = Running("new", 0)
    assert core.requests["r-1"].stamp.current == ()
    assert core.requests["new-1"].stamp.source is SteeringSource.NOTHING


def test_an_engine_that_comes_later_is_told_of_the_override(steering, hub, catalog):
    update(steering, override={"mode": FORCE, "policy": "policies/force-known"})
    core = Core(hub.endpoint, catalog.digest)
    try:
        core.requests["r-1"] = Running("r", 3)
        eventually(lambda: core.requests["r-1"].stamp.policy == "force-known", 10)
    finally:
        core.close()
        update(steering, mask=["override"])


def test_an_order_does_not_beat_an_override(steering, core, client):
    update(steering, override={"mode": OFF})
    told = steering.SteerRequest(
        steering_pb2.SteerRequestRequest(name="requests/r", policy="policies/force-known")
    )
    assert told.state == steering_pb2.STEER_STATE_WAITING
    core.requests["r-1"] = Running("r", 3)
    eventually(lambda: not core.side._orders._waiting, 5)
    assert core.requests["r-1"].stamp == Stamp("r")
    update(steering, mask=["override"])


def test_concurrent_changes_of_different_fields_are_all_kept(steering, hub):
    async def body():
        async with grpc.aio.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel:
            stub = steering_pb2_grpc.SteeringServiceStub(channel)
            changes = [
                {"default_policy": "policies/force-known"},
                {"bindings": [binding()]},
                {"override": {"mode": OFF}},
            ]
            calls = [
                stub.UpdateRules(steering_pb2.UpdateRulesRequest(rules=rules)) for rules in changes
            ]
            await asyncio.gather(*calls)

    asyncio.run(body())
    rules = current(steering)
    assert rules.default_policy
    assert rules.bindings
    assert rules.HasField("override")
    update(steering, mask=["*"])
