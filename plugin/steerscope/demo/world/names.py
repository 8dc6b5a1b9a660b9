"""`steerscope demo names`: print questions about known, rare or unknown names as JSON lines."""

import argparse
import json
import sys
from collections.abc import Sequence

from steerscope.demo.world import questions
from steerscope.demo.world.entities import SPLITS
from steerscope.demo.world.phrasings import LANGUAGES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--split", choices=SPLITS, required=True, help="which names to ask about")
    parser.add_argument("--language", choices=LANGUAGES, default="en", help="default: en")
    parser.add_argument("--count", type=int, default=10, help="how many questions (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=0, help="same seed, same questions (default: 0)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the questions; a bad argument is told on standard error and gives status 2."""
    try:
        asked = questions(args.split, args.language, args.count, args.seed)
    except ValueError as error:
        print(f"steerscope demo names: {error}", file=sys.stderr)
        return 2
    for q in asked:
        fields = ("question", "answer", "entity", "split", "language")
        line = {name: getattr(q, name) for name in fields}
        print(json.dumps(line, ensure_ascii=False))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="steerscope demo names", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
