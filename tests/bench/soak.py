"""An hour of steady traffic: what the hub's memory does, what is dropped, what drift says.

    python tests/bench/soak.py [--minutes 60] [--rate 5] [--split dev] [--out soak.json]

One real server with the embedded model, its canary on. Questions are drawn evenly from the cases
that the catalog's baseline was made of (``dev``), so that nothing drifts. One JSON object comes
out: a sample each ten seconds, and what they come to after the warm-up, by when reports expire
and the drift window is full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from steerscope.demo import world
from steerscope.demo.live import server
from steerscope.demo.paths import ARTIFACTS_DIR

SAMPLE_SECONDS = 10.0
WARM_UP_SECONDS = 1000.0
"""Reports expire after 600 s; the drift window is 900 s."""
EDGE_SECONDS = 600.0
"""Memory after the warm-up is compared over the first and the last so many seconds."""
MAX_TOKENS = 64
STEERED_SHARE = 0.05
ALARM_PSI = 0.25

CANARY = {
    "base_url": server.BASE_URL,
    "interval_seconds": 30,
    "checks": {
        name: {
            "prompts": [q.question for q in world.questions(split, "en", 6, 11)],
            "expect": {"known_entity_confidence": label},
        }
        for name, split, label in (("known", "known", "high"), ("made_up", "unknown", "low"))
    },
}


async def ask_steadily(base_url: str, rate: float, questions: Sequence[str]) -> None:
    """Ask at exponential intervals, whatever the answers take, until cancelled."""
    rng = random.Random(1)
    async with (
        httpx.AsyncClient(base_url=base_url, timeout=120) as client,
        asyncio.TaskGroup() as g,
    ):

        async def ask(question: str, steering: dict[str, str]) -> None:
            reply = await client.post(
                "/v1/chat/completions",
                json={
                    "model": server.MODEL_NAME,
                    "messages": [{"role": "user", "content": question}],
                    "temperature": 0,
                    "max_tokens": MAX_TOKENS,
                    "vllm_xargs": steering,
                },
            )
            reply.raise_for_status()

        while True:
            is_steered = rng.random() < STEERED_SHARE
            steering = {"steering": "force-known"} if is_steered else {}
            g.create_task(ask(rng.choice(questions), steering))
            await asyncio.sleep(rng.expovariate(rate))


def processes(root: int) -> dict[str, int]:
    """Proportional memory of the server's processes in bytes: the hub's, and all others'."""
    found = {"hub": 0, "vllm": 0}
    for process in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
        is_hub = "steerscope.hub" in process.cmdline()
        found["hub" if is_hub else "vllm"] += process.memory_full_info().pss
    return found


def sample(running: server.DemoServer, began: float) -> dict[str, Any]:
    """What there is to see now."""
    scraped_at = time.perf_counter()
    text = running.metrics()
    scrape_seconds = time.perf_counter() - scraped_at
    sums: dict[str, float] = {}
    psi: dict[str, float] = {}
    outcomes: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for each in family.samples:
            sums[each.name] = sums.get(each.name, 0.0) + each.value
            if each.name == "steerscope_feature_drift_psi":
                psi[f"{each.labels['feature']}/{each.labels['phase']}"] = each.value
            if each.name == "steerscope_canary_runs_total":
                outcome = each.labels["outcome"]
                outcomes[outcome] = outcomes.get(outcome, 0.0) + each.value
    return {
        "seconds": round(time.monotonic() - began, 1),
        "pss_bytes": processes(running.process.pid),
        "frames": sums["steerscope_frames_total"],
        "frames_dropped": sums["steerscope_frames_dropped_total"],
        "unobserved_tokens": sums["steerscope_unobserved_tokens_total"],
        "observed_tokens": sums["steerscope_observed_tokens_total"],
        "hub_cpu_seconds": sums["steerscope_hub_cpu_seconds_total"],
        "hub_restarts": sums["steerscope_hub_restarts_total"],
        "canary": outcomes,
        "psi_known": len(psi),
        "psi_max": max(psi.values(), default=None),
        "psi_alarms": sorted(name for name, value in psi.items() if value > ALARM_PSI),
        "scrape_seconds": round(scrape_seconds, 4),
        "scrape_bytes": len(text),
    }


def summary(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Growth after the warm-up, and everything that must be nought."""
    settled = [each for each in samples if each["seconds"] >= WARM_UP_SECONDS] or samples
    end = settled[-1]["seconds"]
    first = [s for s in settled if s["seconds"] < settled[0]["seconds"] + EDGE_SECONDS]
    last = [s for s in settled if s["seconds"] > end - EDGE_SECONDS]

    def growth(which: str) -> float:
        before, after = (
            statistics.mean(s["pss_bytes"][which] for s in part) for part in (first, last)
        )
        return after / before - 1

    newest = samples[-1]
    psis = [s["psi_max"] for s in settled if s["psi_max"] is not None]
    return {
        "minutes": round(newest["seconds"] / 60, 1),
        "frames": newest["frames"],
        "frames_dropped": newest["frames_dropped"],
        "unobserved_tokens": newest["unobserved_tokens"],
        "observed_tokens": newest["observed_tokens"],
        "canary": newest["canary"],
        "hub_growth_after_warm_up": round(growth("hub"), 4),
        "vllm_growth_after_warm_up": round(growth("vllm"), 4),
        "hub_mib": [
            round(s["pss_bytes"]["hub"] / 2**20, 1) for s in samples[:: max(1, len(samples) // 24)]
        ],
        "psi_max_after_warm_up": max(psis, default=None),
        "drift_alarms_after_warm_up": sorted({name for s in settled for name in s["psi_alarms"]}),
        "hub_cpu_share": round(newest["hub_cpu_seconds"] / newest["seconds"], 4),
    }


async def soak(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Ask and sample for as long as was asked for."""
    cases = [json.loads(line) for line in (ARTIFACTS_DIR / "cases" / "evaluation.jsonl").open()]
    questions = [case["question"] for case in cases if case["split"] == arguments.split]
    samples = []
    with server.running(folder, settings={"canary": CANARY}) as running:
        began = time.monotonic()
        asking = asyncio.create_task(ask_steadily(running.base_url, arguments.rate, questions))
        while time.monotonic() < began + 60 * arguments.minutes and not asking.done():
            await asyncio.sleep(SAMPLE_SECONDS)
            samples.append(await asyncio.to_thread(sample, running, began))
            arguments.out.write_text(json.dumps({"samples": samples}))
        if asking.done():
            await asking
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
    return samples


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument("--split", default="dev")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    arguments = parser.parse_args()
    samples = asyncio.run(soak(arguments, Path(tempfile.mkdtemp(prefix="soak-"))))
    found = summary(samples)
    arguments.out.write_text(json.dumps({"summary": found, "samples": samples}))
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
