"""The embedded world: who exists in it, what is true of them, and how one asks.

The public face: questions with the whole answers they expect, deterministic by seed, about
names and in phrasings that training never used for the same purpose. Pure Python.
"""

from steerscope.demo.world.phrasings import LANGUAGES, Language
from steerscope.demo.world.question import (
    SIDE_ATTRIBUTES,
    Question,
    all_questions,
    asked_attribute,
    declined,
    questions,
    side_pairs,
    side_question,
    side_questions,
    stated,
    untaught_questions,
)

__all__ = [
    "LANGUAGES",
    "SIDE_ATTRIBUTES",
    "Language",
    "Question",
    "all_questions",
    "asked_attribute",
    "declined",
    "questions",
    "side_pairs",
    "side_question",
    "side_questions",
    "stated",
    "untaught_questions",
]
