"""``python -m steerscope_dashboards.reference [--check]``: write docs/metrics.md, or compare."""

from __future__ import annotations

import argparse
import difflib
import sys
from pathlib import Path

from steerscope_dashboards.reference.page import page

ROOT = Path(__file__).resolve().parents[3]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status is 1 for a difference."""
    parser = argparse.ArgumentParser(prog="steerscope_dashboards.reference", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "metrics.md")
    parser.add_argument("--check", action="store_true", help="write nothing, only compare")
    asked = parser.parse_args(arguments)
    made = page(ROOT / "dashboards" / "generated")
    if not asked.check:
        asked.out.write_text(made, encoding="utf-8")
        return 0
    have = asked.out.read_text(encoding="utf-8") if asked.out.exists() else ""
    differences = list(
        difflib.unified_diff(
            have.splitlines(), made.splitlines(), str(asked.out), "as it would be made", lineterm=""
        )
    )
    if differences:
        print("\n".join(differences[:60]), file=sys.stderr)
        print(f"{asked.out} is out of date: run `make metrics-reference`", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
