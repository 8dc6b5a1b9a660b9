"""Two engines and two API servers: one hub, one set of policies, nothing counted twice."""

from __future__ import annotations

import asyncio
import re
from collections import Counter

import httpx
import pytest
from steerscope.client import Client
from steerscope.demo import world
from steerscope.demo.live import server
from steerscope.demo.live.asking import Asker

pytestmark = pytest.mark.server


def test_answers_policies_and_counts_are_those_of_one_server(demo_server, tmp_path):
    asked = [q.question for q in world.questions("known", "en", 24, 71)]
    edits = [
        {
            "feature": "unknown_entity",
            "clamp": 70.0,
            "phase": "prompt",
            "when": {"feature": "known_entity", "above": 0.0},
        }
    ]

    async def ask(running, steering):
        async with Asker(running) as asker:
            return await asker.ask_all(asked, steering)

    expected = [a.text for a in asyncio.run(ask(demo_server, edits))]
    with server.running(
        tmp_path,
        extra_arguments=("--data-parallel-size", "2", "--api-server-count", "2"),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as running:
        client = Client(running.grpc_address)
        client.create_policy("everywhere", edits)
        answers = asyncio.run(ask(running, "everywhere"))
        assert [a.text for a in answers] == expected
        reports = [client.get_request_report(a.request_id, wait=10.0) for a in answers]
        page = running.metrics()
        api_servers = set(re.findall(r"\(ApiServer_\d pid=(\d+)\)", running.log.read_text()))
        # Each is a new connection, which the system gives to either of them.
        from_vllm = [httpx.get(f"{running.base_url}/metrics").text for _ in range(8)]
    assert len(api_servers) == 2
    completions = [c for report in reports for c in report.completions]
    assert len(completions) == len(asked)
    seen = Counter({"0": 0, "1": 0})
    for completion, answer in zip(completions, answers, strict=True):
        fed = completion.num_prompt_tokens + len(answer.token_ids) - 1
        assert (completion.complete, completion.num_observed_tokens) == (True, fed)
        seen[completion.engine] += fed
    assert all(seen.values()), "one engine got nothing to do"
    assert observed(page) == seen
    assert all(observed(each) == seen for each in from_vllm), "one API server tells otherwise"


def observed(page: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line in page.splitlines():
        if found := re.match(r'steerscope_observed_tokens_total\{engine="(\d+)".*\} (\S+)', line):
            counts[found[1]] += int(float(found[2]))
    return counts
