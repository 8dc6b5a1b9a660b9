"""``python -m steerscope.hub --endpoint DIR --parent-pid N``: the hub as a process.

Settings come as one JSON tree on stdin, or from the file named by ``--config-json``. One
JSON line goes to stdout when the hub serves, or when it cannot; logs go to stderr. It ends
on SIGTERM, or when its parent is gone. What the next hub of the launch needs to know stays in
the folder, which the parent removes; a hub whose parent is gone is the last, and removes it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path

import zmq

from steerscope import config
from steerscope.errors import SteerscopeError
from steerscope.hub.orders import engines_address
from steerscope.hub.protocol import control_address, frames_address
from steerscope.hub.server import MARKS_FILE, Hub, run_until_orphaned
from steerscope.hub.storage import STATE_FILE


def main() -> int:
    """Serve until told to stop; 1 when the hub could not start."""
    parser = argparse.ArgumentParser(prog="steerscope.hub", description=__doc__)
    parser.add_argument("--config-json", default="-", help="settings; - is stdin")
    parser.add_argument("--endpoint", required=True, help="folder for the sockets")
    parser.add_argument("--parent-pid", type=int, required=True, help="end when it is gone")
    parser.add_argument("--restarts", type=int, default=0, help="hubs of this launch before it")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s steerscope.hub: %(message)s")
    try:
        asyncio.run(_serve(_settings(arguments.config_json), arguments))
    except (SteerscopeError, zmq.ZMQError, OSError, ValueError) as error:
        _tell({"ready": False, "error": str(error)})
        status = 1
    else:
        status = 0
    if os.getppid() != arguments.parent_pid:
        _tidy(Path(arguments.endpoint))
    return status


async def _serve(settings: config.Settings, arguments: argparse.Namespace) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with Hub(settings, arguments.endpoint, arguments.restarts).serving() as ports:
        _tell({"ready": True, "grpc_port": ports.grpc, "http_port": ports.http})
        await run_until_orphaned(arguments.parent_pid, stopping)


def _tidy(endpoint: Path) -> None:
    """No hub follows: remove all that is ours, and the folder if that was all."""
    addresses = (control_address, frames_address, engines_address)
    sockets = [Path(address(str(endpoint)).removeprefix("ipc://")) for address in addresses]
    with contextlib.suppress(OSError):
        for path in (*sockets, *endpoint.glob(f"{STATE_FILE}*"), endpoint / MARKS_FILE):
            path.unlink(missing_ok=True)
        endpoint.rmdir()


def _settings(source: str) -> config.Settings:
    text = sys.stdin.read() if source == "-" else Path(source).read_text()
    return config.from_tree(json.loads(text), base=Path.cwd(), where="hub settings")


def _tell(line: dict[str, object]) -> None:
    with contextlib.suppress(BrokenPipeError):  # nobody reads it: then we end soon
        os.write(sys.stdout.fileno(), json.dumps(line).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
