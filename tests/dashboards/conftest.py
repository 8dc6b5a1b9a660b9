from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "dashboards"), str(ROOT / "tests" / "hub")]


@functools.cache
def _tools_are_missing() -> str:
    """Why Prometheus's tools cannot be had; empty when they can."""
    done = subprocess.run(
        [ROOT / "scripts" / "install_prometheus.sh"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    last = (done.stderr.strip() or "no reason given").splitlines()[-1]
    return "" if done.returncode == 0 else last


@pytest.fixture(scope="session")
def prometheus_tools():
    """Prometheus, promtool, Alertmanager and amtool are on the path."""
    if reason := _tools_are_missing():
        pytest.skip(f"Prometheus cannot be installed: {reason}")


@pytest.fixture(scope="session")
def shipped():
    """Settings as they are shipped."""
    from steerscope_dashboards import settings

    return settings.load(ROOT / "dashboards" / "settings.yaml")


@pytest.fixture(scope="session")
def generated():
    """The folder of what is generated, as committed."""
    return ROOT / "dashboards" / "generated"


@pytest.fixture(scope="session")
def observed_world(prometheus_tools, generated, tmp_path_factory):
    """A hub with traffic, and a Prometheus that has scraped it for a while."""
    import observed_world

    with observed_world.running(tmp_path_factory.mktemp("observed"), generated) as world:
        yield world
