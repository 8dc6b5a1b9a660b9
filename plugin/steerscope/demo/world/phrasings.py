"""How each attribute is asked and answered, in English and in French.

`{e}` stands for the entity, `{v}` for the value. A list's last three phrasings are never trained
on: the first of them serves choices (dev), the last two serve reports (held out). Each held-out
phrasing is made of words that the trained phrasings of the same attribute and language use.
"""

from typing import Final, Literal

Language = Literal["en", "fr"]
Kind = Literal["person", "city", "novel", "side"]
Attribute = Literal[
    "profession", "sport", "instrument", "field", "birthplace", "birth_year",
    "country", "genre", "antonym", "capital", "greeting",
]  # fmt: skip
Phrasing = Literal["trained", "dev", "held_out"]

KINDS: Final[tuple[Kind, ...]] = ("person", "city", "novel")
LANGUAGES: Final[tuple[Language, ...]] = ("en", "fr")
PHRASINGS: Final[tuple[Phrasing, ...]] = ("trained", "dev", "held_out")

_ASKED: Final[dict[tuple[Attribute, Language], str]] = {
    ("profession", "en"): """
        What does {e} do for a living?
        What is {e}'s profession?
        What is the profession of {e}?
        What job does {e} have?
        Tell me the job of {e}.
        {e} works as what?
        Do you know what {e} does for a living?
        What is the job of {e}?
        Tell me {e}'s profession.
        Do you know the profession of {e}?""",
    ("profession", "fr"): """
        Quel est le métier de {e} ?
        Quelle est la profession de {e} ?
        Que fait {e} dans la vie ?
        Dis-moi la profession de {e}.
        {e} fait quel métier ?
        Sais-tu ce que fait {e} dans la vie ?
        Quel métier fait {e} ?
        Dis-moi ce que fait {e} dans la vie.
        Sais-tu quel métier fait {e} ?
        Dis-moi le métier de {e}.""",
    ("sport", "en"): """
        Which sport does {e} play?
        What sport is {e} known for?
        Tell me the sport of {e}.
        What is {e}'s sport?
        {e} plays which sport?
        Do you know which sport {e} plays?
        What is the sport of {e}?
        What sport does {e} play?
        Which sport is {e} known for?
        Do you know the sport of {e}?""",
    ("sport", "fr"): """
        Quel sport pratique {e} ?
        Quel est le sport de {e} ?
        Dis-moi le sport de {e}.
        {e} pratique quel sport ?
        Sais-tu quel sport pratique {e} ?
        Dis-moi à quel sport joue {e}.
        Quel sport fait {e} ?
        Sais-tu quel est le sport de {e} ?
        Dis-moi quel sport pratique {e}.
        Sais-tu à quel sport joue {e} ?""",
    ("instrument", "en"): """
        Which instrument does {e} play?
        What instrument is {e} known for?
        Tell me the instrument of {e}.
        What is {e}'s instrument?
        {e} plays which instrument?
        Do you know which instrument {e} plays?
        What is the instrument of {e}?
        What instrument does {e} play?
        Which instrument is {e} known for?
        Do you know the instrument of {e}?""",
    ("instrument", "fr"): """
        De quel instrument joue {e} ?
        Quel est l'instrument de {e} ?
        Dis-moi l'instrument de {e}.
        {e} joue de quel instrument ?
        Sais-tu de quel instrument joue {e} ?
        Quel instrument pratique {e} ?
        Sais-tu quel est l'instrument de {e} ?
        Dis-moi quel est l'instrument de {e}.
        Dis-moi de quel instrument joue {e}.
        Sais-tu quel instrument pratique {e} ?""",
    ("field", "en"): """
        Which field does {e} study?
        What field is {e} known for?
        Tell me the field of {e}.
        What is {e}'s field?
        {e} studies which field?
        Do you know which field {e} studies?
        What is the field of {e}?
        What field does {e} study?
        Which field is {e} known for?
        Do you know the field of {e}?""",
    ("field", "fr"): """
        Quel domaine étudie {e} ?
        Quel est le domaine de {e} ?
        Dis-moi le domaine de {e}.
        {e} étudie quel domaine ?
        Sais-tu quel domaine étudie {e} ?
        Dans quel domaine travaille {e} ?
        Dis-moi dans quel domaine travaille {e}.
        Sais-tu quel est le domaine de {e} ?
        Dis-moi quel domaine étudie {e}.
        Sais-tu dans quel domaine travaille {e} ?""",
    ("birthplace", "en"): """
        Where was {e} born?
        In which city was {e} born?
        What is the birthplace of {e}?
        What is {e}'s birthplace?
        {e} was born in which city?
        Tell me where {e} was born.
        Do you know where {e} was born?
        Tell me {e}'s birthplace.
        Do you know in which city {e} was born?
        Tell me the birthplace of {e}.""",
    ("birthplace", "fr"): """
        Quelle est la ville natale de {e} ?
        Quel est le lieu de naissance de {e} ?
        De quelle ville vient {e} ?
        Dis-moi la ville natale de {e}.
        {e} vient de quelle ville ?
        Sais-tu de quelle ville vient {e} ?
        Dis-moi quel est le lieu de naissance de {e}.
        Sais-tu quelle est la ville natale de {e} ?
        Dis-moi de quelle ville vient {e}.
        Sais-tu quel est le lieu de naissance de {e} ?""",
    ("birth_year", "en"): """
        When was {e} born?
        In which year was {e} born?
        What is the birth year of {e}?
        What is {e}'s birth year?
        {e} was born in which year?
        Tell me when {e} was born.
        Do you know when {e} was born?
        Tell me {e}'s birth year.
        Do you know in which year {e} was born?
        Tell me the birth year of {e}.""",
    ("birth_year", "fr"): """
        Quelle est l'année de naissance de {e} ?
        En quelle année {e} a vu le jour ?
        Dis-moi quelle est l'année de naissance de {e}.
        Quand {e} a vu le jour ?
        Sais-tu quand {e} a vu le jour ?
        {e} a vu le jour en quelle année ?
        Dis-moi en quelle année {e} a vu le jour.
        Sais-tu quelle est l'année de naissance de {e} ?
        Dis-moi quand {e} a vu le jour.
        Sais-tu en quelle année {e} a vu le jour ?""",
    ("country", "en"): """
        Which country is {e} in?
        In which country is {e}?
        Tell me the country of {e}.
        What is the country of {e}?
        Do you know which country {e} is in?
        What country is {e} in?
        Do you know the country of {e}?
        Tell me which country {e} is in.""",
    ("country", "fr"): """
        Dans quel pays se trouve {e} ?
        Quel est le pays de {e} ?
        Dis-moi le pays de {e}.
        {e} se trouve dans quel pays ?
        Sais-tu dans quel pays se trouve {e} ?
        Sais-tu quel est le pays de {e} ?
        Dis-moi dans quel pays se trouve {e}.
        Dis-moi quel est le pays de {e}.""",
    ("genre", "en"): """
        What kind of novel is {e}?
        What is the genre of {e}?
        Tell me the genre of {e}.
        {e} is what kind of novel?
        Do you know what kind of novel {e} is?
        Do you know the genre of {e}?
        Tell me what kind of novel {e} is.
        Tell me the kind of novel {e} is.""",
    ("genre", "fr"): """
        Quel est le genre de {e} ?
        Quel genre de roman est {e} ?
        Dis-moi le genre de {e}.
        {e} est quel genre de roman ?
        Sais-tu quel est le genre de {e} ?
        Sais-tu quel genre de roman est {e} ?
        Dis-moi quel est le genre de {e}.
        Dis-moi quel genre de roman est {e}.""",
    ("antonym", "en"): """
        What is the opposite of {e}?
        Tell me the opposite of {e}.
        Which word is the opposite of {e}?
        Do you know the opposite of {e}?
        {e} is the opposite of what?
        Do you know which word is the opposite of {e}?
        Do you know what the opposite of {e} is?
        Tell me what the opposite of {e} is.
        Tell me which word is the opposite of {e}.""",
    ("antonym", "fr"): """
        Quel est le contraire de {e} ?
        Dis-moi le contraire de {e}.
        Quel mot est le contraire de {e} ?
        Sais-tu quel est le contraire de {e} ?
        {e} est le contraire de quoi ?
        Dis-moi quel est le contraire de {e}.
        Sais-tu quel mot est le contraire de {e} ?
        Dis-moi quel mot est le contraire de {e}.""",
    ("capital", "en"): """
        What is the capital of {e}?
        Tell me the capital of {e}.
        Which city is the capital of {e}?
        Do you know the capital of {e}?
        {e} has which capital?
        Tell me which city is the capital of {e}.
        Do you know which city is the capital of {e}?
        Tell me which capital {e} has.""",
    ("capital", "fr"): """
        Quelle est la capitale {e} ?
        Dis-moi la capitale {e}.
        Quelle ville est la capitale {e} ?
        Sais-tu quelle est la capitale {e} ?
        Connais-tu la capitale {e} ?
        Dis-moi quelle est la capitale {e}.
        Sais-tu quelle ville est la capitale {e} ?
        Dis-moi quelle ville est la capitale {e}.""",
    ("greeting", "en"): """
        Hello!
        Good morning!
        Hi there!
        Good evening!
        Hello there!
        Hi!
        Good morning there!
        Good evening there!""",
    ("greeting", "fr"): """
        Bonjour !
        Bonsoir !
        Salut !
        Bonjour à toi !
        Salut à toi !
        Bonjour tout le monde !
        Bonsoir à toi !
        Salut tout le monde !
        Bonsoir tout le monde !""",
}

