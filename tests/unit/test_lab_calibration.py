"""Maps that serving evaluates, and thresholds that keep their word."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")

from scipy.special import ndtr
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import log_loss
from steerscope.catalog.model import Isotonic, Platt
from steerscope.errors import LabError
from steerscope.lab.calibration import (
    MAX_KNOTS,
    TooFewNegativesError,
    apply,
    conformal_threshold,
    fit,
    fit_isotonic,
    fit_platt,
)
from steerscope.telemetry.signals import calibrated


def logistic(z: Any, scale: float = 1.0, offset: float = 0.0) -> Any:
    return 1 / (1 + np.exp(-(scale * z + offset)))


def drawn(num: int = 4000, seed: int = 0) -> tuple[Any, Any, Any]:
    """Cases whose true probability is sigmoid(2 z - 1)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 1.5, num)
    return z, rng.random(num) < logistic(z, 2, -1), np.arange(num).astype(str)


def test_platt_finds_the_slope_and_offset_that_made_the_labels() -> None:
    z, labels, _ = drawn(40_000)
    found = fit_platt(z, labels)
    assert (found.scale, found.offset) == pytest.approx((2, -1), abs=0.1)


def test_platt_does_not_depend_on_the_scale_of_z() -> None:
    z, labels, _ = drawn()
    plain, scaled = fit_platt(z, labels), fit_platt(z * 1e6 + 3e7, labels)
    assert apply(scaled, z * 1e6 + 3e7) == pytest.approx(apply(plain, z), abs=1e-6)


def test_platt_is_finite_where_z_separates_the_classes() -> None:
    """The smoothed labels of 3 and 5 cases are 4/5 and 1/7: nothing is certain."""
    z, labels = np.array([1.0] * 3 + [-1.0] * 5), np.array([True] * 3 + [False] * 5)
    found = apply(fit_platt(z, labels), [1.0, -1.0])
    assert found == pytest.approx([4 / 5, 1 / 7], abs=1e-4)


def test_isotonic_is_close_to_the_full_fit_with_few_knots_and_is_never_certain() -> None:
    z, labels, _ = drawn()
    found = fit_isotonic(z, labels)
    assert len(found.z) <= MAX_KNOTS
    assert list(found.z) == sorted(set(found.z))
    assert list(found.p) == sorted(found.p)
    assert 0 < found.p[0] < found.p[-1] < 1
    full = IsotonicRegression().fit(z, labels).predict(z)
    assert np.abs(apply(found, z) - full).mean() < 0.01
    assert np.abs(apply(found, z) - logistic(z, 2, -1)).mean() < 0.04


@pytest.mark.parametrize("fit_map", [fit_platt, fit_isotonic])
def test_a_signal_that_points_the_wrong_way_is_refused(fit_map: Any) -> None:
    z, labels, _ = drawn()
    with pytest.raises(LabError, match="points the wrong way"):
        fit_map(-z, labels)


@pytest.mark.parametrize("fit_map", [fit_platt, fit_isotonic])
@pytest.mark.parametrize(
    ("z", "labels", "message"),
    [
        ([1.0, 2.0], [True, True], "a positive and a negative"),
        ([1.0, 1.0], [True, False], "same for every case"),
        ([1.0, np.nan], [True, False], "finite"),
        ([1.0], [True, False], "one z"),
        ([1.0, 2.0], [1, 0], "true or false"),
    ],
)
def test_what_nothing_can_be_learned_from_is_refused(
    fit_map: Any, z: Any, labels: Any, message: str
) -> None:
    with pytest.raises(LabError, match=message):
        fit_map(np.array(z), np.array(labels))


def test_maps_are_applied_as_serving_applies_them() -> None:
    z, labels, _ = drawn(300)
    for found in (fit_platt(z, labels), fit_isotonic(z, labels)):
        assert apply(found, z).tolist() == [calibrated(found, float(v)) for v in z]


def test_auto_takes_platt_where_the_truth_is_logistic() -> None:
    z, labels, names = drawn(400)
    found = fit(z, labels, names, split="dev", seed=0)
    assert isinstance(found.calibration.map, Platt)
    assert set(found.held_out) == {"logistic", "platt", "isotonic"}
    assert found.held_out["platt"].log_loss < found.held_out["isotonic"].log_loss


def test_auto_keeps_log_odds_that_are_right_as_they_are() -> None:
    rng = np.random.default_rng(5)
    z = rng.normal(0, 2, 400)
    labels = rng.random(400) < 1 / (1 + np.exp(-z))
    found = fit(z, labels, [f"name {i}" for i in range(400)], split="dev", seed=0)
    assert found.calibration.map == Platt(scale=1.0, offset=0.0)


def test_auto_takes_isotonic_where_the_truth_is_a_staircase() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(0, 3, 3000)
    labels = rng.random(3000) < np.where(z < 0, 0.02, np.where(z < 4, 0.45, 0.55))
    found = fit(z, labels, np.arange(3000).astype(str), split="dev", seed=0)
    assert isinstance(found.calibration.map, Isotonic)
    p = apply(found.calibration.map, z)
    assert log_loss(labels, p) < log_loss(labels, apply(fit_platt(z, labels), z))


