"""Every config of Steerscope that is shipped, checked as the deployed command checks it."""

import re
import stat
import subprocess

import pytest
import shipped
import yaml
from steerscope import config


@pytest.mark.parametrize("name", shipped.CONFIGS)
def test_steerscope_check_takes_every_config(name, deployed):
    done = subprocess.run(
        [shipped.STEERSCOPE, "check", deployed(shipped.CONFIGS[name])],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "admin" in done.stdout
    assert ("no TLS" in done.stdout) == (name == "systemd")


@pytest.mark.parametrize("name", shipped.CONFIGS)
def test_paths_are_absolute_since_a_mounted_file_may_be_a_link_into_another_folder(name):
    text = shipped.CONFIGS[name].read_text()
    keys = ("catalog", "certificate", "key", "identities_file", "sqlite", "path")
    paths = re.findall(rf"^ *(?:{'|'.join(keys)}): *(\S+)", text, re.MULTILINE)
    assert paths
    assert all(path.startswith("/") for path in paths), paths


@pytest.mark.parametrize(("name", "tree"), [("cluster with Redis", "state"), ("compose", "otel")])
def test_variants_of_the_clusters_config_differ_by_one_tree(name, tree):
    variant = yaml.safe_load(shipped.CONFIGS[name].read_text())
    assert variant.pop(tree)
    assert variant == yaml.safe_load(shipped.CONFIGS["cluster"].read_text())


def test_beyond_loopback_a_missing_certificate_stops_the_hub(deployed):
    path = deployed(shipped.CONFIGS["cluster"])
    tree = yaml.safe_load(path.read_text())
    del tree["security"]["tls"]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(config.ConfigError, match=r"hub\.grpc_address"):
        config.load_file(path)


def test_only_the_owner_reaches_what_the_credentials_command_makes(credentials):
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o700
    for name in ("ca.key", "admin.token"):
        assert stat.S_IMODE((credentials / name).stat().st_mode) == 0o600
    token = (credentials / "admin.token").read_text().strip()
    handed_on = [p for p in credentials.rglob("*") if p.is_file() and p.parent != credentials]
    assert handed_on
    assert all(token not in path.read_text() for path in handed_on)


def test_the_credentials_command_overwrites_nothing(credentials):
    before = (credentials / "tls" / "tls.key").read_bytes()
    done = subprocess.run(
        [shipped.DEPLOY / "credentials.sh", credentials],
        env={"PATH": "/usr/bin:/bin", "STEERSCOPE": str(shipped.STEERSCOPE)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert (credentials / "tls" / "tls.key").read_bytes() == before
