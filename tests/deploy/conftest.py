from __future__ import annotations

import os
import subprocess

import pytest
import shipped


@pytest.fixture(scope="session")
def credentials(tmp_path_factory):
    """What the documented command makes; the hub is called as in compose and in the cluster."""
    folder = tmp_path_factory.mktemp("deploy") / "secrets"
    done = subprocess.run(
        [shipped.DEPLOY / "credentials.sh", folder, "vllm"],
        env={**os.environ, "STEERSCOPE": str(shipped.STEERSCOPE)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def deployed(credentials, tmp_path_factory):
    """Gives the config of that name as the hub would see it, its folders moved into one of ours."""

    def make(config):
        folder = tmp_path_factory.mktemp(config.parent.name)
        return shipped.relocated(config, shipped.mounts(credentials), folder)

    return make
