"""From answers to whoever is told, and told again once it is over.

vLLM with Steerscope and its canary, Prometheus with generated rules, Alertmanager routed as
shipped, a webhook. Only settings differ from what is shipped: seconds for minutes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

import alert_world
import pytest
from alert_world import DASHBOARDS, SHIPPED, Chain, Told, eventually
from steerscope.client import Client
from steerscope.demo import world
from steerscope.demo.live import server
from steerscope.demo.live.asking import Asker
from steerscope.demo.live.server import BASE_URL, MODEL_NAME, DemoServer
from steerscope.demo.world.entities import Split
from steerscope.steering.rules import Override, OverrideMode

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]

RISK, CANARY, HEARTBEAT = (
    f"Steerscope{name}" for name in ("HallucinationRiskHigh", "CanaryFailing", "Heartbeat")
)
RULE_SETTINGS: dict[str, Any] = {
    "high_window": "15s",
    "high_hold": "5s",
    # A third of the answers about made-up names under force-known score 0.66 or more, but hardly
    # any comes into the worst band; of answers about known names, next to none does either.
    "high_label": "elevated",
    "expected_policies": ["force-known", "force-unknown"],
    "canary_seconds": 6,
    "canary_hold": "5s",
}
SERVER_SETTINGS = {
    "canary": {
        "base_url": BASE_URL,
        "interval_seconds": 1,
        "checks": {
            "known": {
                "prompts": [q.question for q in world.questions("known", "en", 3, 0)],
                "expect": {"answered_vs_declined": "high"},
            }
        },
    }
}
FLOOR, SHARE = SHIPPED["floors"]["sequences"], SHIPPED["high_share"]
SCORED = 'signal="hallucination_risk", label=~"low|elevated|high"'
COUNTS = f"sum by (label) (increase(steerscope_signal_requests_total{{{SCORED}}}[15s]))"
BATCH = 16
PAUSE_SECONDS = 0.5
PATIENCE_SECONDS = 90.0


class Traffic(NamedTuple):
    """What is asked about, and how it is steered."""

    split: Split
    policy: str | None


ORDINARY = Traffic("known", None)
RISKY = Traffic("unknown", "force-known")


class Risk(NamedTuple):
    """What was heard of risk, and how many answers had which label, traffic by traffic."""

    paths_before: set[str]
    """Where anything at all was heard of ordinary traffic."""
    counts_before: dict[str, float]
    fired: list[tuple[str, Told]]
    resolved: list[tuple[str, Told]]
    counts_after: dict[str, float]


class Outage(NamedTuple):
    """What was heard while the canary's answers were not what they should be."""

    heartbeats: list[tuple[str, Told]]
    """Before it."""
    fired: list[tuple[str, Told]]
    heart: dict[str, float]
    """Whether it was beating then, by Prometheus."""
    resolved: list[tuple[str, Told]]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := alert_world.missing_tools():
        pytest.skip(f"Prometheus cannot be installed: {reason}")
    folder = tmp_path_factory.mktemp("alerts") / "chain"
    if reason := alert_world.write_rules(folder, RULE_SETTINGS):
        assert "No matching distribution" in reason, reason
        pytest.skip("Grafana's Foundation SDK cannot be installed")
    return folder


