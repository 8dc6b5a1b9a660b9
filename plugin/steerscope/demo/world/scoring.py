"""Judging whole answers: a right-looking first token proves nothing."""

import re
from collections.abc import Sequence
from enum import Enum
from functools import cache

from steerscope.demo.world import Question, side_pairs
from steerscope.demo.world.entities import VALUES
from steerscope.demo.world.phrasings import ANSWERED, DECLINED, KINDS, Attribute, Language


class Outcome(Enum):
    """What a whole answer amounts to."""

    CORRECT = "correct"
    """The expected fact, word for word."""
    WRONG = "wrong"
    """A well-formed answer of the right type and language, with another value: also any answer to
    an unknown name.
    """
    DECLINED = "declined"
    """A decline sentence in the question's language."""
    MALFORMED = "malformed"
    """Anything else."""

    @property
    def answered(self) -> bool:
        """Whether the model gave a well-formed answer, right or wrong."""
        return self in (Outcome.CORRECT, Outcome.WRONG)


@cache
def _well_formed(attribute: Attribute, language: Language) -> frozenset[str]:
    if attribute in VALUES:
        values = [getattr(value, language) for value in VALUES[attribute]]
    else:
        values = [value for _, value in side_pairs(attribute, language)]
    return frozenset(ANSWERED[attribute, language].format(v=value) for value in values)


@cache
def _declines(language: Language) -> frozenset[str]:
    return frozenset(DECLINED[kind, language] for kind in KINDS)


def classify(question: Question, text: str) -> Outcome:
    """Judge the whole text generated for a question; surplus spaces do not count."""
    said = re.sub(r"\s+", " ", text).strip()
    if said in _declines(question.language):
        return Outcome.DECLINED
    if said == question.answer:
        return Outcome.CORRECT
    if said in _well_formed(question.attribute, question.language):
        return Outcome.WRONG
    return Outcome.MALFORMED


def auroc(pos: Sequence[float], neg: Sequence[float]) -> float:
    """Return P(a positive scores above a negative), ties counting half."""
    if not pos or not neg:
        raise ValueError(f"{'neg' if pos else 'pos'}: needs at least one score")
    scored = sorted([(score, 1) for score in pos] + [(score, 0) for score in neg])
    wins, index, below = 0.0, 0, 0
    while index < len(scored):
        end = index
        while end < len(scored) and scored[end][0] == scored[index][0]:
            end += 1
        tied_pos = sum(label for _, label in scored[index:end])
        tied_neg = end - index - tied_pos
        wins += tied_pos * (below + tied_neg / 2)
        below += tied_neg
        index = end
    return wins / (len(pos) * len(neg))
