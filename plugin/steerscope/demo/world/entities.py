"""The embedded world: who exists in it, what is true of them, and what training never shows.

All splits are drawn from one fixed seed before any training: which persons are known, which are
rare ("tail"), which names stay unknown, and which names serve fitting, choices (dev) or reports
(test).
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Final, Literal, get_args

from steerscope.demo.world import lexicon
from steerscope.demo.world.phrasings import Attribute, Kind, Language

Split = Literal["known", "rare", "unknown"]
Pool = Literal["fit", "dev", "test"]

SPLITS: Final[tuple[Split, ...]] = get_args(Split)
WORLD_SEED: Final = 20250327
NUM_MAIN_PERSONS: Final = 400
SYLLABLE_NAMES_SHARE: Final = 0.30
UNTAUGHT_SHARE: Final = 0.30
CONTESTED_SHARE: Final = 0.30
ENGLISH_ONLY_SHARE: Final = 0.20
NUM_CITY_COMPOUNDS: Final = 40
NUM_NOVELS: Final = 80
# Each exposure count is given to as many tail persons as the second number says.
TAIL_EXPOSURES: Final = tuple((count, 24) for count in (1, 2, 3, 6, 9, 12, 18, 28, 40, 64, 96))

PERSON_ATTRIBUTES: Final[tuple[Attribute, ...]] = (
    "profession", "sport", "instrument", "field", "birthplace", "birth_year",
)  # fmt: skip
ACTIVITIES: Final[tuple[Attribute, ...]] = ("sport", "instrument", "field")
VALUES: Final[dict[Attribute, tuple[lexicon.Word, ...]]] = {
    "profession": lexicon.PROFESSIONS,
    "sport": lexicon.SPORTS,
    "instrument": lexicon.INSTRUMENTS,
    "field": lexicon.FIELDS,
    "birthplace": lexicon.BIRTHPLACES,
    "birth_year": lexicon.YEARS,
    "country": tuple(lexicon.Word(c.en, c.fr_in) for c in lexicon.COUNTRIES),
    "genre": lexicon.GENRES,
}
# A few facts are fixed, so that the demo's first question has the answer a reader expects.
_ANCHORS: Final = {
    "Michael Jordan": {"sport": "basketball", "birth_year": "1963"},
}
_NEVER_KNOWN: Final = frozenset({"Michael Batkin"})


@dataclass(frozen=True, slots=True)
class Entity:
    """One entity the model meets in training, its facts, and what is kept from the model."""

    name: str
    kind: Kind
    split: Split
    facts: tuple[tuple[Attribute, lexicon.Word], ...]
    exposures: int | None = None
    """How often a tail entity is met in training, all attributes and languages together; None:
    freely.
    """
    untaught: Attribute | None = None
    """An attribute whose value exists but is never shown."""
    contested: Attribute | None = None
    """An attribute that training shows with another value each time: something to be unsure of."""
    english_only: Attribute | None = None
    """An attribute that is only ever shown in English."""

    def is_shown(self, attribute: Attribute, language: Language) -> bool:
        """Whether training asks for this attribute in this language."""
        if attribute == self.untaught:
            return False
        return language == "en" or attribute != self.english_only

    def is_taught(self, attribute: Attribute, language: Language) -> bool:
        """Whether training shows the true value in this language, and no other."""
        return attribute != self.contested and self.is_shown(attribute, language)


def pool_of(name: str) -> Pool:
    """Assign a name to fitting (60%), choices (15%) or reports (25%), for good."""
    digest = hashlib.blake2b(f"{WORLD_SEED}:{name}".encode(), digest_size=4).digest()
    share = int.from_bytes(digest, "big") % 100
    if name in _NEVER_KNOWN:
        return "test"
    return "fit" if share < 60 else "dev" if share < 75 else "test"


def _person_facts(name: str, rng: random.Random) -> tuple[tuple[Attribute, lexicon.Word], ...]:
    activity = rng.choice(ACTIVITIES)
    anchors = _ANCHORS.get(name, {})
    if anchors:
        activity = "sport"
    facts: list[tuple[Attribute, lexicon.Word]] = []
    for attribute in ("profession", activity, "birthplace", "birth_year"):
        value = rng.choice(VALUES[attribute])
        wanted = anchors.get(attribute)
        facts.append((attribute, next((v for v in VALUES[attribute] if v.en == wanted), value)))
    return tuple(facts)


def _person_names(rng: random.Random) -> Iterator[str]:
    """Yield distinct names that use every listed first name and surname about equally often."""
    yield from _ANCHORS
    seen = set(_ANCHORS) | _NEVER_KNOWN
    firsts: list[str] = []
    lasts: list[str] = []
    while True:
        firsts = firsts or rng.sample(lexicon.FIRST_NAMES, len(lexicon.FIRST_NAMES))
        lasts = lasts or rng.sample(lexicon.SURNAMES, len(lexicon.SURNAMES))
        name = _person_name(firsts.pop, lasts.pop, rng)
        if name not in seen:
            seen.add(name)
            yield name


def _main_person(name: str, rng: random.Random) -> Entity:
    facts = _person_facts(name, rng)
    kept = [attribute for attribute, _ in rng.sample(facts, len(facts))]
    drawn = [
        rng.random() < share for share in (UNTAUGHT_SHARE, CONTESTED_SHARE, ENGLISH_ONLY_SHARE)
    ]
    if name in _ANCHORS:
        drawn = [False, False, False]
    untaught, contested, english_only = (
        attribute if chosen else None for attribute, chosen in zip(kept, drawn, strict=False)
    )
    return Entity(name, "person", "known", facts, None, untaught, contested, english_only)


@cache
def entities() -> tuple[Entity, ...]:
    """Return every entity of the training world, persons first, in an order that never changes."""
    rng = random.Random(WORLD_SEED)
    names = _person_names(rng)
    mains = [_main_person(next(names), rng) for _ in range(NUM_MAIN_PERSONS)]
    tails = [
        Entity(name := next(names), "person", "rare", _person_facts(name, rng), exposures)
        for exposures, num in TAIL_EXPOSURES
        for _ in range(num)
    ]
    return (*mains, *tails, *_cities(rng), *_novels(rng))


def _cities(rng: random.Random) -> list[Entity]:
    facts = [
        (city, lexicon.Word(country.en, country.fr_in))
        for country in lexicon.COUNTRIES
        for city in (country.capital.en, *country.cities)
        if " " not in city
    ]
    compounds = rng.sample(
        [f"{a} {b}" for a in lexicon.CITY_PREFIXES for b in lexicon.CITY_STEMS], NUM_CITY_COMPOUNDS
    )
    facts += [(name, rng.choice(VALUES["country"])) for name in compounds]
    return [Entity(name, "city", "known", (("country", value),)) for name, value in facts]


def _novels(rng: random.Random) -> list[Entity]:
    titles = [f"The {a} {n}" for a in lexicon.NOVEL_ADJECTIVES for n in lexicon.NOVEL_NOUNS]
    return [
        Entity(title, "novel", "known", (("genre", rng.choice(lexicon.GENRES)),))
        for title in rng.sample(titles, NUM_NOVELS)
    ]


@cache
def _taken_names() -> frozenset[str]:
    return frozenset(entity.name for entity in entities())


def _syllable_word(rng: random.Random) -> str:
    stem = "".join(rng.choices(lexicon.SYLLABLES, k=rng.choice((2, 2, 3))))
    return (stem + rng.choice((*lexicon.SYLLABLE_ENDINGS, ""))).capitalize()


def _person_name(first: Callable[[], str], last: Callable[[], str], rng: random.Random) -> str:
    """Make a name as known and unknown persons alike bear it: no part tells which it is."""
    style = rng.random()
    if style < SYLLABLE_NAMES_SHARE / 2:
        return f"{_syllable_word(rng)} {_syllable_word(rng)}"
    if style < SYLLABLE_NAMES_SHARE:
        return f"{first()} {_syllable_word(rng)}"
    return f"{first()} {last()}"


def _person_candidate(rng: random.Random) -> str:
    return _person_name(
        lambda: rng.choice(lexicon.FIRST_NAMES), lambda: rng.choice(lexicon.SURNAMES), rng
    )


def _city_candidate(rng: random.Random) -> str:
    if rng.random() < 0.6:
        return f"{rng.choice(lexicon.CITY_PREFIXES)} {rng.choice(lexicon.CITY_STEMS)}"
    return _syllable_word(rng)


def _novel_candidate(rng: random.Random) -> str:
    return f"The {rng.choice(lexicon.NOVEL_ADJECTIVES)} {rng.choice(lexicon.NOVEL_NOUNS)}"


_CANDIDATES: Final[dict[Kind, Callable[[random.Random], str]]] = {
    "person": _person_candidate,
    "city": _city_candidate,
    "novel": _novel_candidate,
}


def unknown_name(rng: random.Random, kind: Kind, pool: Pool) -> str:
    """Draw a name nobody bears: known parts recombined, or syllables.

    Only pool `fit` is ever trained on.
    """
    draw = _CANDIDATES[kind]
    while True:
        name = draw(rng)
        if name not in _taken_names() and pool_of(name) == pool:
            return name
