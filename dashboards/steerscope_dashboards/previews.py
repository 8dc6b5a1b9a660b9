"""Pictures of the dashboards from what a Prometheus answers: our own drawing, not Grafana's."""

from __future__ import annotations

import io
import math
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from steerscope_dashboards import expressions
from steerscope_dashboards.answers import TIME_RANGE, Prometheus, Series
from steerscope_dashboards.expressions import Expression, Role, Shown

COLUMNS: Final = 4
NOTE: Final = "rendered by Steerscope, not Grafana; data of a real Prometheus; zero lines unnamed"
MAX_LEGENDS: Final = 6
DPI: Final = 75
COLORS: Final = 256

mpl.use("Agg")


class Choice(NamedTuple):
    """Values of variables, as regular expressions, and the seconds that are shown."""

    variables: Mapping[str, str]
    seconds: float


class _View(NamedTuple):
    """What a panel's answer depends on, beside the panel."""

    prometheus: Prometheus
    window: str
    variables: Mapping[str, str]
    start: float
    end: float


def draw(prometheus: Prometheus, generated: Path, folder: Path, choice: Choice) -> list[Path]:
    """One picture for each dashboard."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.time()
    view = _View(
        prometheus, prometheus.rate_interval(), choice.variables, end - choice.seconds, end
    )
    drawn = []
    for board in expressions.boards(generated):
        figure = _figure(board.stem, list(expressions.panels(board)))
        for axes, panel in zip(figure.axes, expressions.panels(board), strict=True):
            _draw_panel(axes, panel, view)
        path = folder / f"{board.stem}.png"
        _save(figure, path)
        drawn.append(path)
    return drawn


def _save(figure: Figure, path: Path) -> None:
    """With a palette: a third of the bytes, and nothing that one would see is lost."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(COLORS).save(path, optimize=True)


def _figure(title: str, panels: Sequence[Shown]) -> Figure:
    """Numbers take one column, everything else two, and begin a row, as in Grafana."""
    places: list[tuple[int, int, int]] = []
    row = column = 0
    for panel in panels:
        width = 1 if panel.kind == "stat" else COLUMNS // 2
        begins = panel.kind == "stat" and places and places[-1][2] > width
        if column + width > COLUMNS or begins:
            row, column = row + 1, 0
        places.append((row, column, width))
        column += width
    heights = [0.6 if _only_numbers(panels, places, at) else 1.0 for at in range(row + 1)]
    figure = Figure(figsize=(14, 2.9 * sum(heights) + 0.8), layout="constrained")
    grid = figure.add_gridspec(row + 1, COLUMNS, height_ratios=heights)
    for at, first, width in places:
        figure.add_subplot(grid[at, first : first + width])
    figure.suptitle(f"{title}    ({NOTE})", fontsize=11)
    return figure


def _only_numbers(
    panels: Sequence[Shown], places: Sequence[tuple[int, int, int]], row: int
) -> bool:
    pairs = zip(panels, places, strict=True)
    return all(panel.kind == "stat" for panel, place in pairs if place[0] == row)


def _draw_panel(axes: Axes, panel: Shown, view: _View) -> None:
    texts = [
        Expression(Role.PANEL, "", text).filled(view.window, TIME_RANGE, view.variables)
        for text, _ in panel.targets
    ]
    axes.set_title(panel.title, fontsize=9, loc="left")
    axes.tick_params(labelsize=7)
    if panel.kind in ("stat", "table"):
        _write(axes, panel, view.prometheus.now(texts[0]))
        return
    step = max((view.end - view.start) / 60, 1.0)
    answers = [view.prometheus.over(text, view.start, view.end, step) for text in texts]
    if panel.kind == "heatmap":
        _heat(axes, answers[0], view.end)
    else:
        _lines(axes, panel, answers, view.end)


def _write(axes: Axes, panel: Shown, series: Sequence[Series]) -> None:
    axes.axis("off")
    if panel.kind == "stat":
        text, size = _number(series[0].points[0][1] if series else math.nan, panel.unit), 22
    else:
        rows = (", ".join(f"{k}={v[:16]}" for k, v in sorted(s.labels.items())) for s in series)
        text, size = "\n".join("\n".join(textwrap.wrap(row, 75)) for row in rows), 8
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=size, transform=axes.transAxes)


def _lines(axes: Axes, panel: Shown, answers: Sequence[Sequence[Series]], end: float) -> None:
    drawn = 0
    for series, (_, legend) in zip(answers, panel.targets, strict=True):
        for one in series:
            times = [at - end for at, _ in one.points]
            values = [value for _, value in one.points]
            is_named = drawn < MAX_LEGENDS and any(values)
            label = _legend(legend, one.labels) if is_named else None
            axes.plot(times, values, linewidth=1.2, label=label)
            drawn += is_named
    _finish(axes, panel.unit)
    if drawn:
        axes.legend(fontsize=6, loc="upper left", ncols=2, framealpha=0.6)


def _finish(axes: Axes, unit: str) -> None:
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.set_xlabel("seconds before now", fontsize=7)
    if unit == "percentunit":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    elif unit not in ("", "none"):
        axes.set_ylabel({"reqps": "requests/s", "short": ""}.get(unit, unit), fontsize=7)


def _heat(axes: Axes, series: Sequence[Series], end: float) -> None:
    ordered = sorted(series, key=lambda one: float(one.labels["le"]))
    if not ordered:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)
        return
    times = sorted({at for one in ordered for at, _ in one.points})
    cumulative = [[dict(one.points).get(at, math.nan) for at in times] for one in ordered]
    below: list[list[float]] = [[0.0] * len(times), *cumulative[:-1]]
    cells = [
        [max(value - under, 0.0) for value, under in zip(row, lower, strict=True)]
        for row, lower in zip(cumulative, below, strict=True)
    ]
    axes.pcolormesh([at - end for at in times], range(len(ordered)), cells, cmap="Blues")
    axes.set_yticks(range(len(ordered)), [one.labels["le"] for one in ordered], fontsize=6)
    axes.set_xlabel("seconds before now", fontsize=7)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    text = template
    for label, value in labels.items():
        text = text.replace(f"{{{{{label}}}}}", value)
    return text


def _number(value: float, unit: str) -> str:
    if not math.isfinite(value):
        return "No traffic"
    formats: dict[str, Any] = {
        "percentunit": f"{value:.2%}",
        "s": f"{value:.2g} s",
        "none": f"{value:.2f}",
    }
    return str(formats.get(unit, f"{value:,.0f}"))
