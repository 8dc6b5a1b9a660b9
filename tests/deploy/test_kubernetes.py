"""What kubectl makes of the base, of each component and of the overlays."""

import json
import subprocess

import pytest
import shipped
import yaml

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed"
)

MADE_BY_HAND = {
    "steerscope-tls": {"tls.crt", "tls.key", "ca.crt"},
    "steerscope-identities": {"identities.yaml"},
    "steerscope-redis": {"password", "users.acl"},
    "steerscope-redis-tls": {"tls.crt", "tls.key", "ca.crt"},
}
"""Secrets that the documented commands make, from the folder of the same name."""
CUSTOM = {
    "monitoring.coreos.com/v1": (
        "@kubernetes-models/prometheus-operator/_schemas/"
        "ComGithubPrometheusOperatorPrometheusOperatorPkgApisMonitoringV1{kind}.js"
    ),
    "cert-manager.io/v1": "@kubernetes-models/cert-manager/_schemas/CertManagerIoV1{kind}.mjs",
}


def all_renderings():
    yield from (("overlay", name) for name in shipped.OVERLAYS)
    yield from (("component", name) for name in shipped.COMPONENTS)


@pytest.fixture(params=all_renderings(), ids="-".join)
def rendered(request, tmp_path):
    sort, name = request.param
    return shipped.overlay(name) if sort == "overlay" else shipped.with_component(name, tmp_path)


@pytest.fixture
def production():
    return shipped.overlay("production")


def is_custom(found):
    return found["apiVersion"] in CUSTOM