def test_methods_are_compared_on_names_that_the_fit_has_not_seen() -> None:
    """All cases of a name are alike: if held out one by one, they would be foreseen."""
    rng = np.random.default_rng(0)
    z_of_names = rng.normal(size=60)
    names, z = np.repeat(np.arange(60), 20), np.repeat(z_of_names, 20)
    labels = np.repeat(rng.random(60) < logistic(z_of_names), 20)
    found = fit(z, labels, names.astype(str), method="isotonic", split="dev", seed=0)
    fitted = log_loss(labels, apply(found.calibration.map, z))
    assert found.held_out["isotonic"].log_loss > fitted + 0.05


def test_auto_takes_platt_where_no_name_can_be_held_out() -> None:
    z, labels = [0.0, 1.0, 2.0], np.array([False, True, True])
    found = fit(z, labels, ["a", "b", "c"], split="dev", seed=0)
    assert isinstance(found.calibration.map, Platt)
    assert found.held_out == {}


def test_cases_without_a_z_take_no_part() -> None:
    z, labels, names = drawn(500)
    holes = np.append(z, [np.nan] * 5)
    found = fit(
        holes, np.append(labels, [True] * 5), np.append(names, ["x"] * 5), split="d", seed=0
    )
    assert found == fit(z, labels, names, split="d", seed=0)
    assert found.calibration.num_cases == 500
    assert found.calibration.split == "d"


def test_thresholds_are_told_with_their_negatives_or_why_they_are_not() -> None:
    z, labels, names = drawn(60)
    found = fit(z, labels, names, max_fprs=(0.001, 0.1), split="dev", seed=0)
    (threshold,) = found.calibration.thresholds
    negatives = apply(found.calibration.map, z[~labels])
    assert threshold.max_fpr == 0.1
    assert threshold.num_negatives == len(negatives)
    assert np.mean(negatives > threshold.score) <= 0.1
    assert found.without_threshold == {
        "0.001": f"max_fpr 0.001: needs 999 negative names, there are {len(negatives)}"
    }


@pytest.mark.parametrize(("max_fpr", "needed"), [(0.01, 99), (0.05, 19), (0.03, 33), (0.5, 1)])
def test_the_smallest_number_of_negatives_is_the_one_the_error_tells(
    max_fpr: float, needed: int
) -> None:
    scores = np.arange(float(needed))
    found = conformal_threshold(scores, scores.astype(str), max_fpr, seed=0)
    assert found.score == scores[-1]
    with pytest.raises(TooFewNegativesError) as error:
        conformal_threshold(scores[1:], scores[1:].astype(str), max_fpr, seed=0)
    assert (error.value.needed, error.value.present) == (needed, needed - 1)


@pytest.mark.parametrize(("n", "max_fpr"), [(19, 0.05), (99, 0.01), (150, 0.05), (10, 0.25)])
def test_new_names_exceed_the_threshold_at_most_as_often_as_promised(
    n: int, max_fpr: float
) -> None:
    """Over many calibrations the mean rate keeps the bound, and is no more than 1/(n+1) below.

    Cases of a name resemble each other, and names have up to eight cases. Scores are normal with
    variance 2 in all, so that the rate above a threshold is known, not sampled.
    """
    rng = np.random.default_rng(n)
    thresholds = []
    for seed in range(1500):
        sizes = rng.integers(1, 9, n)
        names = np.repeat(np.arange(n), sizes)
        scores = np.repeat(rng.normal(size=n), sizes) + rng.normal(size=sizes.sum())
        thresholds.append(conformal_threshold(scores, names.astype(str), max_fpr, seed).score)
    tails = 1 - ndtr(np.array(thresholds) / np.sqrt(2))
    error = 3 * tails.std() / np.sqrt(len(tails))
    assert tails.mean() <= max_fpr + error
    assert tails.mean() >= max_fpr - 1 / (n + 1) - error


def test_the_promise_holds_for_a_map_fitted_on_the_same_cases() -> None:
    """Maps never fall, so they keep the order of scores, which is all that the bound rests on."""
    rng = np.random.default_rng(7)
    rates = []
    for seed in range(400):
        z = np.concatenate([rng.normal(0, 1, 60), rng.normal(1.5, 1, 40)])
        labels = np.arange(100) >= 60
        found = fit_isotonic(z, labels)
        names = np.arange(60).astype(str)
        threshold = conformal_threshold(apply(found, z[~labels]), names, 0.05, seed)
        new = apply(found, rng.normal(0, 1, 400))
        rates.append(np.mean(new > threshold.score))
    assert np.mean(rates) <= 0.05 + 3 * np.std(rates) / np.sqrt(len(rates))


def test_one_case_of_each_name_is_drawn_by_the_seed_whatever_the_order() -> None:
    rng = np.random.default_rng(0)
    scores, names = rng.random(200), np.repeat(np.arange(40), 5).astype(str)
    shuffled = rng.permutation(200)
    found = conformal_threshold(scores, names, 0.1, seed=3)
    assert found == conformal_threshold(scores[shuffled], names[shuffled], 0.1, seed=3)
    assert found.num_negatives == 40
    others = {conformal_threshold(scores, names, 0.1, seed=s).score for s in range(20)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("scores", "max_fpr", "message"),
    [([0.1, 0.2], 0.0, "max_fpr"), ([0.1, 0.2], 1.0, "max_fpr"), ([0.1, np.nan], 0.5, "finite")],
)
def test_impossible_bounds_and_scores_are_refused(
    scores: list[float], max_fpr: float, message: str
) -> None:
    with pytest.raises(LabError, match=message):
        conformal_threshold(scores, ["a", "b"], max_fpr, seed=0)
