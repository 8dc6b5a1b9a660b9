"""Every number of a report means what it says, and its interval respects names."""

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sklearn", reason="the lab's extra is not installed")

from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from steerscope.catalog.model import Baseline
from steerscope.errors import LabError
from steerscope.lab.drift import JUST_ABOVE_ZERO, baseline, drift
from steerscope.lab.proportions import wilson
from steerscope.lab.resampling import Ranking
from steerscope.lab.statistics import (
    Estimate,
    ScoreReport,
    evaluate_scores,
    paired_difference,
    roc_band,
)
from steerscope.telemetry.drift import bin_counts, ks, psi

Cases = tuple[Any, Any, Any]


def cases(num_names: int = 60, per_name: int = 4, seed: int = 0, signal: float = 1.5) -> Cases:
    """Probabilities, labels and names; what a name adds to z is the same for all its cases."""
    rng = np.random.default_rng(seed)
    names = np.repeat([f"name {i}" for i in range(num_names)], per_name)
    labels = np.repeat(rng.random(num_names) < 0.4, per_name)
    z = rng.normal(size=len(names)) + np.repeat(rng.normal(size=num_names), per_name)
    return 1 / (1 + np.exp(-(z + signal * labels - 1))), labels, names


def report(scores: Any, labels: Any, names: Any, **options: Any) -> ScoreReport:
    return evaluate_scores(scores, labels, names, **{"probabilities": True, "seed": 1, **options})


def some(estimate: Estimate | None) -> Estimate:
    assert estimate is not None
    return estimate


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 4)), min_size=4))
def test_weighted_curves_are_those_of_scikit_learn_also_with_ties(
    drawn: list[tuple[int, bool, int]],
) -> None:
    drawn += [(0, True, 1), (1, False, 1)]
    scores, labels, weights = (np.array(column) for column in zip(*drawn, strict=True))
    curves = Ranking(scores.astype(float), labels).curves(weights[None].astype(float))
    expected = roc_auc_score(labels, scores, sample_weight=weights)
    assert curves.auroc()[0] == pytest.approx(expected)
    expected = average_precision_score(labels, scores, sample_weight=weights)
    assert curves.auprc()[0] == pytest.approx(expected)
    fpr, tpr, _ = roc_curve(labels, scores, sample_weight=weights, drop_intermediate=False)
    for bound in (0.0, 0.05, 0.3, 1.0):
        assert curves.tpr_at(bound)[0] == pytest.approx(tpr[fpr <= bound + 1e-12].max())


def test_tpr_at_a_false_positive_rate_is_not_interpolated() -> None:
    """Of 20 negatives one may be wrong at 5%, and none at 1%."""
    negatives = np.arange(20.0)
    positives = np.array([30.0, 18.5, 17.5, 0.5])
    labels = np.array([False] * 20 + [True] * 4)
    scores = np.concatenate([negatives, positives])
    found = report(scores, labels, np.arange(24).astype(str), probabilities=False)
    assert some(found.tpr_at_1pct_fpr).value == 0.25
    assert some(found.tpr_at_5pct_fpr).value == 0.5


def test_brier_and_ece_are_what_they_are_defined_as() -> None:
    """Two levels of probability: two bins, whose gaps weigh by their cases."""
    scores = np.array([0.2] * 10 + [0.8] * 30)
    labels = np.array([True] * 4 + [False] * 6 + [True] * 24 + [False] * 6)
    found = report(scores, labels, np.arange(40).astype(str))
    assert some(found.brier).value == pytest.approx(
        (4 * 0.64 + 6 * 0.04 + 24 * 0.04 + 6 * 0.64) / 40
    )
    assert some(found.ece).value == pytest.approx(0.25 * 0.2 + 0.75 * 0.0)
    assert [(b.count, round(b.observed, 3)) for b in found.reliability] == [(10, 0.4), (30, 0.8)]
    low, high = wilson(4, 10)
    assert (found.reliability[0].low, found.reliability[0].high) == (low, high)


def test_bins_hold_equally_many_cases() -> None:
    rng = np.random.default_rng(0)
    found = report(rng.random(300), rng.random(300) < 0.5, np.arange(300).astype(str))
    assert [b.count for b in found.reliability] == [20] * 15


