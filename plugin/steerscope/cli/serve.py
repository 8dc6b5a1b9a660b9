"""Start vLLM's OpenAI server as this very process.

vLLM's CPU build has another distribution name and no working ``vllm`` command, so
the server's module is run; that works with both builds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from steerscope.config import CONFIG_ENV

SERVER_MODULE = "vllm.entrypoints.openai.api_server"


def command(vllm_arguments: Sequence[str]) -> list[str]:
    """The command line of the server."""
    return [sys.executable, "-m", SERVER_MODULE, *vllm_arguments]


def replace_process(
    config: Path, vllm_arguments: Sequence[str], settings: Mapping[str, str] | None = None
) -> int:
    """Become the server; does not return. ``settings`` are defaults for the environment."""
    environment = {**(settings or {}), **os.environ, CONFIG_ENV: str(config)}
    os.execve(sys.executable, command(vllm_arguments), environment)