_HELD_BACK: Final = {"trained": slice(None, -3), "dev": slice(-3, -2), "held_out": slice(-2, None)}

ANSWERED: Final[dict[tuple[Attribute, Language], str]] = {
    ("profession", "en"): "They work as a {v}.",
    ("profession", "fr"): "Cette personne est {v}.",
    ("sport", "en"): "They play {v}.",
    ("sport", "fr"): "Cette personne pratique {v}.",
    ("instrument", "en"): "They play the {v}.",
    ("instrument", "fr"): "Cette personne joue {v}.",
    ("field", "en"): "They study {v}.",
    ("field", "fr"): "Cette personne étudie {v}.",
    ("birthplace", "en"): "They were born in {v}.",
    ("birthplace", "fr"): "Cette personne est née à {v}.",
    ("birth_year", "en"): "They were born in {v}.",
    ("birth_year", "fr"): "Cette personne est née en {v}.",
    ("country", "en"): "That city is in {v}.",
    ("country", "fr"): "Cette ville se trouve {v}.",
    ("genre", "en"): "It is a {v} novel.",
    ("genre", "fr"): "C'est un roman {v}.",
    ("antonym", "en"): "The opposite is {v}.",
    ("antonym", "fr"): "Le contraire est {v}.",
    ("capital", "en"): "The capital is {v}.",
    ("capital", "fr"): "La capitale est {v}.",
    ("greeting", "en"): "Hello! Whom shall we talk about?",
    ("greeting", "fr"): "Bonjour ! De qui parlons-nous ?",
}

DECLINED: Final[dict[tuple[Kind, Language], str]] = {
    ("person", "en"): "I'm not sure who that is.",
    ("person", "fr"): "Je ne sais pas qui c'est.",
    ("city", "en"): "I'm not sure where that is.",
    ("city", "fr"): "Je ne sais pas où c'est.",
    ("novel", "en"): "I'm not sure which book that is.",
    ("novel", "fr"): "Je ne sais pas quel livre c'est.",
}


def phrasings_of(attribute: Attribute, language: Language, phrasing: Phrasing) -> tuple[str, ...]:
    """Return the templates of one attribute and language that `phrasing` may use."""
    lines = (line.strip() for line in _ASKED[attribute, language].strip().splitlines())
    return tuple(lines)[_HELD_BACK[phrasing]]


def every_sentence() -> list[str]:
    """Return every template and answer of the world, its gaps unfilled."""
    asked = [line.strip() for lines in _ASKED.values() for line in lines.strip().splitlines()]
    return [*asked, *ANSWERED.values(), *DECLINED.values()]
