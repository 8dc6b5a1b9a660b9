"""The demo overlay's pod, run with a read-only root, its user and nothing but its volumes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import shipped

pytest.importorskip("vllm", reason="vLLM is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
IS_HEALTHY = "import urllib.request as u; u.urlopen('http://localhost:8000/health', timeout=5)"


def why_not():
    """Why no such container can be made here; empty where one can."""
    if missing := [tool for tool in ("bwrap", "nsenter", "setpriv") if not shutil.which(tool)]:
        return f"there is no {missing[0]}"
    tried = subprocess.run(
        ["bwrap", "--unshare-net", "--unshare-pid", "--ro-bind", "/", "/", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if tried.returncode == 0 else tried.stderr.strip()


@pytest.fixture(scope="module")
def running(credentials, tmp_path_factory):
    if reason := why_not():
        pytest.skip(f"no container can be made here: {reason}")
    import pod

    log = tmp_path_factory.mktemp("pod") / "log"
    with log.open("wb") as output:
        made = pod.Pod(shipped.overlay("demo"), credentials, output)
    try:
        assert becomes_healthy(made), log.read_text(errors="replace")[-4000:]
        yield made
    finally:
        made.close()


def becomes_healthy(made):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and made.process.poll() is None:
        if is_healthy(made):
            return True
        time.sleep(1)
    return False


def is_healthy(made):
    try:
        made.inside(sys.executable, "-c", IS_HEALTHY)
    except AssertionError:
        return False
    return True


@pytest.fixture
def visited(running, credentials):
    visit = [sys.executable, str(HERE / "visit.py"), str(credentials)]
    return lambda: json.loads(running.inside(*visit, timeout=120))


def the_hub(running):
    (hub,) = [p for p in running.processes() if "steerscope.hub" in p.cmdline()]
    return hub


def test_it_serves_is_scraped_over_tls_and_answers_who_has_the_token(visited):
    found = visited()
    assert "policies/force-known" in found.pop("policies")
    assert found == {
        "steered": 200,
        "vllm metrics": 200,
        "hub metrics": True,
        "report": 401,
        "report with token": 200,
    }


def test_it_runs_as_the_manifests_user_without_capabilities(running):
    for process in running.processes():
        status = Path(f"/proc/{process.pid}/status").read_text().split("\n")
        fields = dict(line.split(":\t", 1) for line in status if ":\t" in line)
        assert set(fields["Uid"].split()) == {"2000"}
        assert int(fields["CapEff"], 16) == 0
        assert fields["NoNewPrivs"] == "1"


def test_it_writes_nowhere_but_into_its_volumes(running):
    places = {"/".join(path.split("/")[:3]) for path in running.written()}
    assert any(place.startswith("/tmp/steerscope-") for place in places), "the hub's sockets"
    assert "/home/vllm" in places, "compiled graphs"


def test_it_stays_healthy_without_its_hub_which_comes_back(running, visited):
    killed = the_hub(running)
    killed.kill()
    killed.wait(10)
    assert is_healthy(running)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            assert visited()["hub metrics"]
            break
        except AssertionError:
            time.sleep(1)
    assert the_hub(running).pid != killed.pid


def test_it_ends_by_itself_when_told_to(running):
    assert running.terminate() == 0
