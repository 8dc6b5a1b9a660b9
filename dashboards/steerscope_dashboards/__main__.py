"""``python -m steerscope_dashboards [--check]``: write the files, or say how they differ."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steerscope.errors import ConfigError

from steerscope_dashboards import settings, writing
from steerscope_dashboards.promql import ExpressionError

HOME = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 for a difference and 2 for bad settings."""
    parser = argparse.ArgumentParser(prog="steerscope_dashboards", description=__doc__)
    parser.add_argument("--settings", type=Path, default=HOME / "settings.yaml")
    parser.add_argument("--out", type=Path, default=HOME / "generated")
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    asked = parser.parse_args(arguments)
    try:
        wanted = writing.files(settings.load(asked.settings))
    except (ConfigError, ExpressionError) as error:
        print(f"dashboards: {error}", file=sys.stderr)
        return 2
    if not asked.check:
        writing.write(wanted, asked.out)
        return 0
    differences = list(writing.differences(wanted, asked.out))
    if differences:
        print("\n".join(differences[:60]), file=sys.stderr)
        print("dashboards/generated is out of date: run `make dashboards`", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
