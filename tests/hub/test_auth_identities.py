"""Who is who, what their allow-lists let them ask, and how identities change while a hub runs."""

import datetime
import functools
import threading

import grpc
import httpx
import pytest
import yaml
from auth_world import (
    Secured,
    channel_to,
    details,
    hub_with,
    issue,
    issue_server,
    served_certificate,
    somebody,
)
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hub_world import Worker, eventually, frame, start
from steerscope.api.v1 import catalog_pb2, catalog_pb2_grpc, steering_pb2, steering_pb2_grpc
from steerscope.client import Client
from steerscope.client.channel import Credentials
from steerscope.errors import ConfigError, HubError
from steerscope.hub.server import SECURITY_SERVICE

pytestmark = pytest.mark.timeout(90)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
CLAMP = {"feature": "known", "clamp": 1.0}


@pytest.fixture
def secured(tmp_path):
    return Secured(tmp_path)


def address_of(hub):
    return f"127.0.0.1:{hub.grpc_port}"


def get_catalog(channel):
    return catalog_pb2_grpc.CatalogServiceStub(channel).GetCatalog(
        catalog_pb2.GetCatalogRequest(), timeout=5
    )


def refused(channel):
    """The status with which a call is refused; None when it is served."""
    try:
        get_catalog(channel)
    except grpc.RpcError as error:
        return error.code()
    return None


def test_a_team_may_store_what_its_lists_allow_and_nothing_else(catalog_folder):
    team = somebody("team-a", "steer", policies=["force-*"], features=["known"], max_dose=0.8)
    with (
        hub_with(catalog_folder, identities=[team.tree]) as hub,
        Client(address_of(hub), Credentials(token=team.token)) as client,
    ):
        assert client.create_policy("force-it", [CLAMP], max_dose=0.8).name == "policies/force-it"
        for name, edits, dose, wrong in (
            ("other", [CLAMP], 0.8, "policy 'other'"),
            ("force-2", [{"feature": "unknown", "ablate": True}], 0.8, "feature 'unknown'"),
            ("force-2", [CLAMP], 0.9, "at most 0.8, 0.9 is asked"),
            ("force-2", [CLAMP], None, "at most 0.8, none is given"),
        ):
            with pytest.raises(HubError, match=f"PERMISSION_DENIED: .*{wrong}"):
                client.create_policy(name, edits, max_dose=dose)
        client.delete_policy("force-it")


def test_a_team_may_not_delete_what_its_list_does_not_name(catalog_folder):
    team = somebody("team-a", "steer", policies=["force-?"])
    boss = somebody("boss", "admin")
    with (
        hub_with(catalog_folder, identities=[team.tree, boss.tree]) as hub,
        Client(address_of(hub), Credentials(token=team.token)) as client,
        Client(address_of(hub), Credentials(token=boss.token)) as admin,
    ):
        admin.create_policy("force-10", [CLAMP])
        with pytest.raises(HubError, match=r"PERMISSION_DENIED: .*'force-10'"):
            client.delete_policy("force-10")
        admin.delete_policy("force-10")


def test_a_refusal_says_why_for_machines_and_holds_no_secret(catalog_folder):
    team = somebody("team-a", "observe")
    with (
        hub_with(catalog_folder, identities=[team.tree]) as hub,
        channel_to(hub, Credentials(token=team.token)) as channel,
    ):
        stub = steering_pb2_grpc.SteeringServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreatePolicy(steering_pb2.CreatePolicyRequest(), timeout=5)
        info = details(caught.value)["ErrorInfo"]
    assert (info.reason, info.domain) == ("SCOPE_MISSING", "steerscope")
    assert dict(info.metadata) == {"identity": "team-a", "scope": "steer"}
    assert team.token not in str(caught.value)


