"""One engine by itself, with the column's Steerscope in it, and a process of its own for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from columns import ENGINE_ARGS, spec
from engine_child import Engine, place
from engine_pair import ENGINE_CORE, ENVIRONMENT, HUB_CORE
from random_model import SHAPES, write_model

RESULT = "RESULT "


@contextmanager
def started(model: str, column: str, **engine_args: Any) -> Iterator[Engine]:
    """In this very process, on the engines' core; its hub on the other."""
    with tempfile.TemporaryDirectory(prefix="one-") as folder:
        path = write_model(Path(folder) / "model", model)
        made = spec(column, path, SHAPES[model], Path(folder))
        os.environ["STEERSCOPE_CONFIG"] = str(made.config)
        os.sched_setaffinity(0, {ENGINE_CORE})
        engine = Engine(str(path), {**ENGINE_ARGS, **engine_args}, made.steering)
        place(os.getpid(), ENGINE_CORE, HUB_CORE)
        yield engine


def tell(found: Any) -> None:
    """To whom ``run_apart`` started us."""
    print(RESULT + json.dumps(found), flush=True)


def run_apart(script: str, *arguments: object) -> Any:
    """What the script tells when it runs in a process of its own."""
    told = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **ENVIRONMENT},
    ).stdout
    (line,) = (row for row in told.splitlines() if row.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))