def test_cases_without_a_score_are_counted_and_nothing_else() -> None:
    scores, labels, names = cases()
    holes = np.append(scores, [np.nan, np.nan])
    found = report(holes, np.append(labels, [True, False]), np.append(names, ["x", "y"]))
    assert found.num_without_score == 2
    whole = msgspec.to_builtins(report(scores, labels, names))
    assert msgspec.to_builtins(found) == whole | {"num_without_score": 2}
    assert (found.num_cases, found.num_groups) == (240, 60)
    assert found.num_positive == labels.sum()
    assert found.prevalence == pytest.approx(labels.mean())


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ([True, True], "no scored case is negative"),
        ([False, False], "no scored case is positive"),
    ],
)
def test_with_one_class_nothing_that_compares_is_defined_and_the_report_says_why(
    labels: list[bool], reason: str
) -> None:
    found = report([0.3, 0.6], np.array(labels), ["a", "b"])
    assert found.auroc is found.auprc is found.tpr_at_1pct_fpr is found.tpr_at_5pct_fpr is None
    assert set(found.undefined.values()) == {reason}
    assert some(found.brier).value > 0


def test_without_any_score_nothing_is_defined() -> None:
    found = report([np.nan, np.nan], np.array([True, False]), ["a", "b"])
    assert found.num_cases == 0
    assert found.num_without_score == 2
    assert found.prevalence is None
    assert set(found.undefined) == {
        "auroc", "auprc", "tpr_at_1pct_fpr", "tpr_at_5pct_fpr", "brier", "ece"
    }  # fmt: skip


def test_what_is_no_probability_has_no_brier_score() -> None:
    scores, labels, names = cases()
    found = report(scores * 40 - 7, labels, names, probabilities=False)
    assert found.brier is found.ece is None
    assert found.undefined == dict.fromkeys(("brier", "ece"), "the score is not a probability")
    assert found.reliability == ()


def test_a_report_survives_json() -> None:
    found = report(*cases())
    assert msgspec.json.decode(msgspec.json.encode(found), type=ScoreReport) == found


def test_the_seed_decides_and_the_order_of_cases_does_not() -> None:
    scores, labels, names = cases()
    shuffled = np.random.default_rng(3).permutation(len(scores))
    found = report(scores, labels, names)
    assert found == report(scores, labels, names)
    other = report(scores[shuffled], labels[shuffled], names[shuffled])
    for metric in ("auroc", "auprc", "tpr_at_1pct_fpr", "brier", "ece"):
        ours, theirs = (some(getattr(r, metric)) for r in (found, other))
        assert (ours.value, ours.low, ours.high) == pytest.approx(
            (theirs.value, theirs.low, theirs.high)
        )
    assert report(scores, labels, names, seed=2).auroc != found.auroc


def test_asking_the_same_names_again_does_not_narrow_the_interval() -> None:
    """Six copies of each case are no more evidence than one."""
    scores, labels, names = cases(per_name=1)
    once = some(report(scores, labels, names).auroc)
    copied = (np.repeat(array, 6) for array in (scores, labels, names))
    sixfold = some(report(*copied).auroc)
    assert (sixfold.value, sixfold.low, sixfold.high) == pytest.approx(
        (once.value, once.low, once.high)
    )


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """With names that move their cases together; a bootstrap over cases would hold it far less."""
    exact = 0.5 * (1 + math.erf(1.5 / math.sqrt(2 * 2 * 2)))  # z differs by N(1.5, 2 * 2)
    held, held_by_case, trials = 0, 0, 150
    for seed in range(trials):
        scores, labels, names = cases(80, 6, seed)
        by_name = some(report(scores, labels, names, num_resamples=300).auroc)
        each = np.arange(len(names)).astype(str)
        by_case = some(report(scores, labels, each, num_resamples=300).auroc)
        held += by_name.low <= exact <= by_name.high
        held_by_case += by_case.low <= exact <= by_case.high
    assert held / trials > 0.88
    assert held_by_case / trials < held / trials - 0.1


def test_perfect_separation_of_few_names_is_not_certainty() -> None:
    """No resample can show an error that the sample lacks: Wilson's bound of 10 in 10 holds."""
    labels = np.repeat([True, False], [10, 40])
    found = some(report(labels.astype(float), labels, np.arange(50).astype(str)).auroc)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == wilson(10, 10).low == pytest.approx(0.722, abs=1e-3)


