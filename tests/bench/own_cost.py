"""What Steerscope itself spends on the host, a step, inside a working engine: µs by batch size.

    python tests/bench/own_cost.py [--model demo] [--columns observe-64 steer-64] [--steps 1000]

What workers report as ``steerscope_step_overhead_seconds``, of each step: mean and median, where
requests come and go (128 tokens each, so that at 64 every other step sees one end and another
come), and where the same ones go on. The op is part of the graph and not in it. Prints Markdown.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import one_engine
import ratios
from engine_child import Engine
from random_model import SHAPES

SIZES = (1, 8, 64, 128, 256)
COLUMNS = ("observe-64", "steer-64")
WARM_UP_STEPS = 50


def collect() -> list[int]:
    """Nanoseconds of each step from now on, as they are found."""
    from steerscope.engine.readout import Readout

    found: list[int] = []
    account = Readout._account

    def accounted(self: Any) -> None:
        found.append(self._overhead_ns)
        account(self)

    Readout._account = accounted  # type: ignore[method-assign]
    return found


def measure(engine: Engine, found: list[int], size: int, steps: int) -> dict[str, list[float]]:
    """Mean and median where requests come and go, and where they stay."""
    engine.fill(size)
    told = {"coming and going": _own(engine, found, steps)}
    engine.drain()
    engine.submit(size, WARM_UP_STEPS + steps + 10)
    told["steady"] = _own(engine, found, steps)
    engine.drain()
    return told


def _own(engine: Engine, found: list[int], steps: int) -> list[float]:
    engine.steps(WARM_UP_STEPS, lead_in=False)
    found.clear()
    engine.steps(steps, lead_in=False)
    return [float(np.mean(found)) / 1e3, float(np.median(found)) / 1e3]


def column(model: str, name: str, steps: int) -> None:
    """One engine; runs in a process of its own."""
    with one_engine.started(model, name, max_num_seqs=max(SIZES)) as engine:
        found = collect()
        one_engine.tell([measure(engine, found, size, steps) for size in SIZES])


def rows(name: str, told: list[dict[str, list[float]]]) -> list[str]:
    """Of the table; the last cell is what a request more costs in the mean."""
    lines = []
    for kind in told[0]:
        means, medians = zip(*(cell[kind] for cell in told), strict=True)
        cells = [f"{mean:.0f}, {median:.0f}" for mean, median in zip(means, medians, strict=True)]
        slope = ratios.slope(SIZES, means)
        lines.append("| " + " | ".join([f"{name}, {kind}", *cells, f"{slope:.2f}"]) + " |")
    return lines


def main() -> int:
    """Run it; see above."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(SHAPES), default="demo")
    parser.add_argument("--columns", nargs="*", default=COLUMNS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        column(arguments.model, arguments.one, arguments.steps)
        return 0
    print("| | " + " | ".join([*map(str, SIZES), "a request more"]) + " |")
    print("| --- " * (len(SIZES) + 2) + "|")
    for name in arguments.columns:
        told = one_engine.run_apart(
            *(__file__, "--one", name),
            *("--model", arguments.model, "--steps", arguments.steps),
        )
        print("\n".join(rows(name, told)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
