"""Draw dashboards/previews, and say which expressions had no data.

Without an argument from the embedded model's server, asked questions for a while; with the
address of a Prometheus from whatever it scrapes: ``make_previews.py http://127.0.0.1:9090``.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "dashboards"), str(ROOT / "tests" / "hub")]

SECONDS = 180.0
FEATURES = "unknown_entity|known_entity_readout|answer_doubt"
"""Of the embedded model's many, those that the pictures show."""


def main(arguments: list[str]) -> int:
    """Draw, and return how many expressions had no data."""
    from steerscope_dashboards import previews
    from steerscope_dashboards.answers import Prometheus, unanswered

    home = ROOT / "dashboards"
    with contextlib.ExitStack() as stack:
        url = arguments[0] if arguments else stack.enter_context(_serving_run(home / "generated"))
        prometheus = Prometheus(url)
        choice = previews.Choice({} if arguments else {"feature": FEATURES}, SECONDS)
        for path in previews.draw(prometheus, home / "generated", home / "previews", choice):
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size // 1024} KB")
        missing = unanswered(url)
    for one in missing:
        print(f"no data: {one.role} of {one.where}: {one.text}")
    return len(missing)


@contextlib.contextmanager
def _serving_run(generated: Path):
    import served_world
    from steerscope.demo.live import server

    with (
        tempfile.TemporaryDirectory() as name,
        server.running(Path(name), settings=served_world.settings()) as serving,
        served_world.running(serving, Path(name), generated) as url,
    ):
        time.sleep(SECONDS)
        yield url


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
