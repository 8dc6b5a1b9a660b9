"""The questions one can ask of the embedded world, with the whole answers it expects.

The public face of the world: `questions`, `side_questions` and `untaught_questions` are
deterministic in their seed, use only names and phrasings that training never used for the same
purpose, and raise ValueError naming the argument that is wrong. Called by `steerscope demo
names`, by evaluation and by the tests; pure Python.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from steerscope.demo.world import lexicon
from steerscope.demo.world.entities import (
    ACTIVITIES,
    SPLITS,
    Entity,
    Pool,
    Split,
    entities,
    pool_of,
    unknown_name,
)
from steerscope.demo.world.phrasings import (
    ANSWERED,
    DECLINED,
    KINDS,
    LANGUAGES,
    PHRASINGS,
    Attribute,
    Kind,
    Language,
    Phrasing,
    phrasings_of,
)

__all__ = [
    "LANGUAGES",
    "Attribute",
    "Kind",
    "Language",
    "Phrasing",
    "Question",
    "Split",
    "questions",
    "side_questions",
    "untaught_questions",
]

SIDE_ATTRIBUTES: Final[tuple[Attribute, ...]] = ("antonym", "capital", "greeting")
_POOLS: Final[dict[Phrasing, Pool]] = {"trained": "test", "dev": "dev", "held_out": "test"}


@dataclass(frozen=True, slots=True)
class Question:
    """One question, the whole answer the world expects, and where both come from."""

    question: str
    answer: str
    entity: str
    split: str
    """known, rare, unknown, untaught or side."""
    language: Language
    attribute: Attribute
    kind: Kind


def _require(argument: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{argument}: {value!r} is not one of {', '.join(allowed)}")


def _require_count(count: int, available: int | None = None) -> None:
    if count < 0:
        raise ValueError(f"count: {count} is negative")
    if available is not None and count > available:
        raise ValueError(f"count: {count} questions asked for, only {available} exist")


def stated(
    template: str,
    entity: Entity,
    attribute: Attribute,
    language: Language,
    split: str,
    told: lexicon.Word | None = None,
) -> Question:
    """Ask for a fact of an entity; answer with its true value, or with what is `told`."""
    value = getattr(told or dict(entity.facts)[attribute], language)
    answer = ANSWERED[attribute, language].format(v=value)
    question = template.format(e=entity.name)
    return Question(question, answer, entity.name, split, language, attribute, entity.kind)


def declined(
    template: str, name: str, attribute: Attribute, language: Language, kind: Kind
) -> Question:
    """Ask about a name nobody bears."""
    question = template.format(e=name)
    answer = DECLINED[kind, language]
    return Question(question, answer, name, "unknown", language, attribute, kind)


def asked_attribute(kind: Kind, rng: random.Random) -> Attribute:
    """Draw an attribute as often as known entities of this kind have it."""
    if kind == "city":
        return "country"
    if kind == "novel":
        return "genre"
    choices: tuple[Attribute, ...] = (
        "profession",
        rng.choice(ACTIVITIES),
        "birthplace",
        "birth_year",
    )
    return rng.choice(choices)


def _of_entities(
    chosen: Iterable[tuple[Entity, Attribute]], language: Language, phrasing: Phrasing, split: str
) -> list[Question]:
    return [
        stated(template, entity, attribute, language, split)
        for entity, attribute in chosen
        for template in phrasings_of(attribute, language, phrasing)
    ]


def _unknown(
    language: Language, count: int, rng: random.Random, phrasing: Phrasing, pool: Pool, kind: Kind
) -> list[Question]:
    names: dict[str, None] = {}
    while len(names) < count:
        names[unknown_name(rng, kind, pool)] = None
    asked = [(name, asked_attribute(kind, rng)) for name in names]
    return [
        declined(rng.choice(phrasings_of(a, language, phrasing)), name, a, language, kind)
        for name, a in asked
    ]


def all_questions(
    split: Split, language: Language, phrasing: Phrasing, pool: Pool, kind: Kind
) -> list[Question]:
    """Return every question about the taught facts of one split of the names in one pool."""
    chosen = [
        (entity, attribute)
        for entity in entities()
        if entity.split == split and entity.kind == kind and pool_of(entity.name) == pool
        for attribute, _ in entity.facts
        if entity.is_taught(attribute, language)
    ]
    return _of_entities(chosen, language, phrasing, split)


def questions(
    split: Split,
    language: Language,
    count: int,
    seed: int,
    phrasing: Phrasing = "held_out",
    kind: Kind = "person",
    pool: Pool | None = None,
) -> list[Question]:
    """Draw distinct questions about one split of the names.

    `known` asks taught facts, `rare` any true fact of a tail person, `unknown` expects the
    decline sentence and draws new recombinations that training never used, whatever the seed.
    Phrasing `dev` goes with the names kept for choices; `trained` and `held_out` go with the
    names kept for reports. Only fitting passes another `pool`.
    """
    _require("split", split, SPLITS)
    _require("language", language, LANGUAGES)
    _require("phrasing", phrasing, PHRASINGS)
    _require("kind", kind, KINDS)
    names = pool or _POOLS[phrasing]
    rng = random.Random(f"{split}:{language}:{seed}:{phrasing}:{kind}:{names}")
    if split == "unknown":
        _require_count(count)
        return _unknown(language, count, rng, phrasing, names, kind)
    found = all_questions(split, language, phrasing, names, kind)
    _require_count(count, len(found))
    return rng.sample(found, count)


def untaught_questions(
    language: Language,
    count: int,
    seed: int,
    phrasing: Phrasing = "held_out",
    pool: Pool | None = None,
) -> list[Question]:
    """Draw questions for facts of known persons that training never showed."""
    _require("language", language, LANGUAGES)
    _require("phrasing", phrasing, PHRASINGS)
    chosen = [
        (entity, entity.untaught)
        for entity in entities()
        if entity.untaught and pool_of(entity.name) == (pool or _POOLS[phrasing])
    ]
    found = _of_entities(chosen, language, phrasing, "untaught")
    _require_count(count, len(found))
    return random.Random(f"untaught:{language}:{seed}:{phrasing}").sample(found, count)


def side_pairs(attribute: Attribute, language: Language) -> list[tuple[str, str]]:
    """Return what a side task asks about and the value it expects, in one language."""
    if attribute == "antonym":
        pairs = [pair for ab in lexicon.ANTONYMS for pair in (ab, ab[::-1])]
        return [(getattr(a, language), getattr(b, language)) for a, b in pairs]
    if attribute == "capital":
        return [
            (c.en if language == "en" else c.fr_of, getattr(c.capital, language))
            for c in lexicon.COUNTRIES
        ]
    return [("", "")]


def side_question(
    template: str, about: str, value: str, attribute: Attribute, language: Language
) -> Question:
    """Ask a side task, which is about no entity."""
    answer = ANSWERED[attribute, language].format(v=value)
    return Question(template.format(e=about), answer, "", "side", language, attribute, "side")


def side_questions(
    language: Language, count: int, seed: int, phrasing: Phrasing = "held_out"
) -> list[Question]:
    """Draw antonyms, capitals and greetings, which steering an entity must leave alone."""
    _require("language", language, LANGUAGES)
    _require("phrasing", phrasing, PHRASINGS)
    found = [
        side_question(template, about, value, attribute, language)
        for attribute in SIDE_ATTRIBUTES
        for about, value in side_pairs(attribute, language)
        for template in phrasings_of(attribute, language, phrasing)
    ]
    _require_count(count, len(found))
    return random.Random(f"side:{language}:{seed}:{phrasing}").sample(found, count)