def test_two_authorizations_are_one_too_many(catalog_folder):
    team = somebody("team-a", "observe")
    two = [("authorization", f"Bearer {team.token}")] * 2
    with (
        hub_with(catalog_folder, identities=[team.tree]) as hub,
        channel_to(hub, Credentials()) as channel,
    ):
        stub = catalog_pb2_grpc.CatalogServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetCatalog(catalog_pb2.GetCatalogRequest(), timeout=5, metadata=two)
        url = f"http://127.0.0.1:{hub.http_port}/v1/steerscope/requests/a"
        assert httpx.get(url, headers=two, timeout=5).status_code == 401
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details(caught.value)["ErrorInfo"].reason == "MALFORMED_CREDENTIALS"


def test_a_certificate_of_two_identities_is_that_of_neither(catalog_folder, secured):
    uris = ["spiffe://example.org/a", "spiffe://example.org/b"]
    identities = [{"name": uri[-1], "scopes": ["observe"], "certificate_uri": uri} for uri in uris]
    both = issue("both", secured.authority, *map(x509.UniformResourceIdentifier, uris))
    certificate, key = both.write(secured.folder, "both")
    credentials = Credentials(ca=secured.ca, certificate=certificate, key=key)
    with (
        hub_with(catalog_folder, tls=secured.tls(mutual=True), identities=identities) as hub,
        channel_to(hub, credentials) as channel,
    ):
        assert refused(channel) is grpc.StatusCode.UNAUTHENTICATED


def test_a_certificate_is_known_by_its_uri_or_its_subject(catalog_folder, secured):
    uri = "spiffe://example.org/team-a"
    by_uri = {"name": "by-uri", "scopes": ["observe"], "certificate_uri": uri}
    by_subject = {
        "name": "by-subject",
        "scopes": ["observe"],
        "certificate_subject": "CN=somebody,O=Example",
    }
    files = issue("somebody", secured.authority).write(secured.folder, "somebody")
    plain = Credentials(ca=secured.ca, certificate=files[0], key=files[1])
    with hub_with(
        catalog_folder, tls=secured.tls(mutual=True), identities=[by_uri, by_subject]
    ) as hub:
        for credentials, status in (
            (secured.client(uri), None),
            (plain, None),
            (secured.client(uri + "/more"), grpc.StatusCode.UNAUTHENTICATED),
        ):
            with channel_to(hub, credentials) as channel:
                assert refused(channel) is status


def test_a_wrong_token_is_refused_even_with_a_good_certificate(catalog_folder, secured):
    uri = "spiffe://example.org/team-a"
    identity = {"name": "team-a", "scopes": ["observe"], "certificate_uri": uri}
    good = secured.client(uri)
    wrong = Credentials(
        ca=good.ca, certificate=good.certificate, key=good.key, token="sst_" + "A" * 43
    )
    with (
        hub_with(catalog_folder, tls=secured.tls(mutual=True), identities=[identity]) as hub,
        channel_to(hub, wrong) as channel,
    ):
        assert refused(channel) is grpc.StatusCode.UNAUTHENTICATED


def test_an_identity_ends_when_it_expires(catalog_folder):
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    team = somebody("team-a", "observe", expires=soon.isoformat())
    with (
        hub_with(catalog_folder, identities=[team.tree]) as hub,
        channel_to(hub, Credentials(token=team.token)) as channel,
    ):
        assert refused(channel) is None
        eventually(lambda: refused(channel) is grpc.StatusCode.UNAUTHENTICATED, 10)


class Load(threading.Thread):
    """Calls without pause on one channel, and keeps what went wrong."""

    def __init__(self, channel):
        super().__init__()
        self.errors, self.num_served, self._ending = [], 0, False
        self._channel = channel

    def run(self):
        while not self._ending:
            status = refused(self._channel)
            if status is None:
                self.num_served += 1
            else:
                self.errors.append(status)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._ending = True
        self.join()


