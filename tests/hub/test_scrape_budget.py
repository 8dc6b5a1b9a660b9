"""The cost of a scrape: 256 features, 4 engines, 50 policies, each series in use."""

import gzip
import http.client
import shutil
import subprocess
import time
from collections import Counter
from typing import NamedTuple

import hub_world
import msgspec
import pytest
import wide_world
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from steerscope.catalog import store
from steerscope.config import TelemetrySettings
from steerscope.errors import HubError
from steerscope.export import budget
from steerscope.hub import launcher

pytestmark = pytest.mark.timeout(120)

MAX_BYTES = 2_000_000
MAX_SECONDS = 0.1
NUM_SCRAPES = 25
TEXT, OPENMETRICS = "", "application/openmetrics-text; version=1.0.0"
PARSE = {TEXT: parse_text, OPENMETRICS: parse_openmetrics}
NUM_REQUESTS = 2


class Scrape(NamedTuple):
    """One answer as it came, and how long it took from the connection on."""

    body: bytes
    encoding: str
    seconds: float


def get(hub, accept, encoding="identity"):
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", hub.http_port, timeout=20)
    headers = {"accept": accept, "accept-encoding": encoding}
    connection.request("GET", "/metrics", headers=headers)
    reply = connection.getresponse()
    body = reply.read()
    seconds = time.perf_counter() - began
    connection.close()
    assert reply.status == 200
    return Scrape(body, reply.getheader("content-encoding", ""), seconds)


@pytest.fixture(scope="module")
def wide_catalog(tmp_path_factory):
    return store.load(wide_world.write_catalog(tmp_path_factory.mktemp("wide") / "catalog"))


@pytest.fixture(scope="module")
def wide_settings(settings, wide_catalog):
    return msgspec.structs.replace(
        settings, catalog=str(wide_catalog.folder), policies=wide_world.policies()
    )


@pytest.fixture(scope="module")
def wide_hub(wide_settings, wide_catalog):
    running = launcher.start_hub(wide_settings)
    worker = hub_world.Worker(running.endpoint)
    try:
        for engine in wide_world.ENGINES:
            for frame in wide_world.traffic(wide_catalog, engine, NUM_REQUESTS):
                worker.send(frame)
        hub_world.eventually(lambda: is_settled(running), seconds=60)
        yield running
    finally:
        worker.close()
        running.stop()


def is_settled(hub):
    """Whether the newest policy of every engine has been applied."""
    last = f'policy="policy-{wide_world.NUM_POLICIES - 1}"'.encode()
    lines = [line for line in get(hub, TEXT).body.splitlines() if last in line]
    applied = [line for line in lines if b'outcome="applied"' in line and line.endswith(b" 1")]
    return len(applied) == len(wide_world.ENGINES)


@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
def test_a_scrape_is_under_2_mb_and_has_the_series_that_were_told(
    wide_hub, wide_settings, wide_catalog, accept
):
    body = get(wide_hub, accept).body
    assert len(body) < MAX_BYTES
    told = budget.declared(wide_catalog, wide_settings)
    num_engines = len(wide_world.ENGINES)
    found = Counter({family.name: len(family.samples) for family in PARSE[accept](body.decode())})
    for row in told.rows:
        name = row.instrument.name.removesuffix("_total")
        assert found.pop(name) == row.of_hub + num_engines * row.of_engine, name
    assert not found
    lines = [line for line in body.splitlines() if not line.startswith(b"#")]
    assert len(lines) == told.num_series(num_engines)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@pytest.mark.parametrize("accept", [TEXT, OPENMETRICS])
def test_a_scrape_takes_less_than_100_ms(wide_hub, accept, encoding):
    fastest = min(get(wide_hub, accept, encoding).seconds for _ in range(NUM_SCRAPES))
    assert fastest < MAX_SECONDS


def test_a_scraper_that_takes_gzip_gets_the_page_at_a_tenth(wide_hub):
    plain, packed = get(wide_hub, TEXT), get(wide_hub, TEXT, "deflate, gzip")
    assert (plain.encoding, packed.encoding) == ("", "gzip")
    assert len(packed.body) < len(plain.body) / 10
    unpacked = gzip.decompress(packed.body)
    names = [[line.split()[0] for line in page.splitlines()] for page in (plain.body, unpacked)]
    assert names[0] == names[1]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_finds_nothing_to_complain_about_in_a_large_page(wide_hub):
    done = subprocess.run(
        ["promtool", "check", "metrics"],
        input=get(wide_hub, TEXT).body,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def test_a_hub_whose_engines_may_have_too_many_series_does_not_start(wide_settings):
    limits = TelemetrySettings(max_series_per_engine=5000)
    with pytest.raises(HubError, match=r"telemetry\.max_series_per_engine: 5000, and one engine"):
        launcher.start_hub(msgspec.structs.replace(wide_settings, telemetry=limits))
