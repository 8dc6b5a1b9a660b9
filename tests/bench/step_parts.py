"""Where a step's time goes inside a working engine: a clock around each part of ours.

    python tests/bench/step_parts.py [--model demo] [--column observe-64] [--requests 64] [--steady]

The work is the decoding of ``bench.py``, or with ``--steady`` of requests that stay; the op is part
of the graph and has no clock. Parts nest (``plan`` holds ``rows``); what a clock costs, some 1 µs a
call, is in them. Means of all steps, so that what happens now and then is in them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import one_engine
from engine_pair import enter_environment
from random_model import SHAPES

WARM_UP_STEPS = 50


class Clock:
    """Time spent in one function, and how often it was called."""

    def __init__(self, owner: Any, name: str) -> None:
        self.spent_ns = self.calls = 0
        setattr(owner, name, self._timed(getattr(owner, name)))

    def reset(self) -> None:
        """Begin anew."""
        self.spent_ns = self.calls = 0

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent_ns += time.perf_counter_ns() - began
                self.calls += 1

        return timed


def clocks() -> dict[str, Clock]:
    """Around what a step does and what a request's coming costs, in that order."""
    from steerscope.engine import plan, readout, roster, seams, slots, tape
    from steerscope.engine.runtime import EngineRuntime
    from steerscope.engine.scheduling import SchedulerSide
    from steerscope.steering.frontend import FrontEnd

    parts = {
        "note": (SchedulerSide, "before_step"),
        "news": (seams, "_news"),
        "begin": (EngineRuntime, "begin"),
        "begin: follow": (EngineRuntime, "_follow"),
        "plan": (EngineRuntime, "plan"),
        "plan: goes on": (plan.BatchPlan, "goes_on"),
        "plan: rows": (plan.BatchPlan, "rows"),
        "finish": (EngineRuntime, "finish"),
        "count one more": (readout.Readout, "extend"),
        "settle": (readout.Readout, "settle"),
        "settle: requests": (tape.Tape, "requests"),
        "settle: slots": (roster.Roster, "slots"),
        "settle: keep": (slots.SlotCache, "write"),
        "tell": (readout.Readout, "tell"),
        "tell: merge": (tape.Tape, "readings"),
        "tell: frame": (readout.Readout, "_frame"),
        "tell: encode": (readout, "encode"),
        "tell: send": (readout.FrameSender, "send"),
        "admission": (FrontEnd, "resolve"),
        "admission: stamp": (FrontEnd, "stamp"),
    }
    return {title: Clock(*where) for title, where in parts.items()}


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--column", default="observe-64")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--steady", action="store_true", help="none comes or ends")
    arguments = parser.parse_args()
    enter_environment()
    max_num_seqs = max(64, arguments.requests)
    with one_engine.started(arguments.model, arguments.column, max_num_seqs=max_num_seqs) as engine:
        timed = clocks()
        if arguments.steady:
            engine.submit(arguments.requests, WARM_UP_STEPS + arguments.steps + 10)
        else:
            engine.fill(arguments.requests)
        engine.steps(WARM_UP_STEPS, lead_in=False)
        for clock in timed.values():
            clock.reset()
        steps = engine.steps(arguments.steps, lead_in=False)["ns"]
    print(f"a step: {statistics.fmean(steps) / 1e3:.0f} µs")
    for title, clock in timed.items():
        each = clock.spent_ns / 1e3 / max(clock.calls, 1)
        calls = clock.calls / len(steps)
        print(f"{title:18} {each * calls:7.1f} µs a step  {calls:5.2f} calls of {each:7.1f} µs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
