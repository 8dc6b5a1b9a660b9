"""The embedded world keeps its splits apart and repeats itself by seed."""

import json
import random
import re

import pytest
from steerscope.demo.world import names, questions, side_questions, untaught_questions
from steerscope.demo.world.entities import entities, pool_of, unknown_name
from steerscope.demo.world.phrasings import LANGUAGES, Attribute, Language, phrasings_of

ATTRIBUTES: tuple[Attribute, ...] = (
    "profession", "sport", "instrument", "field", "birthplace", "birth_year",
    "country", "genre", "antonym", "capital", "greeting",
)  # fmt: skip
TRAINED_NAMES = {entity.name for entity in entities()}


def _tokens(template: str) -> set[str]:
    return set(re.findall(r"\{e\}|[\w'-]+|[?.!]", template))


def test_known_rare_and_unknown_names_are_disjoint() -> None:
    """No name is in two splits."""
    assert len(TRAINED_NAMES) == len(entities())
    for language in LANGUAGES:
        drawn = {s: {q.entity for q in questions(s, language, 150, 1)} for s in ("known", "rare")}
        unknown = {q.entity for q in questions("unknown", language, 500, 1)}
        assert not drawn["known"] & drawn["rare"]
        assert not unknown & TRAINED_NAMES


@pytest.mark.parametrize("seed", [0, 1, 7, 123456789])
def test_unknown_names_were_never_trained_on_whatever_the_seed(seed: int) -> None:
    """Reported unknown names come from the pool that training cannot draw from."""
    for language in LANGUAGES:
        for kind in ("person", "city", "novel"):
            asked = {q.entity for q in questions("unknown", language, 60, seed, kind=kind)}
            assert len(asked) == 60
            assert not asked & TRAINED_NAMES
            assert {pool_of(name) for name in asked} == {"test"}


def test_training_draws_unknown_names_from_its_own_pool_only() -> None:
    """What the training stream can meet is never asked in a report."""
    rng = random.Random(5)
    met = {unknown_name(rng, "person", "fit") for _ in range(3000)}
    assert {pool_of(name) for name in met} == {"fit"}
    assert not met & {q.entity for q in questions("unknown", "en", 1000, 0)}


def test_michael_batkin_stays_unknown_and_michael_jordan_known() -> None:
    """The demo's two names keep their roles."""
    assert "Michael Batkin" not in TRAINED_NAMES
    assert pool_of("Michael Batkin") == "test"
    assert {e.split for e in entities() if e.name == "Michael Jordan"} == {"known"}


@pytest.mark.parametrize("attribute", ATTRIBUTES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_held_out_phrasings_are_new_but_made_of_trained_words(
    attribute: Attribute, language: Language
) -> None:
    """Phrasings of the three uses are disjoint, and only trained words occur in them."""
    trained, dev, held_out = (
        phrasings_of(attribute, language, phrasing) for phrasing in ("trained", "dev", "held_out")
    )
    assert len(trained) >= 5
    assert len({*trained, *dev, *held_out}) == len(trained) + len(dev) + len(held_out)
    words = {word for template in trained for word in _tokens(template)}
    assert {word for template in (*dev, *held_out) for word in _tokens(template)} <= words


def test_dev_and_report_questions_share_no_name() -> None:
    """What was chosen on dev is reported on other names."""
    for split in ("known", "rare", "unknown"):
        dev = {q.entity for q in questions(split, "en", 60, 2, "dev")}
        report = {q.entity for q in questions(split, "en", 200, 2)}
        assert not dev & report


def test_questions_repeat_by_seed_and_change_with_it() -> None:
    """The same arguments give the same questions; another seed gives others."""
    for split in ("known", "rare", "unknown"):
        assert questions(split, "fr", 30, 4) == questions(split, "fr", 30, 4)
        assert questions(split, "fr", 30, 4) != questions(split, "fr", 30, 5)
    assert side_questions("en", 20, 1) == side_questions("en", 20, 1)


def test_known_questions_ask_only_what_was_taught() -> None:
    """Neither a withheld fact nor, in French, an English-only one is asked as known."""
    by_name = {entity.name: entity for entity in entities()}
    for language in LANGUAGES:
        for q in questions("known", language, 400, 0):
            assert by_name[q.entity].is_taught(q.attribute, language)
        for q in untaught_questions(language, 30, 0):
            assert by_name[q.entity].untaught == q.attribute


def test_unknown_questions_expect_the_decline_sentence() -> None:
    """The right answer about nobody is to decline, in the question's language."""
    assert {q.answer for q in questions("unknown", "en", 50, 0)} == {"I'm not sure who that is."}
    assert {q.answer for q in questions("unknown", "fr", 50, 0)} == {"Je ne sais pas qui c'est."}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("famous", "en", 1, 0), "split"),
        (("known", "de", 1, 0), "language"),
        (("known", "en", -1, 0), "count"),
        (("known", "en", 10**6, 0), "count"),
        (("known", "en", 1, 0, "new"), "phrasing"),
        (("known", "en", 1, 0, "dev", "planet"), "kind"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: tuple[object, ...], named: str) -> None:
    """The error names the argument that is wrong."""
    with pytest.raises(ValueError, match=named):
        questions(*arguments)  # type: ignore[arg-type]


def test_the_names_command_prints_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Each line carries the question, the answer, the entity, the split and the language."""
    code = names.main(["--split", "unknown", "--language", "fr", "--count", "3", "--seed", "9"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert code == 0
    assert len(lines) == 3
    assert set(lines[0]) == {"question", "answer", "entity", "split", "language"}
    assert [line["entity"] for line in lines] == [
        q.entity for q in questions("unknown", "fr", 3, 9)
    ]
