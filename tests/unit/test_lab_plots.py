"""Pictures: the same bytes for the same data, small, and nothing left behind."""

import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the lab's extra is not installed")
pytest.importorskip("matplotlib", reason="the lab's extra is not installed")

import matplotlib as mpl
from PIL import Image
from steerscope.errors import LabError
from steerscope.lab import plots
from steerscope.lab.statistics import Estimate, ReliabilityBin, RocBand, evaluate_scores, roc_band

MAX_BYTES = 60_000


def _scored() -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    labels = rng.random(600) < 0.4
    return np.clip(rng.random(600) * 0.6 + 0.4 * labels, 0, 1), labels, np.arange(600).astype(str)


def reliability(count: int = 4, title: str = "hallucination_risk") -> bytes:
    bins = evaluate_scores(*_scored(), probabilities=True, seed=0, num_resamples=10).reliability
    return plots.reliability_diagram(
        [plots.Reliability(f"score {i}", bins) for i in range(count)], title
    )


def roc(count: int = 4, title: str = "hallucination_risk") -> bytes:
    band = roc_band(*_scored(), seed=0, num_resamples=50)
    return plots.roc(
        [plots.Roc(f"score {i}", Estimate(0.8, 0.7, 0.9), band) for i in range(count)], title
    )


def dose(count: int = 6, title: str = "force-known") -> bytes:
    doses = [0.2 * i for i in range(count)]
    policy = [plots.DosePoint(d, 120, d / 2, 1 - d / 2, 0.0) for d in doses]
    controls = [plots.ControlPoint(d, (0.1, 0.2), (0.8, 0.9), (0.0, 0.1)) for d in doses]
    return plots.dose_response(policy, controls, title)


def damage(count: int = 3, title: str = "force-known") -> bytes:
    return plots.collateral_damage(
        [plots.Damage(f"group {i}", 100, 0.05 * i, 0.01, 0.04) for i in range(count)], title
    )


def histogram(count: int = 40, title: str = "known_entity") -> bytes:
    counts = [10 ** (i % 5) for i in range(count)]
    return plots.activation_histogram(list(map(float, range(count + 1))), counts, 10**6, title)


PLOTS: list[Callable[..., bytes]] = [reliability, roc, dose, damage, histogram]


@pytest.mark.parametrize("plot", PLOTS)
def test_a_plot_is_a_small_png_with_the_same_bytes_every_time(plot: Callable[..., bytes]) -> None:
    png = plot()
    assert png == plot()
    assert len(png) <= MAX_BYTES
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 280
        assert "Software" not in picture.info


@pytest.mark.parametrize("plot", PLOTS)
def test_a_plot_shows_its_data_and_its_title(plot: Callable[..., bytes]) -> None:
    assert len({plot(), plot(count=2), plot(title="another")}) == 3


@pytest.mark.parametrize("plot", PLOTS)
def test_a_plot_of_one_thing_can_be_drawn(plot: Callable[..., bytes]) -> None:
    assert plot(count=1)


@pytest.mark.parametrize("plot", PLOTS)
def test_names_with_dollars_and_underscores_are_text(plot: Callable[..., bytes]) -> None:
    assert plot(title=r"$\frac{ of a_b $")


@pytest.mark.parametrize("plot", PLOTS)
def test_a_plot_of_nothing_is_refused(plot: Callable[..., bytes]) -> None:
    with pytest.raises(LabError):
        plot(count=0)


@pytest.mark.parametrize("plot", [reliability, roc])
def test_more_lines_than_can_be_told_apart_are_refused(plot: Callable[..., bytes]) -> None:
    with pytest.raises(LabError, match="up to 3 baselines"):
        plot(count=5)


def test_drawing_leaves_the_global_state_of_matplotlib_alone() -> None:
    had_pyplot, before = "matplotlib.pyplot" in sys.modules, mpl.rcParams.copy()
    for plot in PLOTS:
        plot()
    assert mpl.rcParams.copy() == before
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


def test_a_hundred_percent_and_zero_percent_are_drawn() -> None:
    """Where an interval ends at its value, or a count is 0, nothing is negative or log of 0."""
    assert plots.collateral_damage([plots.Damage("all", 3, 1.0, 0.0, 1.0)], "t")
    assert plots.collateral_damage([plots.Damage("none", 0, 0.0, 0.0, 0.0)], "t")
    assert plots.activation_histogram([0.0, 1.0], [0], 0, "never seen")
    certain = ReliabilityBin(1.0, 1.0, 1.0, 1.0, 1)
    assert plots.reliability_diagram([plots.Reliability("s", [certain])], "t")
    assert plots.reliability_diagram([plots.Reliability("s", [])], "t")
    band = RocBand((0.0, 1.0), (Estimate(1.0, 1.0, 1.0), Estimate(1.0, 1.0, 1.0)))
    assert plots.roc([plots.Roc("s", Estimate(1.0, 1.0, 1.0), band)], "t")
    assert plots.dose_response([plots.DosePoint(0.0, 5, 0.0, 1.0, 0.0)], [], "t")
