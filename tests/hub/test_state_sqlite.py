"""Created policies in an SQLite file: what outlives a hub, and what a hub refuses to touch."""

import contextlib
import itertools
import os
import shutil
import sqlite3
import stat
import threading
import uuid
from pathlib import Path

import grpc
import hub_world
import msgspec
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import load_file, save_file
from steerscope.api.v1 import steering_pb2 as pb
from steerscope.api.v1 import steering_pb2_grpc
from steerscope.catalog import store
from steerscope.client import Client
from steerscope.config import Settings, StateSettings, from_tree
from steerscope.errors import ConfigError, HubError
from steerscope.hub import launcher
from steerscope.hub.link import FrontendLink
from steerscope.hub.server import STATE_SERVICE
from steerscope.hub.storage import sqlite
from steerscope.steering.interventions import Intervention, Policy
from steerscope.steering.rules import Override, OverrideMode

pytestmark = pytest.mark.timeout(120)

CLAMP = {"feature": "known", "clamp": 6.0}


@pytest.fixture
def kept(settings, tmp_path):
    """Settings with a state file."""
    return msgspec.structs.replace(settings, state=StateSettings(sqlite=str(tmp_path / "state.db")))


@contextlib.contextmanager
def running(settings):
    hub = launcher.start_hub(settings)
    try:
        with Client(f"127.0.0.1:{hub.grpc_port}") as client:
            yield hub, client
    finally:
        hub.stop()


def kill(hub):
    hub.process.kill()
    hub.process.wait()


def put_rules(hub, **rules):
    with grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel:
        stub = steering_pb2_grpc.SteeringServiceStub(channel)
        stub.UpdateRules(pb.UpdateRulesRequest(rules=rules), timeout=10)


def with_catalog(settings, folder):
    return msgspec.structs.replace(settings, catalog=str(folder))


def test_policies_their_history_and_answers_outlive_a_killed_hub(kept, catalog):
    call = {"request_id": str(uuid.uuid4()), "annotations": {"team": "search"}, "ttl": 600}
    with running(kept) as (hub, client):
        first = client.create_policy("lasting", [CLAMP], description="one", **call)
        second = client.update_policy("lasting", description="two")
        client.create_policy("dropped", [CLAMP])
        client.delete_policy("dropped")
        kill(hub)
    with running(kept) as (hub, client):
        assert client.get_policy("lasting") == second
        assert client.get_policy("lasting", first.revision_id).description == "one"
        assert [p.name for p in client.list_policies("origin=created")] == ["policies/lasting"]
        assert client.create_policy("lasting", [CLAMP], description="one", **call) == first
        link = FrontendLink(hub.endpoint, catalog.digest)
        link.start()
        try:
            assert set(link.policies) == {"lasting", "force-known"}
        finally:
            link.close()


def test_no_acknowledged_change_is_lost_when_the_hub_is_killed_while_it_writes(kept):
    acknowledged, done = [], threading.Event()

    def write(client):
        for i in itertools.count():
            if done.is_set():
                return
            with contextlib.suppress(HubError):
                acknowledged.append(client.create_policy(f"p-{i}", [CLAMP]))

    with running(kept) as (hub, client):
        writer = threading.Thread(target=write, args=(client,))
        writer.start()
        for round_ in range(1, 6):
            enough = len(acknowledged) + 5 + 7 * round_
            hub_world.eventually(lambda: len(acknowledged) >= enough, 40)  # noqa: B023
            hub.process.kill()
            hub_world.eventually(lambda: hub.restarts == round_, 10)  # noqa: B023
        done.set()
        writer.join()
        hub.stop()
    with running(kept) as (_, client):
        found = {policy.name: policy for policy in client.list_policies("origin=created")}
    assert len(acknowledged) > 40
    assert all(found[policy.name] == policy for policy in acknowledged)
    assert len(found) <= len(acknowledged) + 5  # in each round one was stored, not answered


def test_rules_and_the_kill_switch_outlive_a_killed_hub(kept, catalog):
    with running(kept) as (hub, client):
        client.create_policy("lasting", [CLAMP])
        put_rules(hub, default_policy="policies/lasting", override={"mode": 1, "reason": "why"})
        kill(hub)
    with running(kept) as (hub, client):
        link = FrontendLink(hub.endpoint, catalog.digest)
        link.start()
        try:
            assert link.rules.default_policy == "lasting"
            assert link.rules.override == Override(mode=OverrideMode.OFF, reason="why")
        finally:
            link.close()


