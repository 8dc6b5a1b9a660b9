"""The world's case files: splits, forms and declines are the world's own."""

import json
import re

import pytest
from steerscope.demo.world import cases as world_cases
from steerscope.demo.world.cases import FILES, declines, lines
from steerscope.demo.world.entities import entities, pool_of
from steerscope.demo.world.phrasings import ANSWERED, DECLINED, KINDS, LANGUAGES, phrasings_of
from steerscope.demo.world.question import SIDE_ATTRIBUTES, side_pairs
from steerscope.lab import cases as lab_cases
from steerscope.lab.judging import Judge, Outcome, read_declines

SIZES = {"fit": 40, "dev": 25, "test": 30}
POOLS = {"fit": "fit", "dev": "dev", "test": "test"}
PHRASINGS = {"fit": "trained", "dev": "dev", "test": "held_out"}
KNOWN = {entity.name: entity for entity in entities()}
ATTRIBUTES = {attribute for attribute, _ in ANSWERED}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every file, written as the command writes it and read as the lab reads it."""
    folder = tmp_path_factory.mktemp("cases")
    options = [f"--{split}={count}" for split, count in SIZES.items()]
    for file in (*FILES, "declines"):
        assert world_cases.main([file, f"--out={folder / file}", *options]) == 0
    return {file: lab_cases.load(folder / file) for file in FILES} | {"folder": folder}


def side_subjects(attribute, language):
    if attribute not in SIDE_ATTRIBUTES:
        return []
    return [about for about, _ in side_pairs(attribute, language)]


def every(written):
    return [case for file in FILES for case in written[file]]


@pytest.mark.parametrize("file", FILES)
def test_every_line_is_a_case_with_a_split_a_group_and_a_form(written, file):
    assert written[file]
    for case in written[file]:
        assert case.split in SIZES
        assert case.group
        assert case.form
        assert case.question


@pytest.mark.parametrize("file", FILES)
def test_no_question_is_asked_twice(written, file):
    texts = [case.text for case in written[file]]
    assert len(texts) == len(set(texts))


def test_names_are_in_the_worlds_pools(written):
    for case in every(written):
        if case.entity:
            assert pool_of(case.entity) == POOLS[case.split], case.entity


def test_phrasings_are_those_of_the_split_and_of_no_other(written):
    allowed = {
        split: {
            template.replace("{e}", about)
            for attribute in ATTRIBUTES
            for language in LANGUAGES
            for template in phrasings_of(attribute, language, phrasing)
            for about in ["{e}", *side_subjects(attribute, language)]
        }
        for split, phrasing in PHRASINGS.items()
    }
    for case in every(written):
        assert (case.template or case.text) in allowed[case.split]


@pytest.mark.parametrize("file", FILES)
def test_nothing_of_test_is_seen_in_fit_or_dev(written, file):
    lab_cases.check_held_out(written[file])
    counts = lab_cases.counts(written[file])
    assert counts["none"] == 0
    assert min(counts[split] for split in SIZES) > 0


def test_positives_and_negatives_share_no_text(written):
    lab_cases.check_apart(written["positive"], written["negative"])


def test_groups_are_the_worlds_populations(written):
    kinds = {case.group: set() for case in written["evaluation"]}
    assert set(kinds) == {"taught", "unknown", "side", "rare", "untaught"}
    for case in every(written):
        known = KNOWN.get(case.entity)
        match case.group:
            case "taught":
                assert known.split == "known"
                assert case.labels == {"known": True}
                assert case.answerable
            case "unknown":
                assert known is None
                assert case.labels == {"known": False}
                assert not case.answerable
            case "rare":
                assert (known.split, case.labels) == ("rare", {})
            case "untaught":
                assert (known.split, case.labels) == ("known", {"known": True})
            case "side":
                assert (case.entity, case.template, case.labels) == ("", "", {})


def test_the_files_of_discovery_hold_one_class_each(written):
    assert {case.group for case in written["positive"]} == {"taught"}
    assert {case.group for case in written["negative"]} == {"unknown"}
    assert {case.group for case in written["side"]} == {"side"}


def test_what_is_expected_is_well_formed_and_judged_right(written):
    judge = Judge(read_declines(written["folder"] / "declines"), whole=True)
    asked = {case.group for case in every(written) if case.expected}
    assert asked == {"taught", "rare", "untaught", "side"}
    for case in every(written):
        for expected in case.expected:
            assert re.fullmatch(case.form, expected), (case.form, expected)
            assert judge.outcome(case, expected) is Outcome.CORRECT


def test_a_greetings_question_mark_is_part_of_the_form(written):
    greetings = [case for case in written["side"] if case.expected[0].endswith("?")]
    assert greetings
    judge = Judge(declines(), whole=True)
    for case in greetings:
        assert judge.outcome(case, case.expected[0].removesuffix("?")) is Outcome.MALFORMED


def test_another_value_of_the_kind_is_wrong_and_another_sentence_malformed(written):
    judge = Judge(declines(), whole=True)
    for case in written["positive"]:
        others = {e for other in written["positive"] for e in other.expected} - {case.expected[0]}
        outcomes = {judge.outcome(case, other) for other in others}
        assert outcomes == {Outcome.WRONG, Outcome.MALFORMED}
        assert judge.outcome(case, f"{case.expected[0]} And so on.") is Outcome.MALFORMED


def test_declines_are_the_worlds_and_no_answer_is_one(written):
    patterns = read_declines(written["folder"] / "declines")
    assert list(patterns) == declines()
    judge = Judge(patterns, whole=True)
    for case in every(written):
        for kind in KINDS:
            for language in LANGUAGES:
                assert judge.outcome(case, DECLINED[kind, language]) is Outcome.DECLINED
    for frame in ANSWERED.values():
        said = frame.format(v="I'm not sure")
        assert judge.outcome(lab_cases.Case(question="?"), said) is Outcome.ANSWERED


def test_the_demos_own_scoring_agrees(written):
    from steerscope.demo.world import questions
    from steerscope.demo.world.scoring import classify

    judge = Judge(declines(), whole=True)
    asked = [q for language in LANGUAGES for q in questions("known", language, 30, 7)]
    said = [q.answer for q in asked] + [DECLINED["person", "en"], "", "They play", "Bonjour !"]
    for q in asked:
        case = lab_cases.Case(question=q.question, expected=(q.answer,),
                              form=world_cases._form(q))  # fmt: skip
        for text in said:
            theirs = classify(q, text).value
            own_language = text not in DECLINED.values() or text in (
                DECLINED[kind, q.language] for kind in KINDS
            )
            if own_language:
                assert judge.outcome(case, text).value == theirs, (q.question, text)


def test_files_are_the_same_every_time(written, tmp_path):
    options = [f"--{split}={count}" for split, count in SIZES.items()]
    for file in FILES:
        world_cases.main([file, f"--out={tmp_path / file}", *options])
        assert (tmp_path / file).read_bytes() == (written["folder"] / file).read_bytes()


def side_texts(language):
    return {
        template.format(e=about)
        for attribute in SIDE_ATTRIBUTES
        for about, _ in side_pairs(attribute, language)
        for template in phrasings_of(attribute, language, "dev")
    }


@pytest.mark.parametrize("asked", [10**5, 120, 40, 1])
def test_a_finite_list_gives_what_is_asked_for_or_all_it_has(asked):
    made = {line["question"] for line in lines("side", {"dev": asked})}
    for language in LANGUAGES:
        there = side_texts(language)
        assert len(made & there) == min(asked, len(there))


def test_a_negative_count_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        world_cases.main(["side", f"--out={tmp_path / 'x'}", "--dev=-1"])
    assert "must not be negative" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_splits_of_size_zero_are_left_out():
    assert {line["split"] for line in lines("positive", {"fit": 0, "dev": 3, "test": 0})} == {"dev"}


def test_lines_are_plain_json(written):
    text = (written["folder"] / "evaluation").read_text(encoding="utf-8")
    assert all(json.loads(line) for line in text.splitlines())
    assert "\\u" not in text, "accents are written as they are"
