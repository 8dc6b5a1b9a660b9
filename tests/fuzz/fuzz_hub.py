"""What callers and stores bring to the hub: messages, filters, documents, the audit log."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from fuzz_trees import fields
from fuzz_wires import run_to_end
from fuzz_world import SETTINGS, catalog, refused, written
from google.protobuf.message import DecodeError, Message
from memory_storage import MemoryStorage
from steerscope.api.v1 import catalog_pb2, steering_pb2
from steerscope.errors import SpecError, SteerscopeError
from steerscope.hub import policies, rule_messages
from steerscope.hub.audit import entries, resuming, verification
from steerscope.hub.audit.entries import AuditError
from steerscope.hub.conversions import POLICIES, interventions, policy_message
from steerscope.hub.drafts import Drafting, repeatable, update_fields
from steerscope.hub.fields import id_of_request, page, page_after, plain_name, ttl_of
from steerscope.hub.filters import feature_filter, policy_filter
from steerscope.hub.policies import StoredPolicy
from steerscope.hub.policy_store import PolicyStore
from steerscope.hub.refusals import status
from steerscope.hub.rule_store import RuleStore, StoredRules
from steerscope.hub.storage import documents
from steerscope.hub.storage.documents import StateError
from steerscope.hub.watches import cursors as watch_cursors
from steerscope.steering import rules
from steerscope.steering.admission import check_asked
from steerscope.steering.interventions import SteeringSpec
from steerscope.steering.rules import Rules, Traits

NAME = "kept"


def rpcs(data: bytes) -> bool:
    """Calls one after another, on one store: a protobuf message whose fields are the requests."""
    try:
        calls = [(number, value) for number, wire, value in fields(data) if wire == 2]
    except ValueError:
        return False
    world, accepted = _Calls(), False
    for number, request in calls:
        try:
            world.serve((number - 1) % len(world.methods), request)
            accepted = True
        except DecodeError:
            continue  # gRPC answers this itself
        except SteerscopeError as error:
            status(error).SerializeToString()
    return accepted


class _Calls:
    """The requests' way into the store, without gRPC and without identities."""

    def __init__(self) -> None:
        self.store = PolicyStore(catalog(), (), SETTINGS, MemoryStorage(), max_policies=8)
        self.drafting = Drafting(catalog(), SETTINGS)
        self.rules = RuleStore(self.store, Rules(), SETTINGS)
        run_to_end(self.store.state.open())
        pb = steering_pb2
        self.methods: tuple[tuple[type[Message], Callable[[Any], None]], ...] = (
            (pb.CreatePolicyRequest, self._create),
            (pb.UpdatePolicyRequest, self._update),
            (pb.ListPoliciesRequest, self._list),
            (pb.SteerRequestRequest, self._steer),
            (pb.ListPolicyRevisionsRequest, self._revisions),
            (catalog_pb2.ListFeaturesRequest, self._find),
            (pb.UpdateRulesRequest, self._rule),
        )

    def serve(self, kind: int, data: bytes) -> None:
        """One call: the fields of the input's message are numbered from 1."""
        request, method = self.methods[kind]
        method(request.FromString(data))

    def _create(self, request: steering_pb2.CreatePolicyRequest) -> None:
        draft = self.drafting.new(request.policy_id, "policy_id", request.policy)
        call = repeatable(request, "caller")
        made = self.store.create(draft, call, validate_only=request.validate_only)
        _shown(run_to_end(made))

    def _update(self, request: steering_pb2.UpdatePolicyRequest) -> None:
        message = request.policy
        name, changing = plain_name(message.name, POLICIES, "policy.name"), update_fields(request)

        def merge(current: StoredPolicy | None) -> policies.Draft:
            if current is None:
                return self.drafting.new(name, "policy.name", message)
            return self.drafting.merged(current, message, changing)

        made = self.store.update(
            name,
            merge,
            etag=message.etag,
            allow_missing=request.allow_missing,
            validate_only=request.validate_only,
        )
        _shown(run_to_end(made))

    def _list(self, request: steering_pb2.ListPoliciesRequest) -> None:
        wanted = policy_filter(request.filter)
        found = [stored.policy.name for stored in self.store.all() if wanted(stored)]
        page(found, request.page_size, request.page_token)

    def _steer(self, request: steering_pb2.SteerRequestRequest) -> None:
        id_of_request(request.name)
        ttl_of(request)
        spec = SteeringSpec(
            interventions=interventions(request.interventions),
            max_dose=request.max_dose if request.HasField("max_dose") else None,
        )
        check_asked(catalog(), SETTINGS, spec)
        from fuzz_steering import check_effects

        check_effects(spec)

    def _revisions(self, request: steering_pb2.ListPolicyRevisionsRequest) -> None:
        revisions = self.store.revisions(plain_name(request.name, POLICIES))
        found, _ = page_after(
            revisions, lambda r: r.revision_id, request.page_size, request.page_token
        )
        for each in found:
            _shown(each)

    def _find(self, request: catalog_pb2.ListFeaturesRequest) -> None:
        wanted = feature_filter(request.filter, catalog())
        page(
            [f.name for f in catalog().document.features if wanted(f)],
            request.page_size,
            request.page_token,
        )

    def _rule(self, request: steering_pb2.UpdateRulesRequest) -> None:
        changing = rule_messages.update_fields(request)
        made = self.rules.update(
            lambda current: rule_messages.merged(current, request.rules, changing),
            etag=request.rules.etag,
            validate_only=request.validate_only,
        )
        stored = run_to_end(made)
        _again(stored)
        for name in request.rules.name, "m":
            rules.ruling(stored.rules, Traits(model=name, identity=name), has_asked=True)