def test_certificates_change_under_load_without_a_call_lost(catalog_folder, secured):
    uri = "spiffe://example.org/team-a"
    identity = {"name": "team-a", "scopes": ["observe"], "certificate_uri": uri, "rate": None}
    with (
        hub_with(catalog_folder, tls=secured.tls(mutual=True), identities=[identity]) as hub,
        channel_to(hub, secured.client(uri)) as channel,
        Load(channel) as load,
    ):
        for _ in range(3):
            before = load.num_served
            renewed = issue_server(secured.authority)
            der = renewed.certificate.public_bytes(serialization.Encoding.DER)
            renewed.write(secured.folder, "hub")
            for port, http in ((hub.grpc_port, False), (hub.http_port, True)):
                shown = functools.partial(served_certificate, port, http=http)
                eventually(lambda now=shown, new=der: now() == new, 10)
            eventually(lambda n=before: load.num_served > n + 20, 10)
            with channel_to(hub, secured.client(uri)) as fresh:
                assert refused(fresh) is None
    assert load.errors == []


def test_another_clients_authority_holds_for_new_connections_only(catalog_folder, secured):
    uri = "spiffe://example.org/team-a"
    identity = {"name": "team-a", "scopes": ["observe"], "certificate_uri": uri}
    clients = secured.folder / "clients.pem"
    clients.write_bytes(secured.authority.certificate_pem)
    tls = secured.tls() | {"client_ca": str(clients)}
    successor = issue("successor")
    with (
        hub_with(catalog_folder, tls=tls, identities=[identity]) as hub,
        channel_to(hub, secured.client(uri)) as old,
    ):
        assert refused(old) is None
        clients.write_bytes(successor.certificate_pem)

        def successor_is_known():
            with channel_to(hub, secured.client(uri, by=successor)) as channel:
                return refused(channel) is None

        eventually(successor_is_known, 10)
        assert refused(old) is None
        with channel_to(hub, secured.client(uri)) as late:
            assert refused(late) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("broken", ["garbage", "mismatch", "gone", "locked"])
def test_a_broken_new_certificate_leaves_the_old_one_and_shows_in_health(
    catalog_folder, secured, broken, capfd
):
    team = somebody("team-a", "observe")
    with (
        hub_with(catalog_folder, tls=secured.tls(), identities=[team.tree]) as hub,
        httpx.Client(
            base_url=f"https://127.0.0.1:{hub.http_port}", verify=str(secured.ca), timeout=5
        ) as http,
    ):
        der = served_certificate(hub.grpc_port, http=False)
        whole = secured.certificate.read_bytes(), secured.key.read_bytes()
        if broken == "garbage":
            secured.certificate.write_bytes(b"not PEM")
        elif broken == "mismatch":
            secured.key.write_bytes(issue_server(secured.authority).key_pem)
        elif broken == "gone":
            secured.key.unlink()
        else:
            secured.key.write_bytes(locked_key())
        found = eventually(lambda: http.get("/health").json()["problems"])
        assert found == ["security.tls: the new file is broken, the old one is in force"]
        assert health(hub, secured) == NOT_SERVING
        assert served_certificate(hub.grpc_port, http=False) == der
        assert served_certificate(hub.http_port, http=True) == der
        with channel_to(hub, Credentials(ca=secured.ca, token=team.token)) as channel:
            assert refused(channel) is None
        secured.certificate.write_bytes(whole[0])
        secured.key.write_bytes(whole[1])
        eventually(lambda: not http.get("/health").json()["problems"])
        eventually(lambda: health(hub, secured) == SERVING)
    assert capfd.readouterr().err.count("the old one stays in force") >= 1


def health(hub, secured):
    """What anyone may ask."""
    with channel_to(hub, Credentials(ca=secured.ca)) as channel:
        request = health_pb2.HealthCheckRequest(service=SECURITY_SERVICE)
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def locked_key():
    return issue("x").key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


def write_identities(path, *people):
    path.write_text(yaml.safe_dump({"identities": [person.tree for person in people]}))


