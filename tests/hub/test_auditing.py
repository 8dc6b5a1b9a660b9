"""What a running hub writes into its audit log."""

import json

import msgspec
import pytest
from hub_world import eventually, frame, start
from steerscope.cli.main import main
from steerscope.client import Client
from steerscope.config import AuditSettings
from steerscope.errors import HubError
from steerscope.hub import launcher
from steerscope.hub.link import FrontendLink
from steerscope.steering.interventions import Intervention

pytestmark = pytest.mark.timeout(60)

EDIT = {"feature": "known", "clamp": 2.0}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


@pytest.fixture
def audited(settings, path):
    told = AuditSettings(path=str(path))
    hub = launcher.start_hub(msgspec.structs.replace(settings, audit=told))
    yield hub
    hub.stop()


def events(path):
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def of_type(path, kind):
    return [event for event in events(path) if event["type"] == kind]


def test_who_changed_which_policy_is_written_down(audited, path, catalog):
    with Client(f"127.0.0.1:{audited.grpc_port}") as client:
        client.create_policy("mine", [EDIT], description="secret text")
        client.update_policy("mine", interventions=[{**EDIT, "clamp": 3.0}])
        client.create_policy("never", [EDIT], validate_only=True)
        client.delete_policy("mine")
    (loaded,) = of_type(path, "config_loaded")
    assert loaded["catalog_digest"] == catalog.digest
    (created,) = of_type(path, "policy_created")
    assert (created["policy"], created["edits"][0]["value"]) == ("mine", 2.0)
    (updated,) = of_type(path, "policy_updated")
    assert updated["replaced"] == created["digest"] != updated["digest"]
    (deleted,) = of_type(path, "policy_deleted")
    assert deleted["digest"] == updated["digest"]
    assert "secret text" not in path.read_text()
    assert main(["audit", "verify", str(path)]) == 0


def test_an_order_and_its_release_are_written_before_they_are_made(audited, path):
    with Client(f"127.0.0.1:{audited.grpc_port}") as client:
        client.steer_request("chatcmpl-1", interventions=[EDIT], ttl=30.0)
        client.release_request("chatcmpl-1")
    (changed,) = of_type(path, "steering_changed")
    assert (changed["external_id"], changed["policy"]) == ("chatcmpl-1", "inline")
    assert changed["edits"][0]["feature"] == "known"
    (released,) = of_type(path, "released")
    assert released["external_id"] == "chatcmpl-1"


def test_a_refused_request_is_written_down_without_what_was_asked(audited, path, catalog):
    link = FrontendLink(audited.endpoint, catalog.digest)
    link.start()
    link.rejected("chatcmpl-9", "unknown", "steering.interventions[0].clamp", "must be finite")
    eventually(lambda: of_type(path, "request_rejected"))
    link.close()
    (rejected,) = of_type(path, "request_rejected")
    assert rejected["field"] == "steering.interventions[0].clamp"


def test_a_steered_request_is_told_with_its_receipt_and_an_unsteered_one_is_not(
    audited, path, catalog, worker_of
):
    worker = worker_of(audited)
    edits = (Intervention(feature="known", clamp=2.0),)
    steered = start("a", 2, policy="mine", interventions=edits)
    worker.send(frame(catalog, ("a", 0, 4), ("b", 0, 4), started=(steered, start("b", 2)),
                      edited={1: 0.5}))  # fmt: skip
    worker.send(frame(catalog, ("a", 4, 1), ("b", 4, 1), finished=("a", "b")))
    (told,) = eventually(lambda: of_type(path, "request_steered"))
    assert (told["external_id"], told["policy"], told["applied"]) == ("a", "mine", "d1")
    assert told["num_steered_tokens"] == 1
    assert told["dose_max"] == 0.5
    assert not told["complete"], "the front end never said that it was asked for"


def test_a_log_that_cannot_be_opened_refuses_to_start(settings, tmp_path):
    told = AuditSettings(path=str(tmp_path / "nowhere" / "audit.jsonl"))
    with pytest.raises(HubError, match=r"audit\.jsonl"):
        launcher.start_hub(msgspec.structs.replace(settings, audit=told))