def _again(stored: StoredRules) -> None:
    """What a caller is shown of the rules comes back the same."""
    message = rule_messages.rules_message(stored)
    message.SerializeToString()
    fields = frozenset(rule_messages.UPDATABLE)
    assert rule_messages.merged(Rules(), message, fields) == stored.rules


def _shown(stored: StoredPolicy) -> Message:
    """What a caller is shown of a policy in force fits its message, and comes back the same."""
    message = policy_message(stored, with_revision=True)
    message.SerializeToString()
    assert interventions(message.interventions) == stored.policy.interventions
    check_asked(catalog(), SETTINGS, stored.policy.spec)
    return message


def filters(data: bytes) -> bool:
    """A filter of the list calls, for policies and for features."""
    text = data.decode("utf-8", "surrogateescape")
    accepted = False
    for make, items in (
        (policy_filter, _policies()),
        (functools.partial(feature_filter, catalog=catalog()), catalog().document.features),
    ):
        try:
            wanted = make(text)
        except SpecError as error:
            refused(error)
            continue
        accepted = True
        for item in items:
            assert wanted(item) in (True, False)
    return accepted


@functools.cache
def _policies() -> tuple[StoredPolicy, ...]:
    store = PolicyStore(catalog(), (), SETTINGS, MemoryStorage())
    return store.all()


def kept(data: bytes) -> bool:
    """A policy's document out of a store that others write to as well."""
    try:
        document = documents.decode_document(NAME, data, "store")
    except StateError as error:
        return refused(error)
    store = PolicyStore(catalog(), (), SETTINGS, MemoryStorage())
    store._adopt(documents.Snapshot(mark="2:x", documents={NAME: document}))
    for stored in (*store.all(), *(policies.kept_policy(r) for r in document.revisions)):
        policy_message(stored).SerializeToString()
    store.in_force()
    assert documents.decode_document(NAME, documents.encode(document), "store") == document
    return True


def kept_answers(data: bytes) -> bool:
    """An answer to a ``request_id``, and a store's mark."""
    try:
        documents.number(data.decode("utf-8", "surrogateescape"))
        return True
    except StateError as error:
        refused(error)
    try:
        answered = documents.decode_answered(data, "store")
    except StateError as error:
        return refused(error)
    policy_message(policies.kept_policy(answered.revision)).SerializeToString()
    return True


def kept_rules(data: bytes) -> bool:
    """The rules out of a store."""
    try:
        document = documents.decode_rules(data, "store")
    except StateError as error:
        return refused(error)
    message = rule_messages.rules_message(StoredRules(document.rules, document.update_time))
    message.SerializeToString()
    rules.ruling(document.rules, Traits(), has_asked=False)
    return True


def cursors(data: bytes) -> bool:
    """Where a consumer says that it is, as a string."""
    text, known = data.decode("utf-8", "surrogateescape"), 0
    for kind in (watch_cursors.FeedCursor, watch_cursors.RequestCursor):
        try:
            cursor = watch_cursors.decode(text, kind)
        except SpecError as error:
            refused(error)
            continue
        known += 1
        assert watch_cursors.decode(watch_cursors.encode(cursor), kind) == cursor
    return bool(known)


def audit(data: bytes) -> bool:
    """A log that someone may have changed: verified to its end, and gone on with or refused."""
    data = data if data.endswith(b"\n") else data + b"\n"  # readers wait for a line's end
    path = written("audit/audit.jsonl", data)
    path.chmod(0o600)
    for key in (None, b"k" * 32):
        found = verification.verify([path], key=key, anchor="0" * 64)
        assert found.num_entries >= data.count(b"\n")
    try:
        resumed = resuming.resume(path, None)
    except AuditError as error:
        return refused(error)
    os.close(resumed.fd)
    entries.behind_us(entries.moment(0.0), resumed.head.time)
    return True
