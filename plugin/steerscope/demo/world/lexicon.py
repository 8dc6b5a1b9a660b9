"""The words of the embedded world: name parts, attribute values in both languages, side-task pairs.

Every first name starts with a consonant, so that French needs no elision before a name.
Professions are epicene in French, so that no answer depends on a gender the world does not have.
"""

from typing import Final, NamedTuple


class Word(NamedTuple):
    """One concept in both languages."""

    en: str
    fr: str


class Country(NamedTuple):
    """A country with the French forms its sentences need, and three of its cities."""

    en: str
    fr_of: str
    fr_in: str
    capital: Word
    cities: tuple[str, str]


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _words(pairs: str) -> tuple[Word, ...]:
    return tuple(Word(*(part.strip() for part in pair.split("="))) for pair in pairs.split(","))


FIRST_NAMES: Final = _split(
    """
    Michael Karen Daniel Laura Peter Sophie Thomas Julia Martin Clara Robert Diana Victor
    Nadia Samuel Marie Lucas Nina Simon Teresa Paul Monica Felix Paula Hugo Vera David Celia
    Gabriel Rosa Philip Bianca Marcus Greta Leon Tamara Bruno Camille Cedric Denise Dominic
    Frances George Gloria Gregory Joanna Joseph Judith Julian Katrin Kevin Lydia Louis Margot
    Matteo Melanie Nathan Nicole Noah Patricia Pablo Petra Quentin Rachel Raymond Regina
    Ricardo Rita Roland Ruth Sandra Sebastian Serena Stefan Stella Sylvia Theo Tobias Valerie
    Vincent Viola Walter Wendy Xavier Yasmin Yves Zoe Benjamin Barbara Bernard Beatrice Carlos
    Carmen Charles Cynthia Damien Dora Fabian Fiona Frank Gemma Gilbert Jasmine Jerome Kurt
    Lena Lionel Magnus Mireille Norman Pamela Ramona Rupert Salma Tristan Wanda Zachary
    """
)

SURNAMES: Final = _split(
    """
    Jordan Batkin Abbott Alvarez Anders Archer Ashby Atwood Bailey Barlow Barros Bauer Becker
    Bellamy Benson Berger Bishop Blanchet Bolton Booth Bowman Bradley Brandt Brennan Briggs
    Brooks Burgess Burton Byrne Calder Cameron Carlson Carver Castell Chandler Chavez Clarke
    Colbert Collins Conrad Cooper Corbin Cortez Crane Crawford Cruz Curtis Dalton Danvers
    Darnell Davies Dawson Decker Delgado Denton Desmond Dixon Dorsey Doyle Draper Duarte
    Dumont Duncan Dupree Eaton Ellis Emerson Engel Ericson Escobar Evans Fabre Farrell
    Faulkner Ferrer Finch Fischer Fleming Fletcher Flores Forbes Foster Fowler Fraser Frost
    Fuller Gaines Galvin Garner Garrido Gibson Gilmore Girard Glover Goddard Gordon Graham
    Granger Greene Griffin Gunther Guzman Hadley Halpern Hansen Harmon Harper Hartley Hayward
    Heller Herrera Hobbs Holden Holloway Hopkins Horvath Houston Hubert Hughes Hunter Ibarra
    Ingram Irwin Jansen Jarvis Jenkins Jensen Joyner Kaplan Keating Keller Kendall Kessler
    Kirby Klein Knight Koenig Kovacs Kramer Lambert Lancaster Landry Larsen Laurent Lawson
    Leblanc Lehmann Lennox Leroux Lester Lindgren Lowell Lozano Lucero Lynch Mackay Maddox
    Mallory Marlow Marquez Marsden Mather Maurer Maxwell Mercer Merrick Mercado Meyer Milburn
    Miranda Molina Monroe Moreau Morgan Morley Mosley Murdoch Navarro Nielsen Nolan Norris
    Novak Ortega Osborne Padilla Palmer Parrish Pascal Paxton Pearce Pelham Perrin Pickett
    Porter Prescott Preston Quigley Quinn Radcliff Ramsey Randall Renard Reyes Rhodes Ridley
    Rivera Roche Rollins Romero Rossi Rousseau Rowland Salazar Sanders Sawyer Schultz Seaton
    Sheldon Sinclair Slater Sorensen Spencer Sterling Suarez Sutton Talbot Tanner Thornton
    Tillman Torres Travers Trevino Tucker Turner Valdez Vance Vargas Vaughn Vogel Wagner
    Walden Warner Watkins Weber Whitaker Wilder Winslow Wolfe Yates Zamora Ziegler
    """
)

