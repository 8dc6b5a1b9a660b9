"""Whole answers are judged, and the statistics behind every reported number hold."""

import pytest
from steerscope.demo.world import Question, questions, side_questions
from steerscope.demo.world.scoring import Outcome, auroc, classify
from steerscope.lab.proportions import wilson

KNOWN = Question(
    "Which sport does Michael Jordan play?",
    "They play basketball.",
    "Michael Jordan",
    "known",
    "en",
    "sport",
    "person",
)
UNKNOWN_FR = Question(
    "Quel sport pratique Michael Batkin ?",
    "Je ne sais pas qui c'est.",
    "Michael Batkin",
    "unknown",
    "fr",
    "sport",
    "person",
)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("They play basketball.", Outcome.CORRECT),
        ("  They play  basketball. ", Outcome.CORRECT),
        ("They play golf.", Outcome.WRONG),
        ("I'm not sure who that is.", Outcome.DECLINED),
        ("They They They", Outcome.MALFORMED),
        ("They play", Outcome.MALFORMED),
        ("They play basketball. They play golf.", Outcome.MALFORMED),
        ("They play the violin.", Outcome.MALFORMED),
        ("They were born in Oslo.", Outcome.MALFORMED),
        ("Cette personne pratique le golf.", Outcome.MALFORMED),
        ("Je ne sais pas qui c'est.", Outcome.MALFORMED),
        ("", Outcome.MALFORMED),
    ],
)
def test_only_a_whole_answer_of_the_right_type_and_language_counts(
    text: str, outcome: Outcome
) -> None:
    """A right first word, another attribute's answer or the other language is malformed."""
    assert classify(KNOWN, text) is outcome


def test_the_expected_answer_to_an_unknown_name_is_a_decline_not_a_success() -> None:
    """For an unknown name the decline sentence is DECLINED and any well-formed answer is WRONG."""
    assert classify(UNKNOWN_FR, "Je ne sais pas qui c'est.") is Outcome.DECLINED
    assert classify(UNKNOWN_FR, "Cette personne pratique le golf.") is Outcome.WRONG


def test_answered_means_well_formed_right_or_wrong() -> None:
    """Declines and malformed text are not answers."""
    assert [outcome for outcome in Outcome if outcome.answered] == [Outcome.CORRECT, Outcome.WRONG]


def test_every_expected_answer_is_judged_as_expected() -> None:
    """The world and its judge agree on every kind of question."""
    for language in ("en", "fr"):
        for kind in ("person", "city", "novel"):
            known = questions("known", language, 20, 3, kind=kind)
            unknown = questions("unknown", language, 20, 3, kind=kind)
            assert {classify(q, q.answer) for q in known} == {Outcome.CORRECT}
            assert {classify(q, q.answer) for q in unknown} == {Outcome.DECLINED}
        side = side_questions(language, 40, 3)
        assert {classify(q, q.answer) for q in side} == {Outcome.CORRECT}


def test_wilson_matches_published_values() -> None:
    """Newcombe (1998) gives 81/263 as .2553 to .3662, and 0/20 as 0 to .1611."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_of_nothing_is_everything_and_impossible_counts_are_refused() -> None:
    """No trials tell nothing; more successes than trials is a caller's error."""
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        wilson(3, 2)


def test_auroc_counts_ordered_pairs_and_halves_ties() -> None:
    """Perfect order is 1, reversed order 0, and equal scores one half."""
    assert auroc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert auroc([0.0], [1.0, 2.0]) == 0.0
    assert auroc([1.0, 1.0], [1.0]) == 0.5
    assert auroc([1.0, 2.0], [1.0, 0.0]) == pytest.approx(0.875)


def test_auroc_refuses_an_empty_class() -> None:
    """An AUROC without positives or without negatives does not exist."""
    with pytest.raises(ValueError, match="pos"):
        auroc([], [1.0])
    with pytest.raises(ValueError, match="neg"):
        auroc([1.0], [])
