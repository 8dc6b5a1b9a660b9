import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from steerscope.catalog.model import Baseline
from steerscope.lab.drift import JUST_ABOVE_ZERO, drift
from steerscope.telemetry.windows import MIN_TOKENS, NUM_PANES, DriftWindow, _as_float32

pytestmark = pytest.mark.timeout(30)

SECONDS = 60.0
A_PANE = SECONDS / NUM_PANES
BASELINES = (
    Baseline(
        feature="sparse",
        phase="prompt",
        edges=(JUST_ABOVE_ZERO, 1.0, 2.0),
        shares=(0.7, 0.1, 0.1, 0.1),
        num_tokens=500,
    ),
    Baseline(
        feature="dense", phase="prompt", edges=(-1.0, 1.0), shares=(0.3, 0.4, 0.3), num_tokens=500
    ),
    Baseline(feature="sparse", phase="generation", edges=(0.5,), shares=(0.5, 0.5), num_tokens=500),
)


class Columns:
    """Two features of two sites, and one without a baseline."""

    def __init__(self):
        self.index = {"sparse": 0, "other": 1, "dense": 2}


@pytest.fixture
def window():
    return DriftWindow(BASELINES, Columns(), SECONDS)


def fill(window, acts, now=1000.0, phase=0):
    window.add(phase, slice(0, 3), np.asarray(acts, np.float32), now)


def measured(window, now=1000.0):
    return {(each.feature, each.phase): each for each in window.measure(now)}


def rows(sparse, dense=0.0, count=MIN_TOKENS):
    return np.tile(np.array([sparse, 9.0, dense], np.float32), (count, 1))


def test_it_measures_what_the_lab_measures(window):
    acts = np.random.default_rng(3).normal(0.5, 1.5, (4000, 3)).astype(np.float32)
    acts[:, 0] = np.maximum(acts[:, 0], 0.0)
    for part in np.array_split(acts, 17):
        fill(window, part)
    found = measured(window)
    for baseline, column in ((BASELINES[0], 0), (BASELINES[1], 2)):
        of_lab = drift(baseline, acts[:, column])
        here = found[baseline.feature, "prompt"]
        assert here.num_tokens == of_lab.num_tokens == 4000
        assert here.psi == pytest.approx(of_lab.psi)
        assert here.ks == pytest.approx(of_lab.ks)


@given(value=st.floats(-4, 4, width=32), phase=st.sampled_from([0, 1]))
def test_a_value_at_or_above_an_edge_is_in_the_bin_over_it(value, phase):
    baselines = [
        msgspec.structs.replace(b, phase=("prompt", "generation")[phase]) for b in BASELINES
    ]
    window = DriftWindow(baselines[:2], Columns(), SECONDS)
    fill(window, rows(value, value), phase=phase)
    for baseline, found in zip(baselines, window.measure(1000.0), strict=False):
        of_lab = drift(baseline, np.full(MIN_TOKENS, value, np.float32))
        assert (found.psi, found.ks) == (pytest.approx(of_lab.psi), pytest.approx(of_lab.ks))


def test_phases_are_apart(window):
    fill(window, rows(3.0))
    fill(window, rows(0.0), phase=1)
    found = measured(window)
    assert found["sparse", "prompt"].ks == pytest.approx(0.9)
    assert found["sparse", "generation"].ks == pytest.approx(0.5)
    assert ("dense", "generation") not in found


def test_a_block_of_some_sites_counts_only_theirs(window):
    window.add(0, slice(2, 3), np.zeros((MIN_TOKENS, 1), np.float32), 1000.0)
    found = measured(window)
    assert found["dense", "prompt"].num_tokens == MIN_TOKENS
    assert found["sparse", "prompt"].num_tokens == 0


def test_too_few_tokens_say_nothing(window):
    fill(window, rows(3.0, count=MIN_TOKENS - 1))
    found = measured(window)["sparse", "prompt"]
    assert (found.num_tokens, found.psi, found.ks) == (MIN_TOKENS - 1, None, None)
    fill(window, rows(3.0, count=1))
    assert measured(window)["sparse", "prompt"].psi is not None


def test_what_is_older_than_the_window_is_forgotten(window):
    fill(window, rows(3.0), now=1000.0)
    fill(window, rows(0.0), now=1000.0 + SECONDS / 2)
    both = measured(window, 1000.0 + SECONDS - A_PANE)["sparse", "prompt"]
    assert both.num_tokens == 2 * MIN_TOKENS
    newest = measured(window, 1000.0 + SECONDS + A_PANE)["sparse", "prompt"]
    assert (newest.num_tokens, newest.ks) == (MIN_TOKENS, pytest.approx(0.3))
    assert measured(window, 1000.0 + 50 * SECONDS)["sparse", "prompt"].num_tokens == 0


def test_a_long_pause_forgets_everything_once(window):
    fill(window, rows(3.0), now=1000.0)
    fill(window, rows(0.0), now=1000.0 + 1e6)
    assert measured(window, 1000.0 + 1e6)["sparse", "prompt"].num_tokens == MIN_TOKENS


def test_a_catalog_without_baselines_has_no_drift():
    window = DriftWindow((), Columns(), SECONDS)
    fill(window, rows(3.0))
    assert list(window.measure(1000.0)) == []


@given(st.floats(allow_nan=False), st.floats(allow_nan=False, allow_infinity=False, width=32))
def test_an_edge_is_reached_by_the_same_activations_in_float32(edge, value):
    (rounded,) = _as_float32(np.array([edge]))
    assert (np.float32(value) >= rounded) == (value >= edge)
    assert rounded.dtype == np.float32