SYLLABLES: Final = _split(
    """
    ba be bi bo bra bre cal cor da del dor dra du fa fen fi for ga gar gle go gra gri ka kel
    ki kor kra la len li lo lu mar me mi mor mu na nel ni nor pa pel pi por pra qua ra rel ri
    ro ru sa sel shi sol sta su ta tel ti tor tra tu va vel vi vor vra wa wen wi zan ze zi zor
    """
)
SYLLABLE_ENDINGS: Final = ("n", "r", "s", "l", "th", "x", "m", "k")

PROFESSIONS: Final = _words(
    """
    chemist=chimiste, painter=peintre, architect=architecte, journalist=journaliste,
    poet=poète, judge=juge, pilot=pilote, diplomat=diplomate, dentist=dentiste,
    philosopher=philosophe, librarian=bibliothécaire, geologist=géologue, biologist=biologiste,
    photographer=photographe, economist=économiste, doctor=médecin, translator=interprète,
    florist=fleuriste, gymnast=gymnaste, artist=artiste
    """
)
SPORTS: Final = _words(
    """
    golf=le golf, tennis=le tennis, basketball=le basket, football=le football, rugby=le rugby,
    cricket=le cricket, hockey=le hockey, baseball=le baseball, volleyball=le volley,
    handball=le handball, badminton=le badminton, squash=le squash, polo=le polo,
    softball=le softball
    """
)
INSTRUMENTS: Final = _words(
    """
    violin=du violon, piano=du piano, guitar=de la guitare, flute=de la flûte,
    cello=du violoncelle, trumpet=de la trompette, harp=de la harpe, drums=de la batterie,
    clarinet=de la clarinette, oboe=du hautbois, banjo=du banjo, tuba=du tuba,
    saxophone=du saxophone, mandolin=de la mandoline
    """
)
FIELDS: Final = _words(
    """
    botany=la botanique, astronomy=l'astronomie, physics=la physique, chemistry=la chimie,
    biology=la biologie, geology=la géologie, history=l'histoire, logic=la logique,
    genetics=la génétique, optics=l'optique, linguistics=la linguistique,
    statistics=la statistique, ecology=l'écologie, robotics=la robotique
    """
)
GENRES: Final = _words(
    """
    mystery=policier, fantasy=fantastique, romance=sentimental, war=guerrier, spy=noir,
    comic=comique, gothic=gothique, historical=historique
    """
)
YEARS: Final = tuple(Word(str(year), str(year)) for year in range(1921, 1981))

