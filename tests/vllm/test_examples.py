"""The examples, run as people run them, against the demo server."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from steerscope.demo import world

pytestmark = pytest.mark.server

EXAMPLES = Path(__file__).parents[2] / "examples"


def asked(split):
    return world.questions(split, "en", 1, 91)[0].question


def command(name, *arguments):
    return [sys.executable, str(EXAMPLES / name), *arguments]


def run(name, *arguments):
    done = subprocess.run(
        command(name, *arguments), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_reflection_alone_lists_creates_uses_watches_steers_and_reports(demo_server, client):
    """With grpcio and the reflection service only; the example itself checks every step."""
    before = client.list_policies('origin = "created"')
    out = run(
        "reflection_only.py",
        *("--address", demo_server.grpc_address),
        *("--base-url", demo_server.base_url),
        *("--question", asked("known")),
    )
    assert [line[0] for line in out.splitlines() if line[0].isdigit()] == list(
        "1234456 78".replace(" ", "")
    )
    prompt, changed, last, end = map(
        int, re.search(r"prompt of (\d+), steered from (\d+) to (\d+) of (\d+),", out).groups()
    )
    assert prompt < changed <= last <= end
    assert changed < end
    assert client.list_policies('origin = "created"') == before


def test_reflection_alone_knows_none_of_our_code():
    source = (EXAMPLES / "reflection_only.py").read_text()
    assert not re.search(r"^\s*(import|from) +(steerscope|vllm|openai)", source, re.MULTILINE)


def test_the_official_client_asks_for_a_policy_and_for_edits_of_its_own(demo_server):
    out = run(
        "openai_client.py",
        *("--base-url", f"{demo_server.base_url}/v1"),
        *("--question", asked("unknown")),
    )
    plain, named, inline = out.splitlines()
    assert plain.startswith("   unsteered: ")
    assert "hallucination_risk" in plain
    assert named.partition(": ")[2] != plain.partition(": ")[2]
    assert inline.startswith("      inline: ")


def test_the_guard_steers_a_request_that_it_watches(demo_server, http, client):
    guarding = subprocess.Popen(
        command(
            "async_client.py",
            *("--address", demo_server.grpc_address),
            *("--above", "5", "--max-steers", "1", "--seconds", "60"),
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert guarding.stdout.readline().startswith("guarding: ")
        while guarding.poll() is None:
            http.chat(asked("unknown"), max_tokens=150, ignore_eos=True)
        assert guarding.returncode == 0
        assert "; force-unknown from " in guarding.stdout.read()
    finally:
        guarding.kill()
        guarding.wait()
        guarding.stdout.close()
