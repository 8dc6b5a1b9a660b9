"""The libraries whose formats we read, each in its own interpreter, and the files they make."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "owners"

Run = Callable[..., None]
"""Run an owner's script: its name, then its arguments."""


def _path(owner: str) -> str:
    """What goes on the path for an owner; skips where it cannot be had."""
    command = [str(ROOT / "scripts/setup_owners.sh"), owner]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"owners: {owner}: not fetched within five minutes")
    if done.returncode:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()


def _runner(owner: str) -> Run:
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": _path(owner)}

    def run(script: str, *arguments: Path) -> None:
        command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture(scope="session")
def run_saelens() -> Run:
    return _runner("sae_lens")


@pytest.fixture(scope="session")
def saelens_files(run_saelens: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saelens")
    run_saelens("make_saelens.py", folder)
    return folder


@pytest.fixture(scope="session")
def sparsify_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparsify")
    _runner("sparsify")("make_sparsify.py", folder)
    return folder


@pytest.fixture(scope="session")
def circuit_tracer_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("circuit_tracer")
    _runner("circuit_tracer")("make_circuit_tracer.py", folder)
    return folder


@pytest.fixture(scope="session")
def repeng_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repeng")
    _runner("repeng")("make_repeng.py", folder)
    return folder
