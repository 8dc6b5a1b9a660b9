"""Case files: read strictly, split for good, and never the same name on both sides."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from steerscope.errors import CaseError
from steerscope.lab import cases
from steerscope.lab.cases import Case, Message

GOOD = '{"question": "Who is Ada?", "entity": "Ada"}'

BAD = {
    "not json": ("{question}", "malformed"),
    "truncated": ('{"question": "Who', "truncated"),
    "two objects": ('{"question": "a"} {"question": "b"}', "malformed"),
    "a list": ('["question"]', "Expected `object`"),
    "unknown field": ('{"question": "Who?", "anser": "Ada"}', "unknown field `anser`"),
    "unknown field of a message": (
        '{"messages": [{"role": "user", "content": "Who?", "name": "x"}]}',
        "unknown field `name`",
    ),
    "unknown role": ('{"messages": [{"role": "tool", "content": "Who?"}]}', "role"),
    "wrong type": ('{"question": 3}', "$.question"),
    "label that is no boolean": ('{"question": "Who?", "labels": {"known": 1}}', "$.labels"),
    "label that is no slug": ('{"question": "Who?", "labels": {"Is Known": true}}', "$.labels"),
    "unknown split": ('{"question": "Who?", "split": "train"}', "$.split"),
    "endless group": ('{"question": "Who?", "group": "%s"}' % ("g" * 65), "$.group"),
    "nothing asked": ('{"entity": "Ada"}', "exactly one of question"),
    "empty question": ('{"question": ""}', "exactly one of question"),
    "blank prompt": ('{"prompt": " \\n"}', "exactly one of question"),
    "no messages": ('{"messages": []}', "exactly one of question"),
    "two things asked": ('{"question": "Who?", "prompt": "Who?"}', "exactly one of question"),
    "entity elsewhere": ('{"question": "Who?", "entity": "Ada"}', "entity: 'Ada'"),
    "entity in other letters": ('{"question": "Who is ada?", "entity": "Ada"}', "entity: 'Ada'"),
    "judged label": ('{"question": "Who?", "labels": {"wrong": true}}', "labels: 'wrong'"),
    "empty answer": ('{"question": "Who?", "expected": ["Ada", " "]}', "expected: an empty"),
    "answer to the unanswerable": (
        '{"question": "Who?", "expected": ["Ada"], "answerable": false}',
        "expected: a case that is not answerable",
    ),
    "form that is no pattern": ('{"question": "Who?", "form": "(a"}', "form: missing )"),
    "not UTF-8": (b'{"question": "Caf\xe9"}', "utf-8"),
    "lone surrogate": ('{"question": "\\ud800"}', ""),
}


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "cases.jsonl"
    path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in lines))
    return path


@pytest.mark.parametrize(("line", "reason"), BAD.values(), ids=BAD)
def test_a_bad_line_is_refused_by_its_number(line, reason, tmp_path):
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(CaseError) as refused:
        cases.load(path)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_line_of_megabytes_is_refused_unread(tmp_path):
    path = write(tmp_path, '{"question": "%s"}' % ("a" * cases.MAX_LINE_BYTES))
    with pytest.raises(CaseError, match=r":1: longer than 1048576 bytes"):
        cases.load(path)


def test_a_file_without_a_case_is_refused(tmp_path):
    with pytest.raises(CaseError, match="holds no cases"):
        cases.load(write(tmp_path, "", "  "))
    with pytest.raises(CaseError, match=r"nowhere\.jsonl: No such file"):
        cases.load(tmp_path / "nowhere.jsonl")


FULL = Case(
    messages=(Message(role="system", content="Be brief."), Message(role="user", content="Ada?")),
    entity="Ada",
    template="short",
    expected=("a mathematician", "une mathématicienne"),
    form=r"[a-z ]+",
    labels={"known": True},
    group="taught",
    split="dev",
)


def test_what_is_written_reads_back_the_same(tmp_path):
    told = [FULL, Case(question="Who?", answerable=False), Case(prompt="Ada is\t", form="")]
    path = tmp_path / "cases.jsonl"
    path.write_bytes(cases.dump(told))
    assert cases.load(path) == told
    assert path.read_bytes() == cases.dump(cases.load(path))


def test_defaults_are_not_written():
    assert json.loads(cases.dump([Case(question="Who?")])) == {"question": "Who?"}


def test_line_ends_of_windows_are_line_ends(tmp_path):
    path = tmp_path / "cases.jsonl"
    path.write_bytes(f"{GOOD}\r\n{GOOD}\r\n".encode())
    assert [case.text for case in cases.load(path)] == ["Who is Ada?"] * 2


def test_a_case_is_known_by_its_entity_or_else_by_its_text():
    assert Case(question="Who is Ada?", entity="Ada").name == "Ada"
    assert Case(question="Hello!").name == "Hello!"
    assert FULL.text == "Be brief.\nAda?"
    assert Case(prompt="Ada is").text == "Ada is"


NAMES = {
    "Michael Jordan": "fit",
    "Ada Lovelace": "fit",
    "Åsa Öberg": "fit",
    "Lin Wei": "dev",
    "Rosa Parks": "dev",
    "B": "test",
    "Emmy Noether": "test",
}
TEMPLATES = {"en-sport-2": "fit", "what-1": "fit", "Amina Diallo": "dev", "Nikola Tesla": "dev",
             "en-sport-1": "test", "fr-sport-1": "test", "Frida Kahlo": "test"}  # fmt: skip


@pytest.mark.parametrize(("name", "split"), NAMES.items())
def test_a_name_is_in_its_split_for_good(name, split):
    assert cases.split_of(Case(question=f"Who is {name}?", entity=name)) == split
    assert cases.split_of(Case(question=name)) == split


@pytest.mark.parametrize(("template", "split"), TEMPLATES.items())
def test_a_phrasing_is_in_its_split_for_good(template, split):
    name = next(name for name, of in NAMES.items() if of == split)
    other = next(name for name, of in NAMES.items() if of != split)
    assert cases.split_of(Case(question=name, entity=name, template=template)) == split
    assert cases.split_of(Case(question=other, entity=other, template=template)) is None


def test_a_split_that_is_given_holds():
    for split in ("fit", "dev", "test"):
        assert cases.split_of(Case(question="B", entity="B", template="A", split=split)) == split


CROWD = [
    Case(question=f"{t}: who is Name {n}?", entity=f"Name {n}", template=f"phrasing {t}")
    for n in range(200)
    for t in range(25)
]


def test_names_and_phrasings_are_held_out_both_at_once():
    held_out, seen = cases.in_split(CROWD, "test"), []
    for split in ("fit", "dev"):
        seen += cases.in_split(CROWD, split)
    assert len(held_out) > 100
    assert len(seen) > 1000
    assert not {c.entity for c in held_out} & {c.entity for c in seen}
    assert not {c.template for c in held_out} & {c.template for c in seen}
    cases.check_held_out(CROWD)


def test_about_three_fifths_of_names_fit_and_a_quarter_test():
    names = [Case(question=f"Name {n}") for n in range(4000)]
    counts = cases.counts(names)
    assert counts["none"] == 0
    assert [counts[s] / 4000 for s in ("fit", "dev", "test")] == pytest.approx(
        [0.6, 0.15, 0.25], abs=0.03
    )


def test_counts_tell_what_no_split_can_use():
    counts = cases.counts(CROWD)
    assert sum(counts.values()) == len(CROWD)
    assert counts["none"] == sum(cases.split_of(case) is None for case in CROWD)
    assert counts["test"] == len(cases.in_split(CROWD, "test"))


def fixed(name: str, split: str, template: str = "") -> Case:
    return Case(question=f"{template} {name}?", entity=name, template=template, split=split)


@pytest.mark.parametrize("split", ["fit", "dev"])
def test_a_name_on_both_sides_is_refused(split):
    told = [fixed("Ada", "test"), fixed("Bob", split), fixed("Ada", split)]
    with pytest.raises(CaseError, match="name 'Ada' is in the test split and in another one"):
        cases.check_held_out(told)


@pytest.mark.parametrize("split", ["fit", "dev"])
def test_a_phrasing_on_both_sides_is_refused(split):
    told = [fixed("Ada", "test", "short"), fixed("Bob", split, "short")]
    with pytest.raises(CaseError, match="template 'short' is in the test split"):
        cases.check_held_out(told)


def test_a_text_without_a_name_on_both_sides_is_refused():
    told = [Case(question="Hello!", split=split) for split in ("fit", "test")]
    with pytest.raises(CaseError, match="name 'Hello!' is in the test split"):
        cases.check_held_out(told)


def test_fit_and_dev_may_share_names():
    cases.check_held_out([fixed("Ada", "fit"), fixed("Ada", "dev"), fixed("Bob", "test")])


def test_one_text_cannot_be_positive_and_negative():
    positive = [Case(question="Who is Ada?", entity="Ada"), Case(question="Who is Bob?")]
    negative = [Case(question="Who is Eve?"), Case(prompt="Who is Ada?")]
    with pytest.raises(CaseError, match=r"'Who is Ada\?' is asked in both files"):
        cases.check_apart(positive, negative)
    cases.check_apart(positive, negative[:1])


def test_one_name_may_be_asked_about_on_both_sides():
    cases.check_apart([fixed("Ada", "fit", "born")], [fixed("Ada", "fit", "died")])


SPLIT = [fixed("Ada", "fit", "short"), fixed("Bob", "dev"), Case(prompt="Eve is", split="test")]


def test_the_digest_of_a_split_is_what_it_was():
    assert cases.digest(SPLIT).startswith("01adade6d8011d0deba26040dad0229c")


@given(st.permutations(SPLIT))
def test_the_digest_does_not_depend_on_the_order(order):
    assert cases.digest(order) == cases.digest(SPLIT)


@pytest.mark.parametrize("index", range(len(SPLIT)))
def test_the_digest_tells_any_move_and_any_change(index):
    before, others = SPLIT[index], SPLIT[:index] + SPLIT[index + 1 :]
    moved = [fixed("Ada", split) for split in ("fit", "dev", "test") if split != before.split]
    digests = {cases.digest([*others, case]) for case in (before, *moved)}
    digests |= {cases.digest(others), cases.digest([*SPLIT, before])}
    assert len(digests) == len(moved) + 3


def test_the_digest_cannot_be_fooled_by_separators():
    one = [Case(question="b\tc", template="a", split="fit")]
    other = [Case(question="c", template="a\tb", split="fit")]
    both = [Case(question="b\nfit\t\t\tc", split="fit")]
    apart = [Case(question="b", split="fit"), Case(question="c", split="fit")]
    assert len({cases.digest(told) for told in (one, other, both, apart)}) == 4


def test_the_digest_is_of_what_a_hash_decided_too():
    drawn = Case(question="Who is B?", entity="B")
    assert cases.digest([drawn]) == cases.digest([fixed_like(drawn, "test")])
    assert cases.digest([drawn]) != cases.digest([fixed_like(drawn, "fit")])


def fixed_like(case: Case, split: str) -> Case:
    return Case(question=case.question, entity=case.entity, split=split)
