"""How much later a server answers for having Steerscope: seconds, by turns with and without.

    python tests/bench/startup.py [--pairs 10]

The demo's server, eager: vLLM compiles nothing, so that what is left is the start itself. One
line of JSON; an interval by bootstrap over the pairs.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import ratios
from steerscope.demo.live import server


def main() -> None:
    """Start them and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    _seconds(with_steerscope=True)  # what is built and cached once
    _seconds(with_steerscope=False)
    pairs = [_pair(first=i % 2 == 0) for i in range(arguments.pairs)]
    plain, ours = np.transpose(pairs)
    later = ratios.difference(plain, ours)
    told = {
        "pairs": len(pairs),
        "plain_seconds": round(float(plain.mean()), 2),
        "with_steerscope_seconds": round(float(ours.mean()), 2),
        "later_by": round(later.value, 2),
        "later_by_95": [round(later.low, 2), round(later.high, 2)],
    }
    print(json.dumps(told))


def _pair(*, first: bool) -> tuple[float, float]:
    """Without and with, in either order."""
    taken = {ours: _seconds(with_steerscope=ours) for ours in (first, not first)}
    return taken[False], taken[True]


def _seconds(*, with_steerscope: bool) -> float:
    """From the start of the process to the first answer."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        with server.running(
            Path(folder), with_steerscope=with_steerscope, extra_arguments=("--enforce-eager",)
        ):
            return time.monotonic() - began


if __name__ == "__main__":
    main()
