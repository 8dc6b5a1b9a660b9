"""Pictures of a report: plain data in, PNG bytes out, the same bytes for the same data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from steerscope.errors import LabError
from steerscope.lab.canvas import (
    BLUE,
    DARK,
    GREY,
    LINES,
    ORANGE,
    drawn,
    name_lines,
    new_figure,
    percent,
)
from steerscope.lab.proportions import Interval, wilson
from steerscope.lab.resampling import Floats
from steerscope.lab.statistics import Estimate, ReliabilityBin, RocBand

_POLICY: Final = "policy (95% interval)"
_CONTROL_MEAN: Final[dict[str, Any]] = {"color": ORANGE, "label": "random controls, mean"}
_CONTROL_MAX: Final[dict[str, Any]] = {
    "color": ORANGE,
    "marker": "D",
    "markerfacecolor": "white",
    "label": "random controls, largest",
}


class Reliability(NamedTuple):
    """The reliability bins of a signal or a baseline."""

    name: str
    bins: Sequence[ReliabilityBin]


class Roc(NamedTuple):
    """The ROC curve of a signal or a baseline."""

    name: str
    auroc: Estimate
    band: RocBand


class DosePoint(NamedTuple):
    """Shares of ``num_cases`` answers at one dose of a policy."""

    dose: float
    num_cases: int
    answered: float
    declined: float
    malformed: float


class ControlPoint(NamedTuple):
    """Mean and largest share over the controls at one dose."""

    dose: float
    answered: tuple[float, float]
    declined: tuple[float, float]
    malformed: tuple[float, float]


class Damage(NamedTuple):
    """What should not have changed, and how often it did: under the policy and its controls."""

    name: str
    num_cases: int
    policy: float
    control_mean: float
    control_max: float


@drawn
def reliability_diagram(curves: Sequence[Reliability], title: str) -> Figure:
    """What was predicted against what came true: the signal first, then up to three baselines."""
    _check_lines(curves)
    figure = new_figure(title, 5.0, 5.0)
    axes = figure.subplots()
    _diagonal(axes)
    for i, curve in reversed(list(enumerate(curves))):
        observed = [b.observed for b in curve.bins]
        reach = _reach(observed, curve.bins) if i == 0 else None
        axes.errorbar(
            [b.mean_predicted for b in curve.bins], observed, yerr=reach, elinewidth=1, **LINES[i]
        )
    names = [f"{curve.name}: {_counted(curve.bins)}" for curve in curves]
    name_lines(axes, names, "top left", "grey line: perfectly calibrated")
    axes.set(ylim=(-0.02, 1.25), yticks=np.linspace(0, 1, 6))
    axes.set(xlabel="predicted probability", ylabel="observed share (95% interval)")
    return figure


@drawn
def roc(curves: Sequence[Roc], title: str) -> Figure:
    """ROC curves, the first with its band: the signal, then up to three baselines."""
    _check_lines(curves)
    figure = new_figure(title, 5.0, 4.8)
    axes = figure.subplots()
    _diagonal(axes)
    for i, curve in reversed(list(enumerate(curves))):
        fpr, tpr = curve.band.fpr, curve.band.tpr
        axes.step(fpr, [t.value for t in tpr], where="post", **LINES[i] | {"marker": ""})
        if i == 0:
            low, high = [t.low for t in tpr], [t.high for t in tpr]
            axes.fill_between(fpr, low, high, color=BLUE, alpha=0.15, step="post", linewidth=0)
    names = [f"{curve.name}: {_told(curve.auroc)}" for curve in curves]
    name_lines(axes, names, "bottom right", "AUROC (95% interval); grey line: chance")
    axes.set(xlabel="false positive rate", ylabel="true positive rate")
    return figure


@drawn
def dose_response(
    policy: Sequence[DosePoint], controls: Sequence[ControlPoint], title: str
) -> Figure:
    """Answers, declines and malformed text against dose: a policy, and its random controls."""
    if not policy:
        raise LabError("dose response: needs at least one dose")
    figure = new_figure(title, 8.0, 3.4)
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, outcome in zip(panels, ("answered", "declined", "malformed"), strict=True):
        _dose_panel(axes, outcome, policy, controls)
    panels[0].set(ylabel="share of cases", ylim=(-0.03, 1.03))
    percent(panels[0].yaxis)
    panels[1].set_xlabel("dose: size of the change, relative to what it is added to")
    _legend(figure, panels[0])
    return figure


@drawn
def collateral_damage(rows: Sequence[Damage], title: str) -> Figure:
    """How often each thing changed that should not have, by row; the controls beside it."""
    if not rows:
        raise LabError("collateral damage: needs at least one row")
    figure = new_figure(title, 6.4, 1.4 + 0.42 * len(rows))
    axes = figure.subplots()
    y = np.arange(len(rows))[::-1]
    shares, bounds = [row.policy for row in rows], [_wilson(row.policy, row) for row in rows]
    axes.barh(y, shares, height=0.5, color=BLUE, alpha=0.55, label=_POLICY)
    axes.errorbar(shares, y, xerr=_reach(shares, bounds), fmt="none", ecolor=DARK, elinewidth=1.2)
    means, highest = [row.control_mean for row in rows], [row.control_max for row in rows]
    axes.plot(means, y, "|", ms=15, mew=2.2, zorder=4, clip_on=False, **_CONTROL_MEAN)
    axes.plot(highest, y, linestyle="", zorder=5, clip_on=False, **_CONTROL_MAX)
    ends = [max(b.high, h) for b, h in zip(bounds, highest, strict=True)]
    for at, end, share in zip(y, ends, shares, strict=True):
        axes.annotate(
            f"{share:.1%}", (end, at), (8, 0), textcoords="offset points", va="center", color=BLUE
        )
    axes.set_yticks(y, [f"{row.name} (n = {row.num_cases:,})" for row in rows])
    axes.set(xlabel="share of cases that changed", xlim=(0, max(*ends, 0.01) * 1.12))
    percent(axes.xaxis)
    _legend(figure, axes)
    return figure


@drawn
def activation_histogram(
    edges: Sequence[float], counts: Sequence[int], num_zero: int, title: str
) -> Figure:
    """How strongly a feature fires, over the tokens at which it does; counts on a log scale.

    ``counts[i]`` tokens lie between ``edges[i]`` and ``edges[i + 1]``, besides those at 0.
    """
    if len(edges) != len(counts) + 1 or not counts:
        raise LabError("activation histogram: needs one more edge than counts")
    figure = new_figure(title, 4.8, 2.6)
    axes = figure.subplots()
    axes.stairs(counts, edges, fill=True, color=BLUE, baseline=0.5)
    active = sum(counts)
    total = active + num_zero
    told = f"active at {active / total:.2%} of {total:,} tokens" if total else "no tokens"
    place: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 8}
    axes.annotate(told, (1.0, 1.0), color=DARK, **place)
    axes.set(xlabel="activation", ylabel="tokens (log scale)", yscale="log")
    axes.set_ylim(0.5, max(10, *counts) * 4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    return figure


def _dose_panel(
    axes: Axes, outcome: str, policy: Sequence[DosePoint], controls: Sequence[ControlPoint]
) -> None:
    shares = [getattr(point, outcome) for point in policy]
    bounds = [_wilson(share, point) for share, point in zip(shares, policy, strict=True)]
    doses = [point.dose for point in policy]
    reach = _reach(shares, bounds)
    axes.errorbar(
        doses, shares, reach, color=BLUE, marker="o", elinewidth=1, label=_POLICY, zorder=3
    )
    of_controls = [getattr(point, outcome) for point in controls]
    doses = [point.dose for point in controls]
    axes.plot(doses, [mean for mean, _ in of_controls], "s--", **_CONTROL_MEAN)
    axes.plot(doses, [most for _, most in of_controls], ":", linewidth=1, **_CONTROL_MAX)
    axes.set_title(outcome)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _check_lines(curves: Sequence[object]) -> None:
    if not 1 <= len(curves) <= len(LINES):
        raise LabError(f"a plot takes a signal and up to {len(LINES) - 1} baselines")


def _diagonal(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    percent(axes.xaxis, axes.yaxis)


def _legend(figure: Figure, axes: Axes) -> None:
    """Name the policy, then its controls."""
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels = [_POLICY, _CONTROL_MEAN["label"], _CONTROL_MAX["label"]]
    figure.legend([named[label] for label in labels], labels, loc="outside lower center", ncols=3)


def _counted(bins: Sequence[ReliabilityBin]) -> str:
    counts = [b.count for b in bins]
    if not counts:
        return "no cases"
    each = f"{min(counts):,} to {max(counts):,}"
    return f"{sum(counts):,} cases in {len(counts)} bins of {each}"


def _wilson(share: float, of: DosePoint | Damage) -> Interval:
    return wilson(round(share * of.num_cases), of.num_cases)


def _reach(values: Sequence[float], bounds: Sequence[Interval | ReliabilityBin]) -> Floats:
    """How far the intervals reach below and above the values [2, N]."""
    low = [value - bound.low for value, bound in zip(values, bounds, strict=True)]
    high = [bound.high - value for value, bound in zip(values, bounds, strict=True)]
    reach: Floats = np.maximum(np.array([low, high]), 0.0)
    return reach


def _told(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
