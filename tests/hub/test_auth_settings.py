"""Where a hub may listen, what its settings must say for that, and what HTTP shows to whom."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml
from auth_world import LOOPBACK, Secured, hub_with, somebody
from steerscope import config
from steerscope.cli.main import main
from steerscope.client import Client
from steerscope.client.channel import Credentials
from steerscope.config import SteeringSettings
from steerscope.errors import ConfigError, HubError, SpecError
from steerscope.hub.auth import tokens
from steerscope.steering.admission import Admission

pytestmark = pytest.mark.timeout(90)

EVERYWHERE = {"grpc_address": "0.0.0.0:0", "http_address": "0.0.0.0:0"}
INLINE = '{"interventions":[{"feature":"known","add":1.0}]}'


@pytest.fixture
def secured(tmp_path):
    return Secured(tmp_path)


def settings_of(catalog_folder, hub=None, steering=None, **security):
    tree = {
        "catalog": str(catalog_folder),
        "hub": hub or LOOPBACK,
        "steering": steering or {},
        "security": security,
    }
    return config.from_tree(tree, base=Path("/base"), where="test")


@pytest.mark.parametrize("field", ["grpc_address", "http_address"])
@pytest.mark.parametrize("given", [set(), {"tls"}, {"identities"}])
def test_beyond_loopback_needs_a_certificate_and_an_identity(catalog_folder, secured, field, given):
    whole = {"tls": secured.tls(), "identities": [somebody("team-a", "observe").tree]}
    security = {key: value for key, value in whole.items() if key in given}
    hub = LOOPBACK | {field: "0.0.0.0:0"}
    with pytest.raises(ConfigError, match=rf"hub\.{field}: .*security\.tls .*security\.identities"):
        settings_of(catalog_folder, hub, **security)
    assert settings_of(catalog_folder, hub, **whole)


def test_an_empty_file_of_identities_is_not_enough_beyond_loopback(
    catalog_folder, secured, tmp_path
):
    path = tmp_path / "identities.yaml"
    path.write_text("identities: []")
    with (
        pytest.raises(HubError, match=r"security\.identities_file: .*beyond loopback"),
        hub_with(catalog_folder, EVERYWHERE, tls=secured.tls(), identities_file=str(path)),
    ):
        pass


def test_strangers_are_admins_on_loopback_only(catalog_folder, secured):
    team = somebody("team-a", "observe").tree
    with pytest.raises(ConfigError, match=r"security\.unauthenticated: admin is for loopback"):
        settings_of(
            catalog_folder,
            EVERYWHERE,
            tls=secured.tls(),
            identities=[team],
            unauthenticated="admin",
        )


SHA = "0" * 64


@pytest.mark.parametrize(
    ("identities", "message"),
    [
        ([{"name": "a", "scopes": ["observe"]}], "a: needs token_sha256"),
        ([{"name": "a", "scopes": [], "token_sha256": SHA}], "a: scopes"),
        ([{"name": "anonymous", "scopes": ["observe"], "token_sha256": SHA}], "'anonymous'"),
        ([{"name": "a", "scopes": ["root"], "token_sha256": SHA}], r"identities\[0\]\.scopes"),
        ([{"name": "a", "scopes": ["observe"], "token_sha256": "ABC"}], "token_sha256"),
        ([{"name": "a", "scopes": ["observe"], "token": "x"}], "unknown field `token`"),
        ([{"name": "a", "scopes": ["observe"], "certificate_uri": "x"}], "client_ca"),
        ([{"name": "a", "scopes": ["admin"], "token_sha256": SHA, "max_dose": 1.0}], "not bound"),
        ([{"name": "a", "scopes": ["observe"], "token_sha256": SHA, "policies": ["*"]}], "steer"),
        ([{"name": "a", "scopes": ["observe"], "token_sha256": SHA}] * 2, "'a' is taken"),
        (
            [{"name": name, "scopes": ["observe"], "token_sha256": SHA} for name in "ab"],
            "b: has the same token_sha256 as a",
        ),
        (
            [
                {
                    "name": "a",
                    "scopes": ["observe"],
                    "token_sha256": SHA,
                    "expires": "2027-01-01T00:00:00",
                }
            ],
            "expires",
        ),
    ],
)
def test_an_identity_that_does_not_say_what_it_means_is_refused(
    catalog_folder, identities, message
):
    with pytest.raises(ConfigError, match=message):
        settings_of(catalog_folder, identities=identities)


def test_settings_travel_to_the_hub_with_their_times_and_paths(catalog_folder):
    tree = yaml.safe_load(
        f"{{name: a, scopes: [steer], token_sha256: '{SHA}', expires: 2027-01-01T00:00:00Z}}"
    )
    settings = settings_of(
        catalog_folder, identities=[tree], tls={"certificate": "c.pem", "key": "/k.pem"}
    )
    assert settings.security.tls.certificate == "/base/c.pem"
    assert settings.security.tls.key == "/k.pem"
    sent = json.loads(json.dumps(config.to_tree(settings)))
    assert config.from_tree(sent, base=Path("/elsewhere"), where="test") == settings


@pytest.mark.parametrize(
    ("hub", "named", "asked", "allowed"),
    [
        (LOOPBACK, False, None, True),
        (LOOPBACK, True, None, False),
        (EVERYWHERE, True, None, False),
        (LOOPBACK, False, False, False),
        (EVERYWHERE, True, True, True),
    ],
)
def test_inline_steering_is_off_unless_allowed_or_the_hub_is_for_oneself(
    catalog_folder, catalog, secured, hub, named, asked, allowed
):
    identities = [somebody("team-a", "observe").tree] if named else []
    steering = {} if asked is None else {"allow_inline": asked}
    settings = settings_of(catalog_folder, hub, steering, tls=secured.tls(), identities=identities)
    admission = Admission(catalog, settings.steering, dict)
    if allowed:
        assert admission.resolve({"steering": INLINE}).policy == "inline"
        return
    with pytest.raises(SpecError, match=r"allow_inline") as caught:
        admission.resolve({"steering": INLINE})
    assert caught.value.field.rstrip(".") == "steering"


def test_named_policies_work_where_inline_steering_is_off(catalog):
    policies = {policy.name: policy for policy in catalog.policies}
    admission = Admission(catalog, SteeringSettings(allow_inline=False), lambda: policies)
    assert admission.resolve({"steering": "force-known"}).policy == "force-known"


def pages(hub, secured, **headers):
    """The statuses of /metrics, /health and a report, over HTTPS."""
    with httpx.Client(
        base_url=f"https://127.0.0.1:{hub.http_port}",
        verify=str(secured.ca),
        headers=headers,
        timeout=5,
    ) as http:
        paths = ("/metrics", "/health", "/v1/steerscope/requests/a")
        return [http.get(path).status_code for path in paths]


def test_beyond_loopback_http_needs_a_token_for_all_but_health(catalog_folder, secured):
    team = somebody("team-a", "observe")
    with hub_with(catalog_folder, EVERYWHERE, tls=secured.tls(), identities=[team.tree]) as hub:
        assert pages(hub, secured) == [401, 200, 401]
        assert pages(hub, secured, authorization="Bearer sst_wrong") == [401, 200, 401]
        assert pages(hub, secured, authorization=team.token) == [401, 200, 401]
        assert pages(hub, secured, authorization=f"Bearer {team.token}") == [200, 200, 404]
        with Client(
            f"127.0.0.1:{hub.grpc_port}", Credentials(ca=secured.ca, token=team.token)
        ) as client:
            assert client.list_features()


def test_metrics_are_open_beyond_loopback_if_the_operator_says_so(catalog_folder, secured):
    team = somebody("team-a", "observe")
    with hub_with(
        catalog_folder, EVERYWHERE, tls=secured.tls(), identities=[team.tree], metrics_open=True
    ) as hub:
        assert pages(hub, secured) == [200, 200, 401]


def test_on_loopback_metrics_are_open_and_reports_are_not_once_somebody_is_named(
    catalog_folder,
):
    team = somebody("team-a", "observe")
    with hub_with(catalog_folder, identities=[team.tree]) as hub:
        url = f"http://127.0.0.1:{hub.http_port}"
        assert httpx.get(f"{url}/metrics", timeout=5).status_code == 200
        refused = httpx.get(f"{url}/v1/steerscope/requests/a", timeout=5)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["reason"] == "NO_CREDENTIALS"


def test_strangers_may_look_where_the_operator_lets_them(catalog_folder):
    team = somebody("team-a", "admin")
    with (
        hub_with(catalog_folder, identities=[team.tree], unauthenticated="observe") as hub,
        Client(f"127.0.0.1:{hub.grpc_port}") as client,
    ):
        assert client.list_features()
        with pytest.raises(HubError, match="UNAUTHENTICATED"):
            client.create_policy("x", [{"feature": "known", "add": 1.0}])


CHATTY = (
    "import logging, sys\n"
    "logging.basicConfig(level=logging.DEBUG)\n"
    "from steerscope.hub.__main__ import main\n"
    "sys.exit(main())\n"
)


def test_no_token_is_logged_whatever_happens_to_it(catalog_folder, tmp_path):
    """With every logger at DEBUG, asyncio's and gRPC's own debugging on, over both ports."""
    team, late = somebody("team-a", "observe"), somebody("late", "observe")
    late.tree["expires"] = "2020-01-01T00:00:00Z"
    wrong = tokens.new_token().token
    settings = settings_of(catalog_folder, identities=[team.tree, late.tree])
    log = tmp_path / "log"
    environment = os.environ | {"PYTHONASYNCIODEBUG": "1", "GRPC_VERBOSITY": "debug"}
    command = [sys.executable, "-c", CHATTY, "--endpoint", str(tmp_path)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "--parent-pid", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
        )
        try:
            process.stdin.write(json.dumps(config.to_tree(settings)).encode())
            process.stdin.close()
            ready = json.loads(process.stdout.readline())
            for token in (team.token, late.token, wrong):
                show_everywhere(ready, token)
        finally:
            process.terminate()
            process.wait(10)
            process.stdout.close()
    text = log.read_text()
    assert "UNKNOWN_TOKEN" in text
    assert "DEBUG" in text
    for token in (team.token, late.token, wrong):
        assert token not in text
        assert token.removeprefix(tokens.PREFIX)[:20] not in text


def show_everywhere(ready, token):
    """Show a token well and badly, where it is served, refused and not understood."""
    address = f"127.0.0.1:{ready['grpc_port']}"
    url = f"http://127.0.0.1:{ready['http_port']}/v1/steerscope/requests/a"
    for header in (f"Bearer {token}", token, f"Basic {token}", f"Bearer {token}\t{token}"):
        httpx.get(url, headers={"authorization": header}, timeout=5)
    with Client(address, Credentials(token=token)) as client:
        for ask in (
            client.list_features,
            lambda: client.get_feature("nobody"),
            lambda: client.create_policy("x", [{"feature": "known", "add": 1.0}]),
        ):
            with contextlib.suppress(HubError):
                ask()


def test_a_token_is_printed_once_with_the_hash_that_the_config_keeps(capsys, monkeypatch, tmp_path):
    assert main(["token", "new"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    token, sha256 = lines["token"].strip(), lines["token_sha256"].strip()
    assert sha256 == tokens.sha256(token)
    assert len(token.removeprefix(tokens.PREFIX)) == 43  # 256 bits in base 64
    (tmp_path / "token").write_text(token + "\n")
    with (tmp_path / "token").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["token", "hash"]) == 0
    assert capsys.readouterr().out.strip() == sha256


def test_a_token_that_may_have_been_thought_up_is_not_hashed(capsys, monkeypatch, tmp_path):
    (tmp_path / "token").write_text("correct horse battery staple\n")
    with (tmp_path / "token").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert main(["token", "hash"]) == 2
    assert "horse" not in capsys.readouterr().err
