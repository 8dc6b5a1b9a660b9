"""The benchmark's ratios find a slowdown that was planted, and no other."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import columns
import ratios
from random_model import SHAPES

NUM_ROUNDS, NUM_STEPS = 200, 5


def rounds(seed, times=1.0):
    """Steps of 10 ms, give or take 3%, in rounds that drift by half together."""
    noise = np.random.default_rng(seed).normal(1.0, 0.03, (NUM_ROUNDS, NUM_STEPS))
    drift = np.linspace(1.0, 1.5, NUM_ROUNDS)[:, None]
    return list(1e4 * times * noise * drift)


@pytest.mark.parametrize("times", [1.0, 1.02])
def test_a_planted_slowdown_lies_in_every_interval(times):
    plain, ours = rounds(1), rounds(2, times)
    found = [
        ratios.throughput(ours, plain),
        ratios.trimmed_throughput(ours, plain),
        ratios.latency(plain, ours, 0.5),
    ]
    for each in found:
        assert each.low < times < each.high
    assert found[0].high - found[0].low < 0.01


def test_a_burst_of_others_work_moves_the_mean_and_not_the_trimmed_mean():
    plain, ours = rounds(1), rounds(2)
    for each in ours[40:50]:
        each *= 3
    assert ratios.throughput(plain, ours).value < 0.97
    assert ratios.trimmed_throughput(plain, ours).value == pytest.approx(1.0, abs=0.01)


def test_a_slow_tail_is_seen_at_p99_and_not_at_the_median():
    plain, ours = rounds(1), rounds(2)
    for each in ours[::5]:
        each[0] *= 2
    assert ratios.latency(plain, ours, 0.99).low > 1.1
    assert ratios.latency(plain, ours, 0.5).value == pytest.approx(1.0, abs=0.02)


def test_a_slope_needs_two_costs_that_are_known():
    assert ratios.slope([1, 8, 64], [11.0, 25.0, None]) == pytest.approx(2.0)
    assert ratios.slope([1, 8], [11.0, None]) is None


def test_a_column_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no column 'observe'"):
        columns.spec("observe", tmp_path, SHAPES["demo"], tmp_path)


def test_the_policies_of_a_steered_column_are_all_different(tmp_path):
    made = columns.spec("steer-1000", tmp_path, SHAPES["demo"], tmp_path)
    assert len(set(made.steering["all"])) == 1000
    edits = {str(policy["interventions"]) for policy in columns.policies("all", 1000)}
    assert len(edits) == 1000
