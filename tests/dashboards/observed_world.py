"""A real hub fed with real frames, scraped by a real Prometheus with the shipped rules."""

from __future__ import annotations

import contextlib
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import hub_world
import msgspec
import yaml
from steerscope.catalog import store
from steerscope.catalog.store import Catalog
from steerscope.config import CanaryCheck, CanarySettings, HubSettings, Settings
from steerscope.demo.live.server import free_ports
from steerscope.hub import launcher
from steerscope.hub.launcher import RunningHub
from steerscope.hub.link import FrontendLink
from steerscope.steering.interventions import Intervention
from steerscope.telemetry.frames import CachedActivations, RequestEnd

SCRAPE_SECONDS = 1
WARM_UP_SECONDS = 15
"""Enough scrapes with traffic for every rate, and then some for the pictures."""
REQUESTS_PER_SECOND = 20
POLICY = "force-known"
SIGNALS = {"in_answer": "hallucination_risk", "at_question": "known_entity_confidence"}
"""The small catalog's signals under the names that the shipped rules are about."""
BASELINE = {"edges": [0.5, 1.0, 2.0], "shares": [0.3, 0.2, 0.3, 0.2], "num_tokens": 5000}
NUM_TOKENS = 16
"""Of a prompt, and of its answer: enough for drift after a few seconds."""


class World(NamedTuple):
    """Where the parts are reached."""

    prometheus: str
    metrics: str


@contextlib.contextmanager
def running(folder: Path, generated: Path, seconds: float = WARM_UP_SECONDS) -> Iterator[World]:
    """Hub, traffic and Prometheus; the traffic goes on for as long as the block lasts.

    There is no vLLM: whom the canary asks does not answer.
    """
    catalog_folder = write_catalog(folder / "catalog")
    catalog = store.load(catalog_folder)
    (nobody,) = free_ports(1)
    check = CanaryCheck(prompts=("Who?",), expect={"known_entity_confidence": "high"})
    settings = Settings(
        catalog=str(catalog_folder),
        hub=HubSettings(grpc_address="127.0.0.1:0", http_address="127.0.0.1:0"),
        canary=CanarySettings(base_url=f"http://127.0.0.1:{nobody}", checks={"unheard": check}),
    )
    with contextlib.ExitStack() as stack:
        hub = launcher.start_hub(settings)
        stack.callback(hub.stop)
        url = stack.enter_context(prometheus(folder / "prometheus", generated, hub.http_port))
        stack.enter_context(traffic(hub, catalog))
        time.sleep(seconds)
        yield World(url, f"http://127.0.0.1:{hub.http_port}/metrics")


def write_catalog(folder: Path) -> Path:
    """The hub tests' catalog, its signals renamed, with a baseline for each feature."""
    hub_world.write_catalog(folder)
    path = folder / "catalog.yaml"
    tree = yaml.safe_load(path.read_text())
    for signal in tree["signals"]:
        signal["name"] = SIGNALS.get(signal["name"], signal["name"])
    tree["baselines"] = [
        {"feature": feature["name"], "phase": phase, **BASELINE}
        for feature in tree["features"]
        for phase in ("prompt", "generation")
    ]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder


@contextlib.contextmanager
def prometheus(
    folder: Path, generated: Path, hub_port: int, vllm_port: int | None = None
) -> Iterator[str]:
    """A Prometheus with the generated rules that scrapes these ports; its address."""
    folder.mkdir(parents=True)
    (port,) = free_ports(1)
    config = folder / "prometheus.yml"
    every = f"{SCRAPE_SECONDS}s"
    tree: dict[str, Any] = {
        "global": {"scrape_interval": every, "evaluation_interval": every},
        "rule_files": [str(path.resolve()) for path in sorted(generated.glob("*.rules.yaml"))],
        "scrape_configs": [_scrape("steerscope", hub_port)],
    }
    if vllm_port is not None:
        # vLLM's page may repeat the hub's: scraped twice, every sum would be double.
        again = {"source_labels": ["__name__"], "regex": "steerscope_.*", "action": "drop"}
        tree["scrape_configs"].append(
            {**_scrape("vllm", vllm_port), "metric_relabel_configs": [again]}
        )
    config.write_text(yaml.safe_dump(tree))
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        hub_world.eventually(lambda: _is_ready(url), 30.0)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _scrape(job: str, port: int) -> dict[str, Any]:
    return {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}


def _is_ready(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{url}/-/ready", timeout=2).is_success
    return False


@contextlib.contextmanager
def traffic(hub: RunningHub, catalog: Catalog) -> Iterator[None]:
    """Requests of all kinds, until the block ends."""
    stopping = threading.Event()
    failures: list[BaseException] = []
    thread = threading.Thread(target=_drive, args=(hub, catalog, stopping, failures))
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(10)
    assert not failures, failures


def _drive(
    hub: RunningHub, catalog: Catalog, stopping: threading.Event, failures: list[BaseException]
) -> None:
    worker = hub_world.Worker(hub.endpoint)
    link = FrontendLink(hub.endpoint, catalog.digest)
    chance = random.Random(7)
    try:
        link.start()
        number = 0
        while not stopping.wait(1.0 / REQUESTS_PER_SECOND):
            number += 1
            _serve(worker, link, catalog, f"r{number}", chance)
    except BaseException as error:
        failures.append(error)
    finally:
        link.close()
        worker.close()


def _serve(
    worker: hub_world.Worker,
    link: FrontendLink,
    catalog: Catalog,
    name: str,
    chance: random.Random,
) -> None:
    """A request, half of it prompt, whose first token is mostly found in the prefix cache."""
    kind = chance.random()
    if kind < 0.02:
        link.rejected(name, "no-such-policy", "steering", "no such policy")
        return
    steered = kind < 0.3
    policy = POLICY if steered else ""
    edits = (Intervention(feature="known", clamp=6.0),) if steered else ()
    if steered:
        link.admitted(name, policy, "d1")
    told = hub_world.start(name, NUM_TOKENS, first_position=1, policy=policy, interventions=edits)
    if kind < 0.9:
        told = msgspec.structs.replace(told, cached=_cached(catalog))
    edited = {0: 3.0, 1: 1.0} if steered else None
    prompt, answer = (_activations(chance, count) for count in (NUM_TOKENS - 1, NUM_TOKENS))
    cost = int(chance.gammavariate(4.0, 40_000.0))
    worker.send(
        hub_world.frame(
            catalog,
            (name, 1, len(prompt)),
            acts=prompt,
            started=(told,),
            overhead_ns=(cost,),
        )
    )
    worker.send(
        hub_world.frame(
            catalog, (name, NUM_TOKENS, NUM_TOKENS), acts=answer, edited=edited, overhead_ns=(cost,)
        )
    )
    ended = hub_world.frame(catalog, overhead_ns=(cost // 2,))
    worker.send(msgspec.structs.replace(ended, finished=(RequestEnd(name, 2 * NUM_TOKENS),)))


def _activations(chance: random.Random, count: int) -> list[list[float]]:
    return [[chance.gauss(1.2, 1.0), chance.gauss(1.0, 1.2), chance.random()] for _ in range(count)]


def _cached(catalog: Catalog) -> CachedActivations:
    kept = hub_world.frame(catalog, ("kept", 0, 1), acts=[[0.5, 2.0, 0.1]])
    return CachedActivations(bytes([1]), kept.sites)
