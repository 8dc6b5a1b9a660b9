"""The embedded model behind a real vLLM, asked questions; a real Prometheus scrapes both ports."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import observed_world
import openai
from steerscope.demo import world
from steerscope.demo.live.asking import Asker
from steerscope.demo.live.server import BASE_URL, DemoServer

ROUND = (
    ("known", None),
    ("unknown", None),
    ("known", "force-unknown"),
    ("unknown", "force-known"),
)
"""Which names are asked about in turn, and under which policy."""
MISTAKE = "no-such-policy"
BATCH = 8
"""Questions at a time: drift is known from 1000 generated tokens of unsteered answers on."""
PAUSE_SECONDS = 0.5
CANARY_SECONDS = 2.0
DRIFT_SECONDS = 120.0


def settings() -> dict[str, Any]:
    """Of a server that asks itself about a known and a made-up name, and tells drift soon."""
    checks = {
        split: {
            "prompts": [q.question for q in world.questions(split, "en", 3, 0)],
            "expect": {"known_entity_confidence": label},
        }
        for split, label in (("known", "high"), ("unknown", "low"))
    }
    return {
        "telemetry": {"drift_window_seconds": DRIFT_SECONDS},
        "canary": {"base_url": BASE_URL, "checks": checks, "interval_seconds": CANARY_SECONDS},
    }


@contextlib.contextmanager
def running(server: DemoServer, folder: Path, generated: Path) -> Iterator[str]:
    """A Prometheus that sees questions, for as long as the block lasts."""
    ports = (server.metrics_port, server.http_port)
    with (
        observed_world.prometheus(folder / "prometheus", generated, *ports) as url,
        questions(server),
    ):
        yield url


@contextlib.contextmanager
def questions(server: DemoServer) -> Iterator[None]:
    """Ask until the block ends, and now and then under a policy that does not exist."""
    stopping = threading.Event()
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            asyncio.run(_ask(server, stopping))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=drive)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(60)
    assert not failures, failures


async def _ask(server: DemoServer, stopping: threading.Event) -> None:
    async with Asker(server) as asker:
        for number in itertools.count():
            if stopping.is_set():
                return
            for split, policy in ROUND:
                asked = [q.question for q in world.questions(split, "en", BATCH, number)]
                await asker.ask_all(asked, policy)
            if number % 10 == 0:
                with contextlib.suppress(openai.BadRequestError):
                    await asker.ask(asked[0], MISTAKE)
            await asyncio.sleep(PAUSE_SECONDS)
