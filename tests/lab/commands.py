"""The lab's commands on the embedded model, each in a process of its own, as a user runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from steerscope.demo.live.server import SETTINGS
from steerscope.demo.paths import MODEL_DIR

ENGINE = {"enforce_eager": True, "dtype": "float32", "max_model_len": 128}


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def steerscope(*arguments: object, timeout: float = 500) -> Ran:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("STEERSCOPE")}
    done = subprocess.run(
        [sys.executable, "-m", "steerscope.cli.main", *map(str, arguments)],
        env=environment | SETTINGS | {"VLLM_LOGGING_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def ran(*arguments: object) -> str:
    """What a command that must succeed prints."""
    done = steerscope(*arguments)
    assert done.code == 0, done.err[-3000:]
    return done.out


def on_engine(files: Path) -> list[object]:
    return [
        *("--model", MODEL_DIR, "--declines", files / "declines.txt", "--whole"),
        *("--max-tokens", 16, "--vllm", json.dumps(ENGINE)),
    ]
