"""Every RPC of every service the hub has, for every kind of caller, by token and certificate."""

import grpc
import pytest
from auth_world import Secured, channel_to, hub_with, issue, methods_of, outcome, somebody
from steerscope.client.channel import Credentials
from steerscope.hub.auth.scopes import REQUIRED

ORDER = ["observe", "steer", "admin"]
CHANGES = {
    "CreatePolicy": "steer",
    "UpdatePolicy": "steer",
    "DeletePolicy": "steer",
    "SteerRequest": "steer",
    "ReleaseRequest": "steer",
    "UpdateRules": "admin",
}
"""What RPCs that change something require; a new one is to be thought about, and put here."""
READING = ("Get", "List", "Watch", "ServerReflectionInfo")
SERVED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.UNIMPLEMENTED,  # grpcio's asynchronous health service has no List
}
"""How an empty request ends that was let in."""
ANY = {"policies": ["*"], "features": ["*"]}
TRUST_DOMAIN = "spiffe://example.org/"


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    return Secured(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def people():
    return {
        "observe": somebody("observer", "observe"),
        "steer": somebody("steerer", "steer", **ANY),
        "admin": somebody("admin", "admin"),
        "expired": somebody("former", "admin", expires="2020-01-01T00:00:00Z"),
    }


@pytest.fixture(scope="module")
def channels(catalog_folder, secured, people):
    """A channel for each kind of caller of a hub that knows tokens."""
    identities = [person.tree for person in people.values()]
    given = {name: person.token for name, person in people.items()}
    given |= {"none": None, "wrong token": "sst_" + "A" * 43}
    with hub_with(catalog_folder, tls=secured.tls(), identities=identities) as hub:
        opened = {
            name: channel_to(hub, Credentials(ca=secured.ca, token=token))
            for name, token in given.items()
        }
        stranger = issue("stranger").write(secured.folder, "stranger")[0]
        opened["wrong CA"] = channel_to(hub, Credentials(ca=stranger, token=people["admin"].token))
        yield opened


@pytest.fixture(scope="module")
def certified(catalog_folder, secured):
    """A channel for each kind of caller of a hub that knows certificates."""
    identities = [
        {"name": scope, "scopes": [scope], "certificate_uri": TRUST_DOMAIN + scope}
        | (ANY if scope == "steer" else {})
        for scope in ORDER
    ]
    identities.append(
        {
            "name": "former",
            "scopes": ["admin"],
            "certificate_uri": TRUST_DOMAIN + "expired",
            "expires": "2020-01-01T00:00:00Z",
        }
    )
    with hub_with(catalog_folder, tls=secured.tls(mutual=True), identities=identities) as hub:
        opened = {
            name: channel_to(hub, secured.client(TRUST_DOMAIN + name))
            for name in (*ORDER, "expired", "none")
        }
        impostor = secured.client(TRUST_DOMAIN + "admin", by=issue("stranger"))
        opened["wrong CA"] = channel_to(hub, impostor)
        opened["no certificate"] = channel_to(hub, Credentials(ca=secured.ca))
        yield opened


def required(path, method):
    if path in ("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"):
        return None
    if path.rpartition("/")[2].startswith(READING):
        return "observe"
    return CHANGES[method.name]


def expected(caller, scope):
    """The statuses allowed to that caller where that scope is required."""
    if caller in ("wrong CA", "no certificate"):
        return {grpc.StatusCode.UNAVAILABLE}  # the handshake fails, so nobody is there to answer
    if scope is None:
        return SERVED
    if caller not in ORDER:
        return {grpc.StatusCode.UNAUTHENTICATED}
    if ORDER.index(caller) < ORDER.index(scope):
        return {grpc.StatusCode.PERMISSION_DENIED}
    return SERVED


@pytest.mark.parametrize("by", ["token", "certificate"])
def test_each_caller_may_do_what_their_scope_says_and_nothing_else(request, by):
    opened = request.getfixturevalue({"token": "channels", "certificate": "certified"}[by])
    methods = methods_of(opened["admin"])
    assert len(methods) >= 12
    wrong = []
    for path, method in methods.items():
        scope = required(path, method)
        for caller, channel in opened.items():
            status = outcome(channel, path, method)
            if status not in expected(caller, scope):
                wrong.append(f"{caller} {path}: {status.name}")
    assert wrong == []


def test_the_table_holds_every_rpc_and_nothing_else(channels):
    methods = methods_of(channels["admin"])
    assert set(REQUIRED) == set(methods)
    assert {path: required(path, method) for path, method in methods.items()} == dict(REQUIRED)


def test_a_method_that_does_not_exist_is_unimplemented(channels):
    ask = channels["none"].unary_unary("/steerscope.v1.CatalogService/Guess")
    with pytest.raises(grpc.RpcError) as caught:
        ask(b"", timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