def test_a_class_of_one_name_has_no_interval_to_speak_of() -> None:
    found = report([0.9, 0.8, 0.1, 0.2], np.array([True, True, False, False]), ["a", "a", "b", "c"])
    assert some(found.auroc) == Estimate(1.0, 0.0, 1.0)


def test_resamples_that_lack_a_class_are_drawn_again_and_counted() -> None:
    labels = np.array([True, True, False, False, False])
    found = report(np.linspace(0, 1, 5), labels, list("abcde"), num_resamples=500)
    assert found.num_resamples == 500
    assert found.num_redrawn > 0
    assert report(*cases()).num_redrawn == 0


@pytest.mark.parametrize(
    ("scores", "labels", "names", "message"),
    [
        ([0.5, 0.5], [True], ["a", "b"], "shape"),
        ([0.5], [True], ["a", "b"], "groups: shape"),
        ([0.5, np.inf], [True, False], ["a", "b"], "scores: a score is infinite"),
        ([0.5, 1.5], [True, False], ["a", "b"], "outside 0 to 1"),
        ([0.5, 0.5], [1, 0], ["a", "b"], "labels: must be true or false"),
    ],
)
def test_cases_that_do_not_fit_together_are_refused(
    scores: Any, labels: Any, names: Any, message: str
) -> None:
    with pytest.raises(LabError, match=message):
        report(scores, np.array(labels), names)


def test_a_difference_is_measured_on_the_same_resamples() -> None:
    """Two scores that err together differ with more certainty than either is known."""
    scores, labels, names = cases(signal=2.5)
    worse = scores + np.random.default_rng(4).normal(0, 0.3, len(scores))
    found = paired_difference(scores, worse, labels, names, seed=1)
    difference, alone = some(found.difference), some(report(scores, labels, names).auroc)
    assert difference.value == roc_auc_score(labels, scores) - roc_auc_score(labels, worse)
    assert difference.low > 0
    assert difference.high - difference.low < alone.high - alone.low
    reverse = some(paired_difference(worse, scores, labels, names, seed=1).difference)
    assert (reverse.low, reverse.high) == pytest.approx((-difference.high, -difference.low))


def test_a_difference_is_taken_where_both_have_scores() -> None:
    scores, labels, names = cases()
    signal, other = scores.copy(), scores.copy()
    signal[:3], other[2:5] = np.nan, np.nan
    found = paired_difference(signal, other, labels, names, seed=1)
    assert (found.num_cases, found.num_without_score) == (235, 5)
    assert some(found.difference) == Estimate(0.0, 0.0, 0.0)
    lacking = paired_difference(signal, other, labels | True, names, seed=1)
    assert lacking.difference is None
    assert lacking.undefined["difference"] == "no scored case is negative"


def test_the_roc_band_is_the_curve_with_its_intervals() -> None:
    scores, labels, names = cases()
    band = roc_band(scores, labels, names, seed=1)
    at_5pct = some(report(scores, labels, names).tpr_at_5pct_fpr)
    here = band.tpr[band.fpr.index(0.05)]
    assert (here.value, here.low, here.high) == pytest.approx(
        (at_5pct.value, at_5pct.low, at_5pct.high)
    )
    values = [point.value for point in band.tpr]
    assert values == sorted(values)
    assert values[-1] == 1.0
    with pytest.raises(LabError, match="no scored case is positive"):
        roc_band([0.1], np.array([False]), ["a"], seed=1)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 0, 0.0, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)],
)
def test_wilson_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


