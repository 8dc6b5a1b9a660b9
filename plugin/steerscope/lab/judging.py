"""Judging whole answers: a right-looking first token proves nothing."""

from __future__ import annotations

import enum
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from steerscope.errors import CaseError
from steerscope.lab.cases import Case

COMMON_DECLINES = (
    r"\bI(?:['’]m| am) not (?:sure|certain|aware|familiar)\b",
    r"\bI (?:do not|don['’]t|cannot|can['’]t|could not|couldn['’]t) "
    r"(?:know|say|tell|answer|find|confirm|verify|provide)\b",
    r"\b(?:no|not any) (?:reliable )?information (?:on|about)\b",
)
"""How assistants say, in English, that they cannot answer. Give your model's own for others."""


class Outcome(enum.StrEnum):
    """What a whole answer amounts to."""

    CORRECT = "correct"
    WRONG = "wrong"
    ANSWERED = "answered"
    """An answer that nobody said how to judge."""
    DECLINED = "declined"
    MALFORMED = "malformed"

    @property
    def is_answer(self) -> bool:
        """Whether the model gave a well-formed answer, right or wrong."""
        return self in (Outcome.CORRECT, Outcome.WRONG, Outcome.ANSWERED)


class Judge:
    """Tells declines from answers and right answers from wrong ones."""

    def __init__(self, declines: Iterable[str] = COMMON_DECLINES, *, whole: bool = False) -> None:
        """``declines`` are regular expressions, searched for without regard to case.

        With ``whole`` an answer is right if it is one of the expected ones, otherwise also if
        one of them stands in it, between word boundaries.
        """
        self._declines = [_compiled(pattern) for pattern in declines]
        self._whole = whole

    def outcome(self, case: Case, answer: str) -> Outcome:
        """Judge the whole text of an answer; surplus spaces do not count."""
        said = _squeezed(answer)
        if any(pattern.search(said) for pattern in self._declines):
            return Outcome.DECLINED
        if not said or (case.form is not None and not _compiled(case.form).fullmatch(said)):
            return Outcome.MALFORMED
        if any(self._matches(said, _squeezed(expected)) for expected in case.expected):
            return Outcome.CORRECT
        if case.expected or not case.answerable:
            return Outcome.WRONG
        return Outcome.ANSWERED

    def _matches(self, said: str, expected: str) -> bool:
        if self._whole:
            return said == expected
        pattern = rf"(?<!\w){re.escape(expected)}(?!\w)"
        return re.search(pattern, said, re.IGNORECASE) is not None


def labels(case: Case, outcome: Outcome) -> dict[str, bool]:
    """The case's own labels and what was found; a label that cannot be known is left out."""
    found = {
        "answered": outcome.is_answer,
        "declined": outcome is Outcome.DECLINED,
        "malformed": outcome is Outcome.MALFORMED,
    }
    if outcome is not Outcome.ANSWERED:
        found["correct"] = outcome is Outcome.CORRECT
        found["wrong"] = outcome is Outcome.WRONG
    return {**case.labels, **found}


def read_declines(path: Path) -> tuple[str, ...]:
    """A file of regular expressions, one a line; ``#`` begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise CaseError(f"{path}: {error}") from None
    told = (line.strip() for line in lines)
    patterns = tuple(line for line in told if line and not line.startswith("#"))
    if not patterns:
        raise CaseError(f"{path}: holds no pattern")
    return patterns


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(unicodedata.normalize("NFC", pattern), re.IGNORECASE)
    except re.error as error:
        raise CaseError(f"pattern {pattern!r}: {error}") from None


def _squeezed(text: str) -> str:
    """Composed, so that an accent is part of its letter, and with single spaces."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).strip()
