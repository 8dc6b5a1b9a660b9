"""Start ``vllm serve`` as this very process.

vLLM's CPU build has another distribution name, under which that command does not work; and the
module ``vllm.entrypoints.openai.api_server`` runs one API server, whatever
``--api-server-count`` says.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from steerscope.config import CONFIG_ENV

VLLM_SERVE: Final = """
import sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
if __name__ == "__main__":
    parser, serve = FlexibleArgumentParser(prog="vllm"), ServeSubcommand()
    serve.subparser_init(parser.add_subparsers())
    arguments = parser.parse_args(["serve", *sys.argv[1:]])
    serve.validate(arguments)
    serve.cmd(arguments)
"""


def command(vllm_arguments: Sequence[str]) -> list[str]:
    """The command line of the server."""
    return [sys.executable, "-c", VLLM_SERVE, *vllm_arguments]


def replace_process(
    config: Path, vllm_arguments: Sequence[str], settings: Mapping[str, str] | None = None
) -> int:
    """Become the server; does not return. ``settings`` are defaults for the environment."""
    environment = {**(settings or {}), **os.environ, CONFIG_ENV: str(config)}
    os.execve(sys.executable, command(vllm_arguments), environment)