def sparse(num: int, share: float, seed: int = 0) -> Any:
    """A latent that is 0 save at some tokens."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(num) < share, rng.gamma(2, 2, num), 0).astype(np.float32)


def check(made: Baseline) -> None:
    assert list(made.edges) == sorted(set(made.edges))
    assert len(made.shares) == len(made.edges) + 1 <= 10
    assert sum(made.shares) == pytest.approx(1.0)


def test_the_zeros_of_a_sparse_latent_are_a_bin_of_their_own() -> None:
    made = baseline(sparse(20_000, 0.03), "f", "prompt")
    check(made)
    assert made.edges[0] == JUST_ABOVE_ZERO
    assert made.shares[0] == pytest.approx(0.97, abs=0.01)
    assert made.shares[1:] == pytest.approx([made.shares[1]] * 9, rel=0.02)
    assert bin_counts(made.edges, [0.0, np.float32(1e-30)]).tolist()[:2] == [1, 1]


def test_a_dense_feature_has_ten_bins_of_equal_mass() -> None:
    made = baseline(np.random.default_rng(0).normal(size=5000), "f", "generation")
    check(made)
    assert made.shares == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.0])
def test_a_constant_feature_that_starts_to_vary_has_drifted(value: float) -> None:
    made = baseline(np.full(100, value), "f", "prompt")
    check(made)
    assert max(made.shares) == 1.0
    assert drift(made, np.full(50, value)).psi == pytest.approx(0.0)
    for moved in (value + 1, value + 0.5) if value == 0 else (value + 1, value - 1):
        found = drift(made, np.full(50, moved))
        assert found.ks == 1.0
        assert found.psi is not None
        assert found.psi > 5


@pytest.mark.parametrize("values", [[1.0, 2.0], [-1.0] * 95 + [2.0] * 5, [0.0, 0.0, 1.0]])
def test_few_or_tied_values_still_make_two_bins(values: list[float]) -> None:
    made = baseline(values, "f", "prompt")
    check(made)
    assert len(made.edges) >= 1
    assert all(share > 0 for share in made.shares)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [np.inf], [[1.0, 2.0]]])
def test_no_baseline_is_made_of_nothing_or_of_what_is_not_finite(values: Any) -> None:
    with pytest.raises(LabError, match="baseline of 'f'"):
        baseline(values, "f", "prompt")


def test_psi_is_small_without_a_shift_and_large_with_one() -> None:
    made = baseline(sparse(20_000, 0.05), "f", "prompt")
    same = drift(made, sparse(20_000, 0.05, seed=1))
    louder = drift(made, sparse(20_000, 0.05, seed=1) * 3)
    oftener = drift(made, sparse(20_000, 0.25, seed=1))
    assert same.psi is not None
    assert same.psi < 0.01
    assert louder.psi is not None
    assert louder.psi > 0.05
    assert oftener.psi is not None
    assert oftener.psi > 0.25
    assert oftener.ks == pytest.approx(0.2, abs=0.02)


def test_psi_and_ks_are_what_they_are_defined_as() -> None:
    made = Baseline(
        feature="f", phase="prompt", edges=(1.0, 2.0), shares=(0.5, 0.25, 0.25), num_tokens=8
    )
    counts = bin_counts(made.edges, [0.0, 1.0, 1.5, 2.0])
    assert counts.tolist() == [1, 2, 1]
    assert psi(made, counts) == pytest.approx(-0.25 * math.log(0.5) + 0.25 * math.log(2))
    assert ks(made, counts) == pytest.approx(0.25)


def test_an_empty_bin_costs_a_bounded_sum() -> None:
    made = Baseline(feature="f", phase="prompt", edges=(1.0,), shares=(1.0, 0.0), num_tokens=8)
    assert psi(made, bin_counts(made.edges, [2.0])) == pytest.approx(2 * 0.9999 * math.log(1e4))


def test_no_values_have_not_drifted_nor_stayed() -> None:
    found = drift(baseline([0.0, 1.0], "f", "prompt"), [])
    assert (found.psi, found.ks, found.num_tokens) == (None, None, 0)


def test_no_edge_lies_where_rounding_would_carry_many_values_over() -> None:
    rng = np.random.default_rng(5)
    shared = np.repeat([20.0, 30.0], 400)  # tokens that many prompts have in common
    made = baseline(np.concatenate([np.zeros(4000), rng.gamma(2, 8, 800), shared]), "f", "prompt")
    check(made)
    for off in (1 - 1e-3, 1 + 1e-3):
        again = drift(made, np.concatenate([np.zeros(4000), rng.gamma(2, 8, 800), shared * off]))
        assert again.psi is not None
        assert again.psi < 0.02
    moved = drift(made, np.concatenate([np.zeros(4000), rng.gamma(2, 8, 800), shared * 0.5]))
    assert moved.psi is not None
    assert moved.psi > 0.1


def test_values_that_all_lie_together_are_told_from_zero_only() -> None:
    values = np.concatenate([np.zeros(500), 28.0 + 1e-4 * np.random.default_rng(1).random(500)])
    made = baseline(values, "f", "prompt")
    assert made.edges == (JUST_ABOVE_ZERO,)
