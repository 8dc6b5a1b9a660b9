import sys
from pathlib import Path

import numpy as np
import pytest
from steerscope.catalog import store
from steerscope.catalog.model import Label, Reduction, Signal, Term
from steerscope.telemetry.columns import Columns
from steerscope.telemetry.requests import Limits, RequestLedger
from steerscope.telemetry.signals import UNOBSERVED_LABEL, evaluate, label_of, sigmoid

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from hub_world import frame, start, write_catalog

pytestmark = pytest.mark.timeout(30)

PROMPT = [3.0, 1.0, 2.0]
ANSWER = [5.0, 9.0, 4.0, 6.0, 7.0, 6.5, 8.0, 4.5, 0.5, 11.0]

EXPECTED = {
    Reduction.LAST_PROMPT_TOKEN: 2.0,
    Reduction.MAX_PROMPT: 3.0,
    Reduction.MEAN_PROMPT: 2.0,
    Reduction.MAX_GENERATION: 11.0,
    Reduction.MIN_GENERATION: 0.5,
    Reduction.MEAN_GENERATION: 6.15,
    Reduction.MAX_FIRST_GENERATED: 9.0,
    Reduction.MIN_FIRST_GENERATED: 4.0,
}


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return store.load(write_catalog(tmp_path_factory.mktemp("signals") / "catalog"))


def observed(catalog, values, num_prompt_tokens, *, limit=4096, first_position=0, skip=()):
    """A track fed one token at a time, without those to skip."""
    ledger = RequestLedger(Columns(catalog), Limits(10, 60.0, limit), lambda track: ())
    told = (start("a", num_prompt_tokens, first_position=first_position),)
    for position in range(first_position, len(values)):
        if position not in skip:
            acts = [[values[position], 0.0, 0.0]]
            ledger.feed(frame(catalog, ("a", position, 1), acts=acts, started=told), 1.0)
            told = ()
    return ledger.report("a")[0]


@pytest.mark.parametrize("reduction", Reduction)
@pytest.mark.parametrize("limit", [1, 3, 5, 12, 4096])
def test_a_reduction_is_exact_whatever_the_limit_of_the_report(catalog, reduction, limit):
    track = observed(catalog, PROMPT + ANSWER, 3, limit=limit)
    assert track.reduce("known", reduction) == pytest.approx(EXPECTED[reduction])


@pytest.mark.parametrize("limit", [1, 4096])
def test_recomputation_does_not_change_a_reduction(catalog, limit):
    ledger = RequestLedger(Columns(catalog), Limits(10, 60.0, limit), lambda track: ())
    values = np.array(PROMPT + ANSWER, np.float32)[:, None].repeat(3, axis=1)
    for length in (6, len(values)):
        ledger.feed(
            frame(catalog, ("a", 0, length), acts=values[:length], started=(start("a", 3),)), 1.0
        )
    (track,) = ledger.report("a")
    for reduction, expected in EXPECTED.items():
        assert track.reduce("known", reduction) == pytest.approx(expected)


def test_a_prefix_hit_leaves_the_last_prompt_token_but_not_the_whole_prompt(catalog):
    track = observed(catalog, PROMPT + ANSWER, 3, first_position=2)
    assert track.reduce("known", Reduction.LAST_PROMPT_TOKEN) == 2.0
    assert track.reduce("known", Reduction.MEAN_PROMPT) is None
    assert track.reduce("known", Reduction.MAX_GENERATION) == 11.0


def test_a_lost_token_takes_only_the_reductions_that_need_it(catalog):
    track = observed(catalog, PROMPT + ANSWER, 3, skip={11})
    assert track.reduce("known", Reduction.MAX_PROMPT) == 3.0
    assert track.reduce("known", Reduction.MAX_FIRST_GENERATED) == 9.0
    assert track.reduce("known", Reduction.MIN_GENERATION) is None


def test_without_generated_tokens_there_is_nothing_to_say_about_the_answer(catalog):
    track = observed(catalog, PROMPT, 3)
    for reduction in Reduction:
        assert (track.reduce("known", reduction) is None) == ("generat" in reduction)


def test_a_request_cut_off_in_its_prompt_has_no_prompt_reduction(catalog):
    track = observed(catalog, PROMPT, 5)
    assert track.reduce("known", Reduction.MAX_PROMPT) is None
    assert track.reduce("known", Reduction.LAST_PROMPT_TOKEN) is None


def signal(*weights, bias=0.0):
    terms = (("known", Reduction.MAX_PROMPT), ("known", Reduction.MAX_GENERATION))
    return Signal(
        name="s",
        terms=tuple(
            Term(feature=f, reduce=r, weight=w) for (f, r), w in zip(terms, weights, strict=False)
        ),
        bias=bias,
        labels=(Label(label="low", below=0.35), Label(label="mid", below=0.7), Label(label="high")),
    )


def test_a_score_is_the_sigmoid_of_the_weighted_sum(catalog):
    track = observed(catalog, PROMPT + ANSWER, 3)
    score = evaluate(signal(0.5, -0.25, bias=0.25), track)
    assert score.score == pytest.approx(1 / (1 + np.exp(1.0)))
    assert score.label == "low"


def test_one_unobserved_term_leaves_the_whole_signal_without_a_score(catalog):
    score = evaluate(signal(1.0, 1.0), observed(catalog, PROMPT, 3))
    assert (score.score, score.label) == (None, UNOBSERVED_LABEL)


def test_extreme_logits_neither_overflow_nor_leave_the_unit_interval():
    assert (sigmoid(-1e9), sigmoid(0.0), sigmoid(1e9)) == (0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("score", "label"), [(0.0, "low"), (0.349, "low"), (0.35, "mid"), (0.7, "high"), (1.0, "high")]
)
def test_a_band_ends_before_its_bound(score, label):
    assert label_of(signal(1.0), score) == label
