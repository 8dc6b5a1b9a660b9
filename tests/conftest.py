"""Shared fixtures: a tiny random model with a catalog, and the demo server for all who need it."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """The embedded model behind a real, compiled vLLM server; one for the whole run."""
    from steerscope.demo.live import server

    with server.running(tmp_path_factory.mktemp("demo")) as running:
        yield running
