"""The sheet: what each case said and scored, and which cases a target is about."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from hub_world import frame, start, write_catalog
from lab_world import KEY, WIDTH, feature, vectors
from lab_world import write as write_small
from steerscope.catalog import store
from steerscope.catalog.model import Activation, Site, Target
from steerscope.catalog.store import SiteKey
from steerscope.lab import sheet
from steerscope.lab.bench import Answer
from steerscope.lab.capture import captured, parse_site, write_capture_catalog
from steerscope.lab.cases import Case, Message
from steerscope.lab.judging import Judge, Outcome
from steerscope.lab.sheet import Row, applying, certainty
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.frames import SiteActivations
from steerscope.telemetry.requests import Limits, RequestLedger
from steerscope.telemetry.signals import evaluate, sigmoid

NAN = float("nan")
CASE = Case(question="Who is Ada?", entity="Ada", expected=("a poet",), labels={"known": True})


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return store.load(write_catalog(tmp_path_factory.mktemp("sheet") / "catalog"))


def answered(catalog, acts, num_prompt_tokens=3, case=CASE, text="a poet", logprobs=(-0.5, -2.0)):
    """An answer whose track went through the ledger and was scored as the hub scores it."""
    ledger = RequestLedger(
        Columns(catalog),
        Limits(10, 60.0, 4096),
        lambda track: tuple(evaluate(signal, track) for signal in catalog.signals),
    )
    told = (start("a", num_prompt_tokens),)
    ledger.feed(frame(catalog, ("a", 0, len(acts)), acts=acts, started=told), 1.0)
    ledger.feed(frame(catalog, finished=("a",)), 2.0)
    (track,) = ledger.report("a")
    assert track.finished
    return Answer(case, (1, 2, 3), (4, 5), text, np.array(logprobs), 0.7, track)


def row_of(catalog, answer):
    return sheet._row(answer, catalog.signals, Judge())


ACTS = [[2.0, 1.0, 0.0], [4.0, 2.0, 0.0], [3.0, 3.0, 0.0], [5.0, 0.0, 1.0]]


def test_a_row_holds_what_serving_scored(catalog):
    row = row_of(catalog, answered(catalog, ACTS))
    assert row.z["at_question"] == pytest.approx(3.0 - 2.0)
    assert row.z["whole_prompt"] == pytest.approx(2.0 - 2.0)
    assert row.z["in_answer"] == pytest.approx(5.0 - 2.0)
    assert row.z["about_entity"] == pytest.approx(2.0 * 4.0 - 0.5 * 1.0 - 2.0)
    assert row.probability["at_question"] == pytest.approx(sigmoid(1.0))
    assert row.probability["about_entity"] == pytest.approx(sigmoid(0.5 * 5.5 + 0.25))
    assert set(row.z) == set(row.probability) == {s.name for s in catalog.signals}


def test_a_row_is_judged_and_labelled(catalog):
    row = row_of(catalog, answered(catalog, ACTS))
    assert (row.outcome, row.text) == (Outcome.CORRECT, "a poet")
    assert row.labels["known"]
    assert row.labels["correct"]
    assert not row.labels["declined"]


def test_a_signal_that_does_not_apply_is_no_number(catalog):
    nowhere = [[1.0, 0.0, 0.0]] * 4
    row = row_of(catalog, answered(catalog, nowhere))
    assert math.isnan(row.z["about_entity"])
    assert math.isnan(row.probability["about_entity"])
    assert not math.isnan(row.z["at_question"])


def test_baselines_are_confidences(catalog):
    row = row_of(catalog, answered(catalog, ACTS))
    assert row.baselines == {
        "mean_logprob": -1.25,
        "min_logprob": -2.0,
        "first_token_certainty": -0.7,
    }


def test_nothing_generated_is_no_confidence(catalog):
    row = row_of(catalog, answered(catalog, ACTS, logprobs=()))
    assert math.isnan(row.baselines["mean_logprob"])
    assert math.isnan(row.baselines["min_logprob"])


def row(name, labels, p=0.5, **baselines):
    case = Case(question=f"Who is {name}?", entity=name)
    return Row(case, "", Outcome.WRONG, labels, {"risk": p}, {"risk": p}, baselines)


ROWS = [
    row("Ada", {"answered": True, "wrong": True}, 0.9, mean_logprob=-3.0),
    row("Bob", {"answered": True, "wrong": False}, NAN, mean_logprob=-0.1),
    row("Cy", {"answered": False, "wrong": False}, 0.3, mean_logprob=NAN),
    row("Di", {"answered": True}, 0.2, mean_logprob=-1.0),
    row("Ada", {"answered": True, "wrong": False, "known": True}, 0.1, mean_logprob=-0.2),
]


@pytest.mark.parametrize(
    ("target", "names", "labels"),
    [
        (Target(label="wrong"), ["Ada", "Bob", "Cy", "Ada"], [True, False, False, False]),
        (Target(label="wrong", among="answered"), ["Ada", "Bob", "Ada"], [True, False, False]),
        (Target(label="wrong", among="known"), ["Ada"], [False]),
        (Target(label="known"), ["Ada"], [True]),
        (Target(label="never"), [], []),
        (Target(label="answered", among="never"), [], []),
    ],
)
def test_a_target_is_about_cases_that_have_its_label_and_are_among_those_it_says(
    target, names, labels
):
    scored = applying(ROWS, target)
    assert scored.names.tolist() == names
    assert scored.labels.tolist() == labels
    assert scored.labels.dtype == np.bool_
    assert len(scored.z("risk")) == len(scored.probability("risk")) == len(names)


def test_no_score_stays_no_score():
    scored = applying(ROWS, Target(label="wrong"))
    np.testing.assert_array_equal(scored.probability("risk"), [0.9, NAN, 0.3, 0.1])
    for label in ("wrong", "answered"):
        values = applying(ROWS, Target(label=label)).baseline("mean_logprob", Target(label=label))
        assert np.isnan(values).sum() == 1


@pytest.mark.parametrize("label", ["wrong", "declined", "malformed"])
def test_a_baseline_is_turned_where_doubt_predicts_the_label(label):
    rows = [row("Ada", {label: True}, sure=-3.0), row("Bob", {label: False}, sure=-0.1)]
    target = Target(label=label)
    np.testing.assert_array_equal(applying(rows, target).baseline("sure", target), [3.0, 0.1])


@pytest.mark.parametrize("label", ["known", "correct", "answered"])
def test_a_baseline_stays_as_it_is_where_confidence_predicts_the_label(label):
    rows = [row("Ada", {label: True}, sure=-0.1), row("Bob", {label: False}, sure=-3.0)]
    target = Target(label=label)
    np.testing.assert_array_equal(applying(rows, target).baseline("sure", target), [-0.1, -3.0])


@pytest.mark.parametrize(
    ("said", "sure"),
    [
        ("95%", 95.0),
        ("I am 90.", 90.0),
        ("About 99.5 percent", 99.5),
        ("0.95", 0.95),
        ("100", 100.0),
        ("0", 0.0),
        ("Since 1963: 80", 80.0),
        ("very sure", NAN),
        ("150%", NAN),
        ("", NAN),
    ],
)
def test_what_a_model_says_of_its_certainty_is_the_first_number(said, sure):
    assert certainty(said) == pytest.approx(sure, nan_ok=True)


def test_the_model_is_asked_back_in_the_same_conversation():
    before = (Message(role="system", content="Be brief."), Message(role="user", content="Ada?"))
    for case, turns in (
        (Case(messages=before), before),
        (Case(question="Ada?"), before[1:]),
    ):
        asked = sheet._follow_up(Row(case, "A poet.", Outcome.WRONG, {}, {}, {}, {}), "Sure?")
        assert asked.messages[:-2] == turns
        assert [(m.role, m.content) for m in asked.messages[-2:]] == [
            ("assistant", "A poet."),
            ("user", "Sure?"),
        ]


def test_a_bare_prompt_is_asked_back_without_a_chat():
    case = Case(prompt="Ada was ")
    asked = sheet._follow_up(Row(case, "a poet.", Outcome.WRONG, {}, {}, {}, {}), "Sure?")
    assert asked.messages is None
    assert asked.prompt == "Ada was a poet.\nSure?\n"


def test_the_sheet_is_written_a_line_a_case_with_null_for_no_score():
    lines = sheet.to_json(ROWS).splitlines()
    assert len(lines) == len(ROWS)
    told = json.loads(lines[1])
    assert told["text"] == "Who is Bob?"
    assert told["outcome"] == "wrong"
    assert told["probability"] == {"risk": None}


def test_a_capture_catalog_reads_every_coordinate_in_place(tmp_path):
    """Through columns and ledger, as a real run goes; the sites are named in another order."""
    later = SiteKey(2, Site.RESID_MID)
    base = write_small(
        tmp_path / "base", [feature("one", Activation.RELU)], {"one": vectors([0.0] * WIDTH, None)}
    )
    write_capture_catalog(tmp_path / "capture", base.document.model, [later, KEY])
    catalog = store.load(tmp_path / "capture")
    assert list(catalog.sites) == [KEY, later]
    streams = {
        key: np.random.default_rng(key.layer).standard_normal((5, WIDTH)).astype(np.float32)
        for key in (KEY, later)
    }
    sites = tuple(
        SiteActivations(str(key), WIDTH, (x @ _encoder(catalog, key)).tobytes())
        for key, x in streams.items()
    )
    ledger = RequestLedger(Columns(catalog), Limits(10, 60.0, 4096), lambda track: ())
    ledger.feed(frame(catalog, ("a", 0, 5), started=(start("a", 4),), sites=sites), 1.0)
    (track,) = ledger.report("a")
    found = captured(track, [later, KEY])
    for key, x in streams.items():
        np.testing.assert_array_equal(found[key], x)


def _encoder(catalog, key):
    return np.stack([catalog.vectors[f.name].W_enc for f in catalog.sites[key]], axis=1)


def test_a_site_is_named_by_place_and_layer():
    assert parse_site("resid_mid.12") == SiteKey(12, Site.RESID_MID)
    assert str(parse_site("mlp_in.0")) == "mlp_in.0"


@pytest.mark.parametrize("text", ["", "resid_post", "resid_post.", "resid_post.x", "resid_post.-1",
                                  "resid_post.1.5", "residual.3", "3.resid_post"])  # fmt: skip
def test_what_is_no_site_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a site; write resid_post\.12"):
        parse_site(text)
