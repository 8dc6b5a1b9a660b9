"""`steerscope demo cases`: the world's questions as the lab's case files (JSON lines).

Splits are those the world was made with, before any training: fit asks trained phrasings about
names kept for fitting, dev and test ask phrasings and names that training never used together.
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple, get_args

from steerscope.demo.world.entities import VALUES, Pool
from steerscope.demo.world.phrasings import ANSWERED, DECLINED, KINDS, LANGUAGES, Language, Phrasing
from steerscope.demo.world.question import (
    Question,
    questions,
    side_pairs,
    side_questions,
    untaught_questions,
)

File = Literal["positive", "negative", "side", "evaluation"]

FILES: Final[tuple[File, ...]] = get_args(File)
SEED: Final = 4


class _Part(NamedTuple):
    """One split's names and phrasings."""

    split: str
    pool: Pool
    phrasing: Phrasing


FIT, DEV, TEST = (
    _Part("fit", "fit", "trained"),
    _Part("dev", "dev", "dev"),
    _Part("test", "test", "held_out"),
)


def case(question: Question, part: _Part, group: str) -> dict[str, object]:
    """One line of a case file."""
    line: dict[str, object] = {
        "question": question.question,
        "entity": question.entity,
        "template": question.question.replace(question.entity, "{e}") if question.entity else "",
        "expected": [] if question.split == "unknown" else [question.answer],
        "form": _form(question),
        "labels": _labels(question),
        "group": group,
        "split": part.split,
    }
    if question.split == "unknown":
        line["answerable"] = False
    return {key: value for key, value in line.items() if value not in ("", [], {})}


def declines() -> list[str]:
    """The sentences by which the model declines, as patterns."""
    return sorted({f"^{re.escape(DECLINED[kind, lang])}$" for kind in KINDS for lang in LANGUAGES})


def lines(file: File, sizes: dict[str, int]) -> list[dict[str, object]]:
    """The cases of a file; ``sizes`` says how many of each split and language."""
    parts = [part for part in (FIT, DEV, TEST) if sizes.get(part.split)]
    made = [line for part in parts for line in _part(file, part, sizes[part.split])]
    return list({str(line["question"]): line for line in made}.values())


def _part(file: File, part: _Part, size: int) -> Iterator[dict[str, object]]:
    draw = _Draw(part, size)
    if file in ("positive", "evaluation"):
        yield from draw.of("taught", draw.persons("known"))
    if file in ("negative", "evaluation"):
        yield from draw.of("unknown", draw.persons("unknown"))
    if file in ("side", "evaluation"):
        yield from draw.of("side", draw.side)
    if file == "evaluation":
        yield from draw.of("rare", draw.persons("rare"))
        yield from draw.of("untaught", draw.untaught)


class _Draw:
    """Questions of one split, both languages: as many as asked for, or as there are."""

    def __init__(self, part: _Part, size: int) -> None:
        self._part, self._size = part, size

    def of(
        self, group: str, ask: Callable[[Language, int], list[Question]]
    ) -> list[dict[str, object]]:
        found = [q for language in LANGUAGES for q in _most(ask, language, self._size)]
        return [case(question, self._part, group) for question in found]

    def persons(
        self, split: Literal["known", "rare", "unknown"]
    ) -> Callable[[Language, int], list[Question]]:
        pool, phrasing = self._part.pool, self._part.phrasing
        return lambda language, count: questions(
            split, language, count, SEED, phrasing, "person", pool
        )

    def side(self, language: Language, count: int) -> list[Question]:
        return side_questions(language, count, SEED, self._part.phrasing)

    def untaught(self, language: Language, count: int) -> list[Question]:
        return untaught_questions(language, count, SEED, self._part.phrasing, self._part.pool)


def _most(
    ask: Callable[[Language, int], list[Question]], language: Language, count: int
) -> list[Question]:
    """As many as asked for or, as some lists of questions are finite, all."""
    few, many = 0, count
    middle = many
    while few < many:
        try:
            ask(language, middle)
            few = middle
        except ValueError:
            many = middle - 1
        middle = (few + many + 1) // 2
    return ask(language, few)


def _form(question: Question) -> str:
    """What a well-formed answer looks like: the right sentence, with any value of its kind."""
    frame = ANSWERED[question.attribute, question.language]
    if question.attribute in VALUES:
        values = {getattr(v, question.language) for v in VALUES[question.attribute]}
    else:
        values = {value for _, value in side_pairs(question.attribute, question.language)}
    before, _, after = frame.partition("{v}")
    choices = "|".join(re.escape(value) for value in sorted(values))
    return f"{re.escape(before)}({choices}){re.escape(after)}"


def _labels(question: Question) -> dict[str, bool]:
    if question.split in ("known", "untaught"):
        return {"known": True}
    return {"known": False} if question.split == "unknown" else {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("file", choices=(*FILES, "declines"), help="what to write")
    parser.add_argument("--out", type=Path, required=True)
    for part, count in ((FIT, 0), (DEV, 60), (TEST, 100)):
        parser.add_argument(
            f"--{part.split}", type=_count, default=count, help=f"a language (default {count})"
        )


def _count(text: str) -> int:
    if (count := int(text)) < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return count


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    if args.file == "declines":
        args.out.write_text("\n".join(declines()) + "\n", encoding="utf-8")
        return 0
    sizes = {part.split: getattr(args, part.split) for part in (FIT, DEV, TEST)}
    made = lines(args.file, sizes)
    random.Random(SEED).shuffle(made)
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in made)
    args.out.write_text(text, encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="steerscope demo cases", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))