def test_identities_come_and_go_with_their_file_under_load(catalog_folder, tmp_path):
    path = tmp_path / "identities.yaml"
    stays, goes, comes = (somebody(name, "observe") for name in ("stays", "goes", "comes"))
    for person in (stays, goes, comes):
        person.tree["rate"] = None
    write_identities(path, stays, goes)
    with (
        hub_with(catalog_folder, identities_file=str(path)) as hub,
        channel_to(hub, Credentials(token=stays.token)) as staying,
        channel_to(hub, Credentials(token=goes.token)) as going,
        channel_to(hub, Credentials(token=comes.token)) as coming,
        Load(staying) as load,
    ):
        assert refused(going) is None
        assert refused(coming) is grpc.StatusCode.UNAUTHENTICATED
        write_identities(path, stays, comes)
        eventually(lambda: refused(coming) is None)
        assert refused(going) is grpc.StatusCode.UNAUTHENTICATED
    assert load.errors == []
    assert load.num_served > 0


@pytest.mark.parametrize(
    "text",
    [
        "identities: [",
        "identities: [{name: x, scopes: [root], token_sha256: " + "0" * 64 + "}]",
        "identities: [{name: x, scopes: [observe]}]",
        "\x00",
        "identities: [{name: x, expires: 2027-13-45T00:00:00Z}]",
    ],
)
def test_a_broken_file_of_identities_leaves_the_old_ones(catalog_folder, tmp_path, text):
    path = tmp_path / "identities.yaml"
    team = somebody("team-a", "observe")
    write_identities(path, team)
    with (
        hub_with(catalog_folder, identities_file=str(path)) as hub,
        channel_to(hub, Credentials(token=team.token)) as channel,
    ):
        path.write_text(text)
        url = f"http://127.0.0.1:{hub.http_port}/health"
        found = eventually(lambda: httpx.get(url, timeout=5).json()["problems"])
        assert found == [
            "security.identities_file: the new file is broken, the old one is in force"
        ]
        assert refused(channel) is None
        write_identities(path, team)
        eventually(lambda: not httpx.get(url, timeout=5).json()["problems"])


def test_a_broken_file_of_identities_does_not_start(catalog_folder, tmp_path):
    path = tmp_path / "identities.yaml"
    path.write_text("identities: [{name: x, scopes: [observe], token_sha256: short}]")
    with (
        pytest.raises(HubError, match=r"identities\.yaml: .*token_sha256"),
        hub_with(catalog_folder, identities_file=str(path)),
    ):
        pass


def test_a_stream_ends_when_its_caller_is_struck_off(catalog_folder, catalog, tmp_path):
    path = tmp_path / "identities.yaml"
    team, other = somebody("team-a", "observe"), somebody("other", "observe")
    write_identities(path, team, other)
    with (
        hub_with(catalog_folder, identities_file=str(path)) as hub,
        Client(address_of(hub), Credentials(token=team.token)) as client,
        channel_to(hub, Credentials(token=team.token)) as channel,
    ):
        worker = Worker(hub.endpoint)
        events = client.watch_requests()
        worker.send(frame(catalog, ("a", 0, 2), started=(start("a", 2),)))
        assert next(events).started.name == "requests/a"
        write_identities(path, other)
        eventually(lambda: refused(channel) is grpc.StatusCode.UNAUTHENTICATED)
        worker.send(frame(catalog, ("b", 0, 2), started=(start("b", 2),)))
        with pytest.raises(HubError, match="UNAUTHENTICATED: team-a has changed or expired"):
            next(events)
        worker.close()


def test_a_client_does_not_send_its_token_in_cleartext_beyond_loopback():
    with pytest.raises(ConfigError, match=r"token: hub\.example:50051 .*ca or system_ca"):
        Client("hub.example:50051", Credentials(token="sst_x"))


def test_credentials_do_not_show_their_token():
    assert "sst_x" not in repr(Credentials(token="sst_x"))


def test_half_a_client_certificate_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="both or neither"):
        Credentials(ca=tmp_path / "ca", certificate=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"^ca: .*No such file"):
        Client("localhost:1", Credentials(ca=tmp_path / "gone"))