def test_rules_whose_bytes_changed_are_named(kept):
    with running(kept) as (hub, _):
        put_rules(hub, override={"mode": 1})
    with contextlib.closing(sqlite3.connect(kept.state.sqlite)) as file, file:
        file.execute("UPDATE rules SET document = replace(document, 'off', 'OFF')")
    with pytest.raises(HubError, match=r"state\.db: the rules are damaged"):
        launcher.start_hub(kept)


def test_an_expired_policy_does_not_come_back_with_the_hub(kept):
    with running(kept) as (hub, client):
        client.create_policy("brief", [CLAMP], ttl=0.3)
        kill(hub)
    threading.Event().wait(0.4)
    with running(kept) as (_, client):
        assert client.list_policies("origin=created") == []


def test_the_file_is_for_its_owner_only(kept):
    with running(kept) as (_, client):
        client.create_policy("mine", [CLAMP])
        assert stat.S_IMODE(os.stat(kept.state.sqlite).st_mode) == 0o600


def test_a_second_hub_on_the_file_is_refused_while_the_first_runs(kept):
    with running(kept) as (_, client):
        with pytest.raises(HubError, match=r"sqlite .*state\.db: another hub uses this file"):
            launcher.start_hub(kept)
        client.create_policy("mine", [CLAMP])


