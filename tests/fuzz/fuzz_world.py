"""What the targets run against: one small catalog in a folder in memory, and what is made of it."""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from hub_world import write_catalog
from steerscope.catalog import store as catalogs
from steerscope.catalog.store import Catalog
from steerscope.config import SteeringSettings
from steerscope.errors import SteerscopeError
from steerscope.steering.interventions import Policy

SETTINGS = SteeringSettings(max_dose=2.0, allow_inline=True)


@functools.cache
def folder() -> Path:
    """Of this process; in memory where the system has such a place."""
    memory = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="steerscope-fuzz-", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@functools.cache
def catalog() -> Catalog:
    """The small catalog of the hub's tests."""
    return catalogs.load(write_catalog(folder() / "catalog"))


@functools.cache
def policies() -> dict[str, Policy]:
    """Those in force."""
    return {policy.name: policy for policy in catalog().policies}


def written(name: str, data: bytes) -> Path:
    """A file that holds the input."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def refused(error: SteerscopeError) -> bool:
    """An input is refused as documented, and says why in text that can be printed."""
    assert str(error)
    repr(error)
    return False
