from __future__ import annotations

import contextlib

import hub_world
import pytest
from steerscope.catalog import store
from steerscope.client import Client
from steerscope.config import HubSettings, Settings
from steerscope.hub import launcher
from steerscope.hub.link import FrontendLink


@pytest.fixture(scope="session")
def catalog_folder(tmp_path_factory):
    return hub_world.write_catalog(tmp_path_factory.mktemp("small") / "catalog")


@pytest.fixture(scope="session")
def catalog(catalog_folder):
    return store.load(catalog_folder)


@pytest.fixture(scope="session")
def settings(catalog_folder):
    return Settings(
        catalog=str(catalog_folder),
        hub=HubSettings(grpc_address="127.0.0.1:0", http_address="127.0.0.1:0"),
    )


@pytest.fixture
def hub(settings):
    """A hub of one's own."""
    running = launcher.start_hub(settings)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def shared_hub(settings):
    """One hub for the tests of a module that do not count absolutely."""
    running = launcher.start_hub(settings)
    yield running
    running.stop()


@pytest.fixture
def client(shared_hub):
    with Client(f"127.0.0.1:{shared_hub.grpc_port}") as client:
        yield client


@pytest.fixture
def front_end(hub, catalog):
    """A front end's link."""
    link = FrontendLink(hub.endpoint, catalog.digest)
    link.start()
    yield link
    link.close()


@pytest.fixture
def worker_of():
    """Makes a worker of any hub."""
    with contextlib.ExitStack() as workers:

        def make(hub):
            worker = hub_world.Worker(hub.endpoint)
            workers.callback(worker.close)
            return worker

        yield make


@pytest.fixture
def worker(hub, worker_of):
    return worker_of(hub)