def content(path):
    with sqlite3.connect(path) as file:
        return list(file.iterdump())


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "zeros inside"])
def test_a_damaged_file_is_named_and_left_as_it_is(kept, damage):
    path = kept.state.sqlite
    with running(kept) as (_, client):
        for i in range(40):
            client.create_policy(f"kept-{i}", [CLAMP], description="x" * 500)
    whole = Path(path).read_bytes()
    damaged = {
        "truncated": whole[: len(whole) // 2],
        "overwritten": b"not a database at all" * 100,
        "zeros inside": whole[:8192] + bytes(8192) + whole[16384:],
    }[damage]
    Path(path).write_bytes(damaged)
    with pytest.raises(HubError, match=r"sqlite .*state\.db: "):
        launcher.start_hub(kept)
    assert Path(path).read_bytes() == damaged


@pytest.mark.parametrize(
    "changed", ["replace(document, '6.0', '9.0')", "CAST(replace(document, '6', '9') AS BLOB)", "7"]
)
def test_a_policy_whose_bytes_changed_is_named(kept, changed):
    with running(kept) as (_, client):
        client.create_policy("altered", [CLAMP])
    with contextlib.closing(sqlite3.connect(kept.state.sqlite)) as file, file:
        file.execute(f"UPDATE policies SET document = {changed}")
    with pytest.raises(HubError, match=r"state\.db: policy 'altered' is damaged"):
        launcher.start_hub(kept)


def test_a_database_of_something_else_is_left_alone(kept):
    path = kept.state.sqlite
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("CREATE TABLE policies (name TEXT)")
    before = Path(path).read_bytes()
    with pytest.raises(HubError, match=r"state\.db: this is a database of something else"):
        launcher.start_hub(kept)
    assert Path(path).read_bytes() == before


def test_a_file_of_a_newer_version_is_left_alone(kept):
    with running(kept):
        pass
    with contextlib.closing(sqlite3.connect(kept.state.sqlite)) as file, file:
        file.execute(f"PRAGMA user_version = {len(sqlite.MIGRATIONS) + 1}")
    with pytest.raises(HubError, match=r"state\.db: schema version 3 is of a newer Steerscope"):
        launcher.start_hub(kept)


def test_a_folder_that_is_not_there_is_named(kept, tmp_path):
    path = str(tmp_path / "nowhere" / "state.db")
    with pytest.raises(HubError, match=r"nowhere/state\.db: No such file"):
        launcher.start_hub(msgspec.structs.replace(kept, state=StateSettings(sqlite=path)))


def changed_catalog(folder, tmp_path, change):
    copy = tmp_path / "other"
    shutil.copytree(folder, copy)
    document = yaml.safe_load((copy / "catalog.yaml").read_text())
    tensors = load_file(copy / "features.safetensors")
    change(document, tensors)
    (copy / "catalog.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    save_file(tensors, copy / "features.safetensors")
    store.load(copy)
    return copy


def without_unknown(document, tensors):
    document["features"] = [f for f in document["features"] if f["name"] != "unknown"]
    document["signals"] = []
    for part in ("W_enc", "b_enc", "W_dec"):
        del tensors[f"unknown.{part}"]


def with_another_unknown(document, tensors):
    tensors["unknown.W_dec"] = -np.ones_like(tensors["unknown.W_dec"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_unknown, "interventions[0].feature: no feature 'unknown' in the catalog"),
        (with_another_unknown, "feature 'unknown' is another one than when the policy was stored"),
    ],
)
def test_a_policy_that_no_longer_fits_is_kept_and_listed_but_not_in_force(
    kept, catalog_folder, tmp_path, change, reason
):
    with running(kept) as (_, client):
        fits = client.create_policy("fits", [CLAMP])
        lost = client.create_policy("lost", [{"feature": "unknown", "add": 1.0}])
    folder = changed_catalog(catalog_folder, tmp_path, change)
    with running(with_catalog(kept, folder)) as (hub, client):
        (listed,) = client.list_policies("state = invalid")
        assert (listed.name, listed.state) == ("policies/lost", pb.POLICY_STATE_INVALID)
        assert (listed.state_reason, listed.etag) == (reason, lost.etag)
        assert client.get_policy("fits") == fits
        link = FrontendLink(hub.endpoint, store.load(folder).digest)
        link.start()
        try:
            assert set(link.policies) == {"fits", "force-known"}
            client.update_policy("lost", interventions=[CLAMP])
            assert "lost" in link.policies
        finally:
            link.close()
    assert [p for p in content(kept.state.sqlite) if "lost" in p]


def test_a_policy_is_taken_up_again_when_its_feature_is_back(kept, catalog_folder, tmp_path):
    folder = changed_catalog(catalog_folder, tmp_path, without_unknown)
    with running(kept) as (_, client):
        made = client.create_policy("returning", [{"feature": "unknown", "add": 1.0}])
    with running(with_catalog(kept, folder)) as (_, client):
        assert client.get_policy("returning").state == pb.POLICY_STATE_INVALID
    with running(kept) as (_, client):
        assert client.get_policy("returning") == made


def test_a_declared_policy_keeps_a_created_one_of_its_name_waiting(kept):
    with running(kept) as (_, client):
        made = client.create_policy("claimed", [CLAMP])
    ours = Policy(name="claimed", interventions=(Intervention(feature="known", ablate=True),))
    with running(msgspec.structs.replace(kept, policies=(ours,))) as (_, client):
        shown = client.get_policy("claimed")
        assert (shown.origin, shown.state) == (pb.POLICY_ORIGIN_CONFIG, pb.POLICY_STATE_ACTIVE)
        assert made.revision_id in shown.state_reason
    with running(kept) as (_, client):
        assert client.get_policy("claimed") == made


def test_the_health_service_knows_the_state_store(kept: Settings):
    with (
        running(kept) as (hub, _),
        grpc.insecure_channel(f"127.0.0.1:{hub.grpc_port}") as channel,
    ):
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=STATE_SERVICE)
        serving = health_pb2.HealthCheckResponse.SERVING
        assert hub_world.eventually(lambda: stub.Check(request).status == serving)


def test_the_file_is_relative_to_the_settings(catalog_folder, tmp_path):
    tree = {"catalog": str(catalog_folder), "state": {"sqlite": "kept/state.db"}}
    settings = from_tree(tree, base=tmp_path, where="config.yaml")
    assert settings.state.sqlite == str(tmp_path / "kept" / "state.db")


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"sqlite": "a.db", "redis": {"url": "redis://127.0.0.1"}}, "sqlite and redis"),
        ({"redis": {"url": "redis://:secret@127.0.0.1"}}, r"url: must not hold a password.*redis"),
        ({"redis": {"url": "redis://h?password=secret"}}, r"url: must not hold a password.*redis"),
        ({"redis": {"url": "http://127.0.0.1"}}, r"\$\.state\.redis\.url"),
        ({"redis": {"url": "redis://h", "prefix": "a b"}}, r"\$\.state\.redis\.prefix"),
        ({"file": "a.db"}, r"unknown field `file`.*\$\.state"),
    ],
)
def test_contradictory_or_revealing_settings_are_refused_by_field(
    catalog_folder, tmp_path, state, told
):
    tree = {"catalog": str(catalog_folder), "state": state}
    with pytest.raises(ConfigError, match=told) as caught:
        from_tree(tree, base=tmp_path, where="config.yaml")
    assert "secret" not in str(caught.value)
