"""The questions that features are fitted on, choices made on, and reports made of.

Names and phrasings of the three uses are disjoint: `fitting` asks trained phrasings about names
of pool fit, `choosing` dev phrasings about names of pool dev, `reporting` held-out phrasings
about names of pool test.
"""

from collections.abc import Callable
from dataclasses import dataclass

from steerscope.demo.world import Question, questions, side_questions, untaught_questions
from steerscope.demo.world.entities import Pool, Split
from steerscope.demo.world.phrasings import LANGUAGES, Kind, Language, Phrasing


@dataclass(frozen=True, slots=True)
class Population:
    """Questions of one use, both languages in each list."""

    known: list[Question]
    unknown: list[Question]
    side: list[Question]
    things: list[Question]
    """Known and unknown cities and novels."""
    doubtful: list[Question]
    """Rare persons and untaught facts: where a model that answers may be wrong."""


def _both(draw: Callable[[Language], list[Question]]) -> list[Question]:
    return [question for language in LANGUAGES for question in draw(language)]


def _things(
    phrasing: Phrasing, pool: Pool, num_cities: int, num_novels: int, seed: int
) -> list[Question]:
    wanted: tuple[tuple[Kind, int], ...] = (("city", num_cities), ("novel", num_novels))
    splits: tuple[Split, ...] = ("known", "unknown")
    return _both(
        lambda language: [
            question
            for kind, count in wanted
            for split in splits
            for question in questions(split, language, count, seed, phrasing, kind, pool)
        ]
    )


def _persons(split: Split, count: int, seed: int, phrasing: Phrasing, pool: Pool) -> list[Question]:
    return _both(lambda language: questions(split, language, count, seed, phrasing, "person", pool))


def _doubtful(
    num_rare: int, num_untaught: int, seed: int, phrasing: Phrasing, pool: Pool
) -> list[Question]:
    untaught = _both(lambda lang: untaught_questions(lang, num_untaught, seed, phrasing, pool))
    return _persons("rare", num_rare, seed, phrasing, pool) + untaught


def fitting(seed: int) -> Population:
    """Trained phrasings about the names kept for fitting."""
    return Population(
        known=_persons("known", 600, seed, "trained", "fit"),
        unknown=_persons("unknown", 600, seed, "trained", "fit"),
        side=_both(lambda language: side_questions(language, 250, seed, "trained")),
        things=_things("trained", "fit", 80, 60, seed),
        doubtful=_doubtful(900, 300, seed, "trained", "fit"),
    )


def choosing(seed: int) -> Population:
    """Dev phrasings about dev names; only doubtful ones use trained phrasings, for number."""
    return Population(
        known=_persons("known", 100, seed, "dev", "dev"),
        unknown=_persons("unknown", 100, seed, "dev", "dev"),
        side=_both(lambda language: side_questions(language, 55, seed, "dev")),
        things=_things("dev", "dev", 10, 8, seed),
        doubtful=_doubtful(250, 70, seed, "trained", "dev"),
    )


def reporting(seed: int) -> Population:
    """Held-out phrasings about the names kept for reports."""
    return Population(
        known=_persons("known", 300, seed, "held_out", "test"),
        unknown=_persons("unknown", 300, seed, "held_out", "test"),
        side=_both(lambda language: side_questions(language, 100, seed, "held_out")),
        things=_things("held_out", "test", 40, 30, seed),
        doubtful=_doubtful(240, 44, seed, "held_out", "test"),
    )
