"""Shared fixtures: a tiny random model with a catalog, and the demo server for all who need it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine"))


class Tiny:
    """A random-weight model, its catalog and a config that names it."""

    def __init__(self, folder: Path) -> None:
        import tiny

        self.model = tiny.write_model(folder / "model")
        self.catalog = tiny.write_catalog(folder / "catalog", self.model)
        self.config = tiny.write_config(folder / "steerscope.yaml", self.catalog)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tmp_path_factory.mktemp("tiny"))


TEAM_TOKEN = "sst_" + 43 * "t"
DEMO_SETTINGS = {
    "steering": {"match_headers": ["x-team"], "allow_inline": True},
    "security": {
        "unauthenticated": "admin",
        "identities": [
            {
                "name": "team-a",
                "token_sha256": hashlib.sha256(TEAM_TOKEN.encode()).hexdigest(),
                "scopes": ["steer"],
                "policies": ["force-known"],
            }
        ],
    },
}
"""Someone whom rules can name, while all others on this machine may do everything."""


@pytest.fixture(scope="session")
def team_token() -> str:
    """The bearer token of the identity ``team-a``, which may use the policy force-known."""
    return TEAM_TOKEN


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The embedded model behind a real, compiled vLLM server; one for the whole run."""
    from steerscope.demo.live import server

    with server.running(
        tmp_path_factory.mktemp("demo"),
        environment={"VLLM_PLUGINS": "steerscope"},
        settings=DEMO_SETTINGS,
    ) as running:
        yield running