def test_every_object_fits_the_schema_of_kubernetes(rendered):
    checked = [found for found in rendered if not is_custom(found)]
    assert checked
    for found in checked:
        kubernetes_validate.validate(found, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_would_notice_a_misspelt_field():
    deployment = shipped.named(shipped.overlay("demo"), "Deployment", "steerscope-vllm")
    deployment = json.loads(json.dumps(deployment))
    deployment["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, kubernetes_validate.latest_version(), strict=True)


def custom_error(found):
    """Why the operator's schema refuses the object; empty when it does not."""
    module = shipped.npm_folder() / "node_modules" / CUSTOM[found["apiVersion"]]
    done = subprocess.run(
        ["node", shipped.ROOT / "tests/deploy/validate_custom.mjs", str(module).format(**found)],
        input=json.dumps(found),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stderr


def test_every_custom_object_fits_the_schema_of_its_operator(production):
    checked = [found for found in production if is_custom(found)]
    assert {found["kind"] for found in checked} == {
        "PodMonitor",
        "PrometheusRule",
        "Issuer",
        "Certificate",
    }
    for found in checked:
        assert custom_error(found) == "", found["metadata"]["name"]


def test_the_operators_schema_would_notice_a_field_that_is_missing_or_of_another_type(production):
    """It takes fields that it does not know, so a misspelt one is only seen by what it lacks."""
    (monitor,) = shipped.of_kind(json.loads(json.dumps(production)), "PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["tlsConfig"]["serverName"] = ["hub"]
    del monitor["spec"]["selector"]
    error = custom_error(monitor)
    assert "serverName" in error
    assert "selector" in error


@pytest.mark.parametrize("name", [n for n in shipped.COMPONENTS if n not in shipped.REACHES_OUT])
def test_other_components_need_no_leave_to_read_outside_of_their_folder(name, tmp_path):
    assert shipped.with_component(name, tmp_path, may_reach_out=False)


def test_pods_are_restricted_as_the_pod_security_standard_has_it(rendered):
    found = dict(shipped.pod_specs(rendered))
    assert "steerscope-vllm" in found
    for spec in found.values():
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not spec["automountServiceAccountToken"]
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert not context["allowPrivilegeEscalation"]
            assert context["readOnlyRootFilesystem"]


def test_every_volume_is_generated_or_made_by_a_documented_command(rendered):
    config_maps = {o["metadata"]["name"] for o in shipped.of_kind(rendered, "ConfigMap")}
    for _, spec in shipped.pod_specs(rendered):
        for volume in spec["volumes"]:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in config_maps
            if "secret" in volume:
                keys = {item["key"] for item in volume["secret"].get("items", [])}
                assert keys <= MADE_BY_HAND[volume["secret"]["secretName"]]


def test_the_documented_commands_make_what_the_secrets_hold(credentials):
    for secret, keys in MADE_BY_HAND.items():
        folder = credentials / secret.removeprefix("steerscope-")
        assert {path.name for path in folder.iterdir()} == keys


@pytest.mark.parametrize("component", [None, "redis"])
def test_the_pod_has_what_its_config_names(component, tmp_path):
    if component is None:
        objects = shipped.kustomized(shipped.KUBERNETES / "base", may_reach_out=False)
    else:
        objects = shipped.with_component(component, tmp_path)
    (container,) = dict(shipped.pod_specs(objects))["steerscope-vllm"]["containers"]
    (config_map,) = [
        o for o in shipped.of_kind(objects, "ConfigMap") if "steerscope.yaml" in o["data"]
    ]
    text = config_map["data"]["steerscope.yaml"]
    tree = yaml.safe_load(text)
    mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
    named = [*tree["security"]["tls"].values(), tree["security"]["identities_file"]]
    if component == "redis":
        named.append(tree["state"]["redis"]["url"].partition("ssl_ca_certs=")[2])
        assert tree["state"]["redis"]["password_env"] in {e["name"] for e in container["env"]}
    for path in named:
        assert path.rpartition("/")[0] in mounted
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert tree["hub"]["grpc_address"].endswith(f":{ports['hub-grpc']}")
    assert tree["hub"]["http_address"].endswith(f":{ports['hub-http']}")


def test_a_hub_that_is_down_takes_no_pod_out_of_service(rendered):
    (container,) = dict(shipped.pod_specs(rendered))["steerscope-vllm"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}


def test_ports_are_named_as_the_container_names_them(production):
    (container,) = dict(shipped.pod_specs(production))["steerscope-vllm"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    for service in ("steerscope-vllm", "steerscope-hub"):
        for port in shipped.named(production, "Service", service)["spec"]["ports"]:
            assert port["targetPort"] in ports
    (monitor,) = shipped.of_kind(production, "PodMonitor")
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} == {"http", "hub-http"}
    policy = shipped.named(production, "NetworkPolicy", "steerscope-vllm")
    allowed = {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]}
    assert allowed == ports


def test_prometheus_asks_for_a_name_that_the_certificate_has(production, credentials):
    (monitor,) = shipped.of_kind(production, "PodMonitor")
    endpoints = {e["port"]: e for e in monitor["spec"]["podMetricsEndpoints"]}
    name = endpoints["hub-http"]["tlsConfig"]["serverName"]
    assert name in shipped.named(production, "Certificate", "steerscope-hub")["spec"]["dnsNames"]
    shown = subprocess.run(
        ["openssl", "x509", "-in", credentials / "tls/tls.crt", "-noout", "-checkhost", name],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "does match" in shown.stdout


def test_the_dashboards_are_all_there_byte_for_byte(tmp_path):
    objects = shipped.with_component("dashboards", tmp_path)
    found = shipped.named(objects, "ConfigMap", "steerscope-dashboards")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    shipped_ones = {path.name: path.read_text() for path in shipped.GENERATED.glob("*.json")}
    assert shipped_ones
    assert found["data"] == shipped_ones
    assert len(json.dumps(found)) < 1 << 20, "a ConfigMap holds no more than that"


def test_several_replicas_come_with_shared_state(production):
    deployment = shipped.named(production, "Deployment", "steerscope-vllm")
    assert deployment["spec"]["replicas"] > 1
    text = "".join(json.dumps(o) for o in shipped.of_kind(production, "ConfigMap"))
    assert "rediss://" in text