@pytest.fixture(scope="module")
def serving(rules: Path) -> Iterator[DemoServer]:
    """A server of its own: what a canary asks would be in other tests' way."""
    with server.running(rules / "server", settings=SERVER_SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def chain(rules: Path, serving: DemoServer) -> Iterator[Chain]:
    with alert_world.running(rules, serving.metrics_port) as running:
        yield running


@pytest.fixture(scope="module")
def risk(serving: DemoServer, chain: Chain) -> Risk:
    async def drive() -> Risk:
        # So many answers that the rule has judged them several times.
        await _ask(serving, ORDINARY, lambda: sum(_counts(chain).values()) > 5 * FLOOR)
        paths, before = {path for path, _ in chain.taken}, _counts(chain)
        await _ask(serving, RISKY, lambda: chain.heard(RISK, "firing"))
        await _ask(serving, ORDINARY, lambda: chain.heard(RISK, "resolved"))
        fired, resolved = (chain.heard(RISK, status) for status in ("firing", "resolved"))
        return Risk(paths, before, fired, resolved, _counts(chain))

    return asyncio.run(drive())


@pytest.fixture(scope="module")
def outage(serving: DemoServer, chain: Chain) -> Outage:
    """Everybody is made to hear that a name is unknown; the canary, too."""
    forced = Override(mode=OverrideMode.FORCE, policy="force-unknown", reason="a drill")
    with Client(serving.grpc_address) as client:
        heartbeats = eventually(lambda: chain.heard(HEARTBEAT, "firing"), PATIENCE_SECONDS)
        client.update_rules(override=forced)
        fired = eventually(lambda: chain.heard(CANARY, "firing"), PATIENCE_SECONDS)
        heart = chain.now(f'ALERTS{{alertname="{HEARTBEAT}"}}', "alertstate")
        client.update_rules(override=None)
        resolved = eventually(lambda: chain.heard(CANARY, "resolved"), PATIENCE_SECONDS)
    return Outage(heartbeats, fired, heart, resolved)


async def _ask(serving: DemoServer, traffic: Traffic, is_enough: Callable[[], object]) -> None:
    began = time.monotonic()
    async with Asker(serving) as asker:
        for number in itertools.count():
            if is_enough():
                return
            assert time.monotonic() - began < PATIENCE_SECONDS, f"nothing came of {traffic}"
            questions = world.questions(traffic.split, "en", BATCH, number)
            await asker.ask_all([q.question for q in questions], traffic.policy)
            await asyncio.sleep(PAUSE_SECONDS)


def _counts(chain: Chain) -> dict[str, float]:
    return chain.now(COUNTS, "label")


def _share(counts: dict[str, float]) -> float:
    return counts["elevated"] / sum(counts.values())


def _links_lead_somewhere(told: Told, alert: str, board: str) -> None:
    assert told.annotations["runbook_url"] == f"{SHIPPED['runbooks']}/{alert}.md"
    assert (DASHBOARDS / "runbooks" / f"{alert}.md").exists()
    dashboard = told.annotations["dashboard_url"]
    assert dashboard.startswith(f"{SHIPPED['grafana']}/d/")
    uid = PurePosixPath(urlsplit(dashboard).path).name
    assert uid == board
    tree = json.loads((DASHBOARDS / "generated" / f"{uid}.json").read_text())
    assert tree["uid"] == uid
    variables = {f"var-{variable['name']}" for variable in tree["templating"]["list"]}
    assert parse_qs(urlsplit(dashboard).query).keys() <= variables


def test_of_ordinary_traffic_nobody_is_told(risk):
    assert risk.paths_before <= {"/heartbeat"}
    assert _share(risk.counts_before) < SHARE


def test_risky_answers_are_told_where_warnings_go_with_links_to_what_helps(risk):
    ((path, told),) = risk.fired
    assert path == "/ticket"
    assert told.labels == {"alertname": RISK, "model_name": MODEL_NAME, "severity": "warning"}
    assert told.annotations["summary"] == f"{MODEL_NAME}: many answers look made up."
    words = "of the sequences scored in the last 15s have hallucination_risk 'elevated'"
    share = re.match(rf"([\d.]+)% {words}", told.annotations["description"])
    assert share is not None
    assert float(share[1]) / 100 > SHARE
    assert told.annotations["dashboard_url"].endswith(f"?var-model={MODEL_NAME}")
    _links_lead_somewhere(told, RISK, "steerscope-overview")


def test_ordinary_traffic_resolves_it_and_the_same_people_hear_of_that(risk):
    ((_, fired),) = risk.fired
    ((path, told),) = risk.resolved
    assert path == "/ticket"
    assert told.fingerprint == fired.fingerprint
    assert told.starts_at == fired.starts_at < told.ends_at
    # It is risk that went, not traffic.
    assert _share(risk.counts_after) <= SHARE
    assert sum(risk.counts_after.values()) >= FLOOR


def test_a_canary_that_fails_is_told_with_its_check_and_links(outage, serving):
    ((path, told),) = outage.fired
    assert path == "/ticket"
    assert told.labels == {
        "alertname": CANARY,
        "canary": "known",
        "instance": f"127.0.0.1:{serving.metrics_port}",
        "job": "steerscope",
        "severity": "warning",
    }
    assert told.annotations["summary"].endswith("the canary's check known does not pass.")
    ago = re.search(r"([\d.]+)s ago", told.annotations["description"])
    assert ago is not None
    assert float(ago[1]) > RULE_SETTINGS["canary_seconds"]
    _links_lead_somewhere(told, CANARY, "steerscope-pipeline")


def test_the_heart_beats_elsewhere_while_it_passes_and_stops_while_it_does_not(outage):
    assert {path for path, _ in outage.heartbeats} == {"/heartbeat"}
    assert outage.heart == {}


def test_a_canary_that_passes_again_resolves_it(outage):
    ((_, fired),) = outage.fired
    ((path, told),) = outage.resolved
    assert path == "/ticket"
    assert told.fingerprint == fired.fingerprint
    assert told.starts_at == fired.starts_at < told.ends_at
