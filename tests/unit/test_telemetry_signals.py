import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from steerscope.catalog import store
from steerscope.catalog.model import (
    Calibration,
    Isotonic,
    Label,
    Platt,
    Reduction,
    Signal,
    Span,
    Term,
)
from steerscope.catalog.signals import RESERVED_LABELS
from steerscope.telemetry.reductions import Missing
from steerscope.telemetry.signals import calibrated, evaluate, label_of, sigmoid, weighted_sum

sys.path.insert(0, str(Path(__file__).parents[1] / "hub"))

from hub_world import observed, write_catalog

pytestmark = pytest.mark.timeout(60)

PROMPT = [3.0, 1.0, 2.0]
ANSWER = [5.0, 9.0, 4.0, 6.0, 7.0, 6.5, 8.0, 4.5, 0.5, 11.0]

IN_PROMPT = Term(feature="known", reduce=Reduction.MAX_PROMPT, weight=0.5)
IN_ANSWER = Term(feature="known", reduce=Reduction.MAX_GENERATION, weight=-0.25)
AT_ENTITY = Term(
    feature="known",
    reduce=Reduction.MAX_ENTITY_SPAN,
    weight=1.0,
    span=Span(feature="known", above=100.0),
)

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@pytest.fixture(scope="module")
def track_of(tmp_path_factory):
    """A track by the values of ``known``."""
    catalog = store.load(write_catalog(tmp_path_factory.mktemp("signals") / "catalog"))

    def make(values, num_prompt_tokens=3):
        return observed(catalog, [[value, 0.0, 0.0] for value in values], num_prompt_tokens)

    return make


def signal(*terms, bias=0.0, calibration_map=None):
    calibration = None
    if calibration_map is not None:
        calibration = Calibration(map=calibration_map, num_cases=10, split="dev")
    return Signal(
        name="s",
        terms=terms,
        bias=bias,
        labels=(Label(label="low", below=0.35), Label(label="mid", below=0.7), Label(label="high")),
        calibration=calibration,
    )


def test_a_score_is_the_sigmoid_of_the_weighted_sum(track_of):
    made = signal(IN_PROMPT, IN_ANSWER, bias=0.25)
    assert weighted_sum(made, track_of(PROMPT + ANSWER)) == -1.0
    score = evaluate(made, track_of(PROMPT + ANSWER))
    assert score.score == pytest.approx(1 / (1 + np.exp(1.0)))
    assert score.label == "low"


def test_a_calibration_takes_the_place_of_the_sigmoid_and_sets_the_band(track_of):
    map_ = Isotonic(z=(-2.0, 0.0), p=(0.2, 0.8))
    score = evaluate(
        signal(IN_PROMPT, IN_ANSWER, bias=0.25, calibration_map=map_), track_of(PROMPT + ANSWER)
    )
    assert (score.score, score.label) == (pytest.approx(0.5), "mid")


def test_one_unobserved_term_leaves_the_whole_signal_without_a_score(track_of):
    score = evaluate(signal(IN_PROMPT, IN_ANSWER), track_of(PROMPT))
    assert (score.score, score.label) == (None, "unobserved")


@pytest.mark.parametrize("terms", [(AT_ENTITY, IN_ANSWER), (IN_ANSWER, AT_ENTITY)])
def test_a_signal_that_does_not_apply_says_so_whatever_else_was_not_observed(terms, track_of):
    score = evaluate(signal(*terms), track_of(PROMPT))
    assert (score.score, score.label) == (None, "not_applicable")


def test_a_prompt_that_was_not_seen_whole_may_hold_the_entity(track_of):
    score = evaluate(signal(AT_ENTITY), track_of(PROMPT, num_prompt_tokens=4))
    assert (score.score, score.label) == (None, "unobserved")


def test_no_band_can_be_called_what_a_missing_score_is_called():
    assert set(Missing) == RESERVED_LABELS


def test_extreme_logits_neither_overflow_nor_leave_the_unit_interval():
    assert (sigmoid(-1e9), sigmoid(0.0), sigmoid(1e9)) == (0.0, 0.5, 1.0)
    assert sigmoid(-40.0) == pytest.approx(math.exp(-40.0), abs=0.0)


@pytest.mark.parametrize("z", [-1.7e308, -3.0, 0.0, 2.5, 1.7e308])
def test_without_a_map_the_probability_is_the_sigmoid(z):
    assert calibrated(None, z) == sigmoid(z)


def test_platt_scales_and_shifts_before_the_sigmoid():
    assert calibrated(Platt(scale=2.0, offset=-1.0), 0.75) == pytest.approx(1 / (1 + np.exp(-0.5)))
    assert calibrated(Platt(scale=0.0, offset=0.0), 1e308) == 0.5


@given(scale=FINITE.map(abs), offset=FINITE, z=FINITE)
def test_platt_never_overflows(scale, offset, z):
    assert 0.0 <= calibrated(Platt(scale=scale, offset=offset), z) <= 1.0


CURVE = Isotonic(z=(-1.0, 0.0, 3.0), p=(0.1, 0.4, 0.4))


@pytest.mark.parametrize(
    ("z", "p"),
    [(-9e300, 0.1), (-1.0, 0.1), (-0.5, 0.25), (0.0, 0.4), (1.0, 0.4), (3.0, 0.4), (9e300, 0.4)],
)
def test_isotonic_is_linear_between_knots_and_constant_beyond(z, p):
    assert calibrated(CURVE, z) == pytest.approx(p)


def test_one_knot_is_a_constant():
    assert [calibrated(Isotonic(z=(1.0,), p=(0.3,)), z) for z in (0.0, 1.0, 2.0)] == [0.3] * 3


@st.composite
def curves(draw, numbers):
    z = sorted(draw(st.sets(numbers, min_size=1, max_size=6)))
    shares = st.lists(st.floats(0.0, 1.0), min_size=len(z), max_size=len(z))
    return Isotonic(z=tuple(z), p=tuple(sorted(draw(shares))))


@given(curve=curves(st.floats(-100, 100)), z=st.floats(-200, 200))
def test_isotonic_agrees_with_numpy(curve, z):
    assert calibrated(curve, z) == pytest.approx(np.interp(z, curve.z, curve.p), abs=1e-9)


@given(curve=curves(FINITE), a=FINITE, b=FINITE)
@example(curve=Isotonic(z=(-1.7e308, 1.7e308), p=(0.0, 1.0)), a=0.0, b=1e308)
@example(curve=Isotonic(z=(0.0, 5e-324), p=(0.0, 1.0)), a=0.0, b=5e-324)
def test_isotonic_never_descends_nor_leaves_its_range(curve, a, b):
    low, high = calibrated(curve, min(a, b)), calibrated(curve, max(a, b))
    assert curve.p[0] <= low <= high <= curve.p[-1]


@pytest.mark.parametrize(
    ("score", "label"), [(0.0, "low"), (0.349, "low"), (0.35, "mid"), (0.7, "high"), (1.0, "high")]
)
def test_a_band_ends_before_its_bound(score, label):
    assert label_of(signal(IN_PROMPT), score) == label