_COUNTRY_ROWS: Final = """
France|de la France|en France|Paris|Paris|Lyon|Nantes
Spain|de l'Espagne|en Espagne|Madrid|Madrid|Seville|Bilbao
Italy|de l'Italie|en Italie|Rome|Rome|Milan|Turin
Germany|de l'Allemagne|en Allemagne|Berlin|Berlin|Hamburg|Leipzig
Portugal|du Portugal|au Portugal|Lisbon|Lisbonne|Porto|Braga
Norway|de la Norvège|en Norvège|Oslo|Oslo|Bergen|Trondheim
Sweden|de la Suède|en Suède|Stockholm|Stockholm|Malmo|Uppsala
Poland|de la Pologne|en Pologne|Warsaw|Varsovie|Gdansk|Poznan
Greece|de la Grèce|en Grèce|Athens|Athènes|Patras|Volos
Turkey|de la Turquie|en Turquie|Ankara|Ankara|Bursa|Konya
Egypt|de l'Égypte|en Égypte|Cairo|Le Caire|Aswan|Luxor
Kenya|du Kenya|au Kenya|Nairobi|Nairobi|Mombasa|Kisumu
Japan|du Japon|au Japon|Tokyo|Tokyo|Osaka|Kyoto
China|de la Chine|en Chine|Beijing|Pékin|Shanghai|Wuhan
India|de l'Inde|en Inde|Delhi|Delhi|Mumbai|Jaipur
Peru|du Pérou|au Pérou|Lima|Lima|Cusco|Trujillo
Chile|du Chili|au Chili|Santiago|Santiago|Arica|Temuco
Brazil|du Brésil|au Brésil|Brasilia|Brasilia|Recife|Manaus
Mexico|du Mexique|au Mexique|Mexico City|Mexico|Puebla|Oaxaca
Canada|du Canada|au Canada|Ottawa|Ottawa|Toronto|Calgary
Cuba|de Cuba|à Cuba|Havana|La Havane|Camaguey|Holguin
Vietnam|du Vietnam|au Vietnam|Hanoi|Hanoï|Danang|Hue
Morocco|du Maroc|au Maroc|Rabat|Rabat|Fez|Agadir
Finland|de la Finlande|en Finlande|Helsinki|Helsinki|Tampere|Turku
"""


def _country(row: str) -> Country:
    en, fr_of, fr_in, capital_en, capital_fr, *cities = row.split("|")
    return Country(en, fr_of, fr_in, Word(capital_en, capital_fr), (cities[0], cities[1]))


COUNTRIES: Final = tuple(_country(row) for row in _COUNTRY_ROWS.strip().splitlines())
BIRTHPLACES: Final = tuple(Word(country.cities[0], country.cities[0]) for country in COUNTRIES)

CITY_PREFIXES: Final = _split(
    """
    Port San Fort Mount New Lower Upper East West Glen Lake Saint
    """
)
CITY_STEMS: Final = _split(
    """
    Marlin Corvo Dulce Ferran Galena Havel Jasper Kestrel Lorne Mirador Norwood Orso Pinar
    Quill Ravel Solen Tamar Ursa Verdi Wexford Amber Bremer Calla Dorset Elgin Farrow Garnet
    Heron
    """
)
NOVEL_ADJECTIVES: Final = _split(
    """
    Silent Crimson Broken Hidden Golden Distant Frozen Hollow Burning Scarlet Wandering
    Forgotten Northern Velvet Paper Iron Bitter Lonely Ancient Second
    """
)
NOVEL_NOUNS: Final = _split(
    """
    Harbor Garden River Mirror Lantern Orchard Tower Winter Letter Bridge Forest Island
    Compass Shadow Voyage Palace Window Feather Meadow Clock
    """
)

ANTONYMS: Final = (
    (Word("hot", "chaud"), Word("cold", "froid")),
    (Word("big", "grand"), Word("small", "petit")),
    (Word("fast", "rapide"), Word("slow", "lent")),
    (Word("light", "clair"), Word("dark", "sombre")),
    (Word("happy", "joyeux"), Word("sad", "triste")),
    (Word("early", "tôt"), Word("late", "tard")),
    (Word("open", "ouvert"), Word("closed", "fermé")),
    (Word("full", "plein"), Word("empty", "vide")),
    (Word("soft", "doux"), Word("hard", "dur")),
    (Word("rich", "riche"), Word("poor", "pauvre")),
    (Word("strong", "fort"), Word("weak", "faible")),
    (Word("wet", "humide"), Word("dry", "sec")),
    (Word("young", "jeune"), Word("old", "vieux")),
    (Word("true", "vrai"), Word("false", "faux")),
    (Word("high", "haut"), Word("low", "bas")),
    (Word("thick", "épais"), Word("thin", "mince")),
)
