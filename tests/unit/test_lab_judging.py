"""Judging: whole answers, not first tokens; what cannot be known is not said."""

import unicodedata

import pytest
from steerscope.errors import CaseError
from steerscope.lab.cases import Case
from steerscope.lab.judging import COMMON_DECLINES, Judge, Outcome, labels, read_declines

ASKED = Case(question="Which sport?", expected=("basketball", "hoops"))
UNANSWERABLE = Case(question="Which sport?", answerable=False)
OPEN = Case(question="Which sport?")
FORMED = Case(question="Which?", expected=("They play golf.",), form=r"They play (golf|chess)\.")


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("basketball", Outcome.CORRECT),
        ("They play Basketball.", Outcome.CORRECT),
        ("hoops, mostly", Outcome.CORRECT),
        ("basketballs", Outcome.WRONG),
        ("nonbasketball", Outcome.WRONG),
        ("basket ball", Outcome.WRONG),
        ("basket", Outcome.WRONG),
        ("", Outcome.MALFORMED),
        (" \n", Outcome.MALFORMED),
    ],
)
def test_a_right_answer_stands_in_what_was_said_between_word_boundaries(said, outcome):
    assert Judge().outcome(ASKED, said) is outcome


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("basketball", Outcome.CORRECT),
        ("  basketball \n", Outcome.CORRECT),
        ("Basketball", Outcome.WRONG),
        ("They play basketball.", Outcome.WRONG),
    ],
)
def test_a_whole_answer_is_the_expected_one(said, outcome):
    assert Judge(whole=True).outcome(ASKED, said) is outcome


@pytest.mark.parametrize("whole", [True, False])
def test_surplus_spaces_do_not_count(whole):
    case = Case(question="Who?", expected=("Ada  Lovelace",))
    assert Judge(whole=whole).outcome(case, "Ada\n Lovelace") is Outcome.CORRECT


@pytest.mark.parametrize(
    ("expected", "said", "right"),
    [
        ("judo", "le judo", True),
        ("jud", "judô", False),
        ("Ren", "René", False),
        ("René", "C'est René.", True),
        ("RENÉ", "rené", True),
        ("été", "l'été 1963", True),
        ("t", "été", False),
        ("C++", "in C++.", True),
        ("C", "in C++.", True),
        ("1.5", "about 175", False),
        ("(none)", "it is (none)", True),
    ],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_an_accent_is_part_of_its_letter_however_it_is_written(expected, said, right, form):
    case = Case(question="Who?", expected=(unicodedata.normalize(form, expected),))
    for written in ("NFC", "NFD"):
        outcome = Judge().outcome(case, unicodedata.normalize(written, said))
        assert (outcome is Outcome.CORRECT) is right


@pytest.mark.parametrize(
    "said",
    [
        "I'm not sure who that is.",
        "I’m not familiar with them.",
        "Sorry, I am not aware of any sport.",
        "i don't know",
        "I don’t know which sport.",
        "I could not find a basketball player of that name.",
        "There is no reliable information about this person.",
    ],
)
def test_a_decline_is_one_whatever_else_is_said(said):
    for case in (ASKED, UNANSWERABLE, OPEN, FORMED):
        assert Judge().outcome(case, said) is Outcome.DECLINED


@pytest.mark.parametrize(
    "said", ["I know: golf.", "They do not know defeat.", "Sure, I am certain: golf.", "Note: golf"]
)
def test_an_answer_is_no_decline(said):
    assert Judge().outcome(OPEN, said) is Outcome.ANSWERED


def test_own_declines_take_the_place_of_the_common_ones():
    judge = Judge(["^Je ne sais pas"])
    assert judge.outcome(OPEN, "je ne sais pas qui c'est.") is Outcome.DECLINED
    assert judge.outcome(OPEN, "Moi, je ne sais pas.") is Outcome.ANSWERED
    assert judge.outcome(OPEN, "I don't know.") is Outcome.ANSWERED


def test_a_decline_may_be_written_with_composed_accents_or_not():
    judge = Judge([unicodedata.normalize("NFD", "désolé")])
    assert judge.outcome(OPEN, "Désolé !") is Outcome.DECLINED


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        ("They play golf.", Outcome.CORRECT),
        ("They play chess.", Outcome.WRONG),
        ("They play rugby.", Outcome.MALFORMED),
        ("They play golf. They play golf.", Outcome.MALFORMED),
        ("Well, they play golf.", Outcome.MALFORMED),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_malformed_answer_is_not_right_even_where_the_right_one_stands_in_it(
    said, outcome, whole
):
    assert Judge(whole=whole).outcome(FORMED, said) is outcome


def test_every_answer_to_the_unanswerable_is_wrong():
    assert Judge().outcome(UNANSWERABLE, "golf") is Outcome.WRONG
    assert Judge().outcome(UNANSWERABLE, "") is Outcome.MALFORMED


def test_an_answer_that_nobody_can_judge_is_an_answer():
    assert Judge().outcome(OPEN, "golf") is Outcome.ANSWERED


def test_right_wrong_and_unjudged_are_answers():
    answers = {outcome for outcome in Outcome if outcome.is_answer}
    assert answers == {Outcome.CORRECT, Outcome.WRONG, Outcome.ANSWERED}


def test_labels_are_what_was_given_and_what_was_found():
    case = Case(question="Who?", labels={"known": True})
    assert labels(case, Outcome.WRONG) == {
        "known": True,
        "answered": True,
        "declined": False,
        "malformed": False,
        "correct": False,
        "wrong": True,
    }


def test_what_cannot_be_known_has_no_label():
    found = labels(OPEN, Outcome.ANSWERED)
    assert found == {"answered": True, "declined": False, "malformed": False}


@pytest.mark.parametrize("outcome", [Outcome.DECLINED, Outcome.MALFORMED])
def test_no_answer_is_neither_right_nor_wrong(outcome):
    found = labels(OPEN, outcome)
    assert (found["answered"], found["correct"], found["wrong"]) == (False, False, False)


def test_declines_are_read_a_line_each(tmp_path):
    path = tmp_path / "declines"
    path.write_text("# by hand\n\n  ^Pas sûr \r\n # more\n^No$\n", encoding="utf-8")
    assert read_declines(path) == ("^Pas sûr", "^No$")
    assert Judge(read_declines(path)).outcome(OPEN, "Pas sûr du tout") is Outcome.DECLINED


def test_bad_declines_are_refused(tmp_path):
    with pytest.raises(CaseError, match="nowhere: No such file"):
        read_declines(tmp_path / "nowhere")
    (tmp_path / "empty").write_text("# nothing\n")
    with pytest.raises(CaseError, match="holds no pattern"):
        read_declines(tmp_path / "empty")
    (tmp_path / "latin").write_bytes(b"s\xfbr")
    with pytest.raises(CaseError, match="utf-8"):
        read_declines(tmp_path / "latin")
    with pytest.raises(CaseError, match=r"pattern '\(a': missing \)"):
        Judge(["(a"])


def test_the_common_declines_compile():
    assert Judge(COMMON_DECLINES).outcome(OPEN, "x") is Outcome.ANSWERED
