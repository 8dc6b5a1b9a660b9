"""What the hub says of itself and of engines that went silent."""

import time

import hub_world
import observed_world
import pytest
from hub_world import ENGINE, eventually, frame, scrape
from steerscope.catalog import store
from steerscope.config import HubSettings, Settings
from steerscope.hub import launcher

pytestmark = pytest.mark.timeout(60)

PATIENCE = 30.0
LAST_SEEN = "steerscope_engine_last_seen_seconds"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return store.load(observed_world.write_catalog(tmp_path_factory.mktemp("small") / "catalog"))


@pytest.fixture
def hub(catalog):
    settings = Settings(
        catalog=str(catalog.folder),
        hub=HubSettings(grpc_address="127.0.0.1:0", http_address="127.0.0.1:0"),
    )
    running = launcher.start_hub(settings)
    yield running
    running.stop()


@pytest.fixture
def worker(hub):
    worker = hub_world.Worker(hub.endpoint)
    yield worker
    worker.close()


def test_silence_grows_until_the_next_frame(hub, worker, catalog):
    def silence():
        return scrape(hub.http_port).value(LAST_SEEN, **ENGINE)

    def silence_after_a_frame():
        worker.send(frame(catalog))
        return silence()

    first = eventually(silence_after_a_frame, PATIENCE)
    time.sleep(1.0)
    later = silence()
    assert later - first >= 1.0
    eventually(lambda: silence_after_a_frame() < later, PATIENCE)


def test_an_engine_whose_frames_are_all_refused_was_never_seen(hub, worker, catalog):
    worker.send(frame(catalog, engine="7", catalog_digest="0" * 64))
    refused = {"model_name": "demo", "engine": "7", "reason": "catalog_mismatch"}
    name = "steerscope_frames_dropped_total"
    eventually(lambda: scrape(hub.http_port).value(name, **refused), PATIENCE)
    assert scrape(hub.http_port).value(LAST_SEEN, model_name="demo", engine="7") is None


def test_the_hub_counts_the_processor_time_it_uses(hub):
    before = scrape(hub.http_port).value("steerscope_hub_cpu_seconds_total")
    after = before
    for _ in range(50):
        after = scrape(hub.http_port).value("steerscope_hub_cpu_seconds_total")
    assert after > before > 0.0
