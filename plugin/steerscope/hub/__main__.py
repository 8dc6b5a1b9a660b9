"""``python -m steerscope.hub --endpoint DIR --parent-pid N``: the hub as a process.

Settings come as one JSON tree on stdin, or from the file named by ``--config-json``. One
JSON line goes to stdout when the hub serves, or when it cannot; logs go to stderr. It ends
on SIGTERM, or when its parent is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import signal
import sys
from pathlib import Path

import zmq

from steerscope import config
from steerscope.errors import SteerscopeError
from steerscope.hub.orders import engines_address
from steerscope.hub.protocol import control_address, frames_address
from steerscope.hub.server import Hub, run_until_orphaned


def main() -> int:
    """Serve until told to stop; 1 when the hub could not start."""
    parser = argparse.ArgumentParser(prog="steerscope.hub", description=__doc__)
    parser.add_argument("--config-json", default="-", help="settings; - is stdin")
    parser.add_argument("--endpoint", required=True, help="folder for the sockets")
    parser.add_argument("--parent-pid", type=int, required=True, help="end when it is gone")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s steerscope.hub: %(message)s")
    try:
        asyncio.run(_serve(_settings(arguments.config_json), arguments))
    except (SteerscopeError, zmq.ZMQError, OSError, ValueError) as error:
        _tell({"ready": False, "error": str(error)})
        return 1
    return 0


async def _serve(settings: config.Settings, arguments: argparse.Namespace) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with Hub(settings, arguments.endpoint).serving() as ports:
        _tell({"ready": True, "grpc_port": ports.grpc, "http_port": ports.http})
        await run_until_orphaned(arguments.parent_pid, stopping)
    _tidy(Path(arguments.endpoint))


def _tidy(endpoint: Path) -> None:
    """Remove our sockets, and the folder if it is then empty: its maker may be gone by now."""
    with contextlib.suppress(OSError):
        for address_of in (control_address, frames_address, engines_address):
            address = address_of(str(endpoint))
            Path(address.removeprefix("ipc://")).unlink(missing_ok=True)
        endpoint.rmdir()


def _settings(source: str) -> config.Settings:
    text = sys.stdin.read() if source == "-" else Path(source).read_text()
    return config.from_tree(json.loads(text), base=Path.cwd(), where="hub settings")


def _tell(line: dict[str, object]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main())
