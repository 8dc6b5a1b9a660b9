"""What a decoding step costs, in one engine that has Steerscope and has it not, in turn.

    python tests/bench/toggled.py [--models demo medium] [--columns observe-64 ...] [--seconds 60]
                                  [--concurrency 8 64]

Two processes that do the same differ by percents, depending on where their memory happens to lie;
one process does not differ from itself. A few steps with Steerscope, as many without (the
wrappers stay and pass on at once, the ops find a site without features), in turn; requests neither
come nor end. Turns are short, since what else the machine does goes up and down within seconds.
Ratios are without over with: throughput (without the tenth of the turns at either end), 1 is no
cost. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import bench_tables
import numpy as np
import one_engine
import ratios
from engine_child import Engine
from random_model import SHAPES

MAX_TOKENS = 600
"""After which other requests are taken: contexts stay short, where our share is largest."""
COLUMNS = ("idle", "observe-64", "observe-1024", "observe-64x4", "steer-64")
CONCURRENCY = (8, 64)
TIMES_AS_LONG = 15
"""As the same work takes in ``bench.py``."""
TURN_SECONDS = 0.05
LEAST_STEPS = 4
"""Of a turn."""
LEAD_IN_STEPS = 1
LEAST_TURNS = 8


class Switch:
    """Takes Steerscope out of an engine's steps and puts it back."""

    def __init__(self, engine: Engine) -> None:
        from steerscope.engine import native, seams

        core = engine.engine.engine_core.engine_core
        runner = core.model_executor.driver_worker.worker.model_runner
        self._attribute = seams._ATTRIBUTE
        self._places = [(each, getattr(each, self._attribute)) for each in (core.scheduler, runner)]
        self.runtime = self._places[1][1]
        self._library = native.library()
        assert self._library is not None
        sites = dict(self._library._sites)
        step = native.ctypes.pointer(native.Step())
        nothing = {n: native.Site(width=s.width, step=step) for n, s in sites.items()}
        self._sites = {True: sites, False: nothing}

    def set(self, is_on: bool) -> None:
        """For the steps from now on."""
        for place_, half in self._places:
            setattr(place_, self._attribute, half if is_on else None)
        for name, site in self._sites[is_on].items():
            self._library.register(name, site)
        self.runtime._plan.break_off()


def know_all_blocks(switch: Switch, engine: Engine) -> None:
    """So that the roster has an entry for tokens that it was not told of."""
    from steerscope.engine.roster import MoreBlocks

    blocks = list(range(MAX_TOKENS // 16 + 64))
    running = engine.engine.engine_core.engine_core.scheduler.running
    switch.runtime.roster.extend([MoreBlocks(r.request_id, blocks, True) for r in running])


def crowd(engine: Engine, concurrency: int, times: dict[bool, list[Any]]) -> None:
    """So many requests, and as many turns as they are long."""
    engine.submit(concurrency, MAX_TOKENS)
    engine.steps(10, lead_in=False)
    switch = Switch(engine)
    know_all_blocks(switch, engine)
    one = float(np.median(engine.steps(20, lead_in=False)["ns"])) / 1e9
    count = LEAD_IN_STEPS + max(LEAST_STEPS, round(TURN_SECONDS / one))
    for _ in range(max(1, (MAX_TOKENS - 50) // (2 * count))):
        for is_on in (True, False) if len(times[True]) % 2 else (False, True):
            switch.set(is_on)
            taken = engine.steps(count, lead_in=False)["ns"]
            times[is_on].append(np.array(taken[LEAD_IN_STEPS:]) / 1e3)
    switch.set(True)
    engine.drain()


def measure(engine: Engine, concurrency: int, seconds: float) -> dict[str, Any]:
    """One cell of the table."""
    times: dict[bool, list[Any]] = {True: [], False: []}
    ends_at = time.monotonic() + seconds
    while len(times[True]) < LEAST_TURNS or time.monotonic() < ends_at:
        crowd(engine, concurrency, times)
    ratio = ratios.trimmed_throughput(times[False], times[True])
    step_us = float(np.concatenate(times[False]).mean())
    return {
        "throughput": asdict(ratio),
        "itl_p99": asdict(ratios.latency(times[False], times[True], 0.99)),
        "plain_step_us": round(step_us, 1),
        "extra_us": round(step_us * (1 / ratio.value - 1), 1),
    }


def column(model: str, name: str, seconds: float, concurrency: Sequence[int]) -> None:
    """One engine; runs in a process of its own."""
    from steerscope.engine import readout

    readout.TELL_EVERY_NS *= 2  # it tells by the clock, and is there half the time
    with one_engine.started(model, name) as engine:
        one_engine.tell({c: measure(engine, c, seconds) for c in concurrency})


def run(
    model: str, name: str, seconds: float, concurrency: Sequence[int] = CONCURRENCY
) -> dict[str, Any]:
    """One column, by number of requests."""
    cells: dict[str, Any] = one_engine.run_apart(
        *(__file__, "--one", model, name),
        *("--seconds", seconds, "--concurrency", *concurrency),
    )
    print(f"{model}: {name}, by turns, done", file=sys.stderr, flush=True)
    return cells


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument("--columns", nargs="*", default=COLUMNS)
    parser.add_argument("--seconds", type=float, default=60.0, help="for each cell")
    parser.add_argument("--concurrency", nargs="*", type=int, default=CONCURRENCY)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        column(*arguments.one, arguments.seconds, arguments.concurrency)
        return 0
    for model in arguments.models:
        found = {
            name: run(model, name, arguments.seconds, arguments.concurrency)
            for name in arguments.columns
        }
        print("\n".join(bench_tables.toggled(found)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
