"""The quickstart, typed into a shell as it stands, against the demo server."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from steerscope.demo.live.server import free_ports

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_MARK = "--- step ---"
_NUMBER = re.compile(r"\d+(\.\d+)?")


class Step(NamedTuple):
    """What is typed, and what the page says that it prints."""

    typed: str
    printed: str


def steps():
    blocks = _BLOCK.findall((ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8"))
    followed = [*blocks[1:], ("", "")]
    return [
        Step(typed, text if language == "text" else "")
        for (kind, typed), (language, text) in zip(blocks, followed, strict=True)
        if kind == "bash"
    ]


def pattern(printed):
    """The page's own text, where numbers may be others and … is anything."""
    without_numbers = _NUMBER.sub("0", printed)
    return re.escape(without_numbers).replace("…", ".*").replace("0", r"\d+(\.\d+)?")


@pytest.fixture
def prometheus_tools():
    """Prometheus and promtool are on the path."""
    script = ROOT / "scripts" / "install_prometheus.sh"
    done = subprocess.run([script], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        pytest.skip(f"Prometheus cannot be installed: {done.stderr.strip()}")


@pytest.fixture
def shell(prometheus_tools, demo_server, client, tmp_path):
    """A function that types a script into bash, with the demo server where the page has it."""
    places = {
        "localhost:8000": f"127.0.0.1:{demo_server.http_port}",
        "127.0.0.1:8000": f"127.0.0.1:{demo_server.http_port}",
        "127.0.0.1:9464": f"127.0.0.1:{demo_server.metrics_port}",
        ":9090": f":{free_ports(1)[0]}",
        ".venv/bin/": f"{Path(sys.executable).parent}/",
    }
    environment = {
        **os.environ,
        "STEERSCOPE_ADDRESS": demo_server.grpc_address,
        "TMPDIR": str(tmp_path),
    }

    def run(script):
        for place, ours in places.items():
            script = script.replace(place, ours)
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            client.update_rules(override=None)
        assert process.returncode == 0, out
        return out

    return run


def test_the_page_says_what_each_of_its_commands_prints():
    assert [step.typed for step in steps() if not step.printed] == [steps()[-1].typed]
    assert len(steps()) >= 8


def test_every_command_of_the_quickstart_prints_what_it_says(shell):
    out = shell("".join(f"{step.typed}\necho '{_MARK}'\n" for step in steps()))
    for step, printed in zip(steps(), out.split(f"{_MARK}\n"), strict=False):
        told = f"{step.typed}\n{printed}"
        assert re.fullmatch(pattern(step.printed.strip()), printed.strip()), told


def test_what_the_page_does_not_say_is_not_taken_for_it():
    said = pattern('{label="low"} => 1 @[1795445600.1]\n')
    assert re.fullmatch(said, '{label="low"} => 12 @[1795445605]\n')
    assert not re.fullmatch(said, '{label="high"} => 1 @[1795445600.1]\n')
