"""What all plots share: colours, style, and how a figure becomes the same PNG bytes every time.

Figures are made without pyplot, whose list of figures and backend are global. Colours are those
of Okabe and Ito, which the colour-blind can tell apart; lines differ in dash and marker as well.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Final, Literal, ParamSpec

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

P = ParamSpec("P")

BLUE: Final = "#0072B2"
ORANGE: Final = "#D55E00"
GREY: Final = "#767676"
DARK: Final = "#444444"

LINES: Final[tuple[dict[str, Any], ...]] = (
    {"color": BLUE, "linestyle": "-", "marker": "o"},
    {"color": ORANGE, "linestyle": "--", "marker": "s"},
    {"color": "#00795A", "linestyle": "-.", "marker": "^"},
    {"color": "#A3508A", "linestyle": ":", "marker": "D"},
)
"""The signal first, then its baselines. Green and purple are darkened: names are set in them."""

_STYLE: Final[dict[Any, Any]] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "text.parse_math": False,
    "axes.titlesize": 9.0,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": DARK,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
}
_NUM_COLOURS: Final = 96
_TITLE_LETTERS_PER_INCH: Final = 10


def drawn(plot: Callable[P, Figure]) -> Callable[P, bytes]:
    """Draw in the style above, and return the PNG."""

    @wraps(plot)
    def draw(*args: P.args, **kwargs: P.kwargs) -> bytes:
        full, small = io.BytesIO(), io.BytesIO()
        with mpl.rc_context(_STYLE):
            plot(*args, **kwargs).savefig(full, format="png", backend="agg")
        # A palette takes a third of the bytes, and Pillow adds no version and no date.
        Image.open(full).convert("RGB").quantize(_NUM_COLOURS).save(small, "PNG", optimize=True)
        return small.getvalue()

    return draw


def new_figure(title: str, width: float, height: float) -> Figure:
    """A figure with nothing but a title, in inches."""
    figure = Figure((width, height), dpi=120, layout="constrained")
    lines = textwrap.fill(title, int(width * _TITLE_LETTERS_PER_INCH))
    figure.suptitle(lines, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def percent(*axes: Axis) -> None:
    """Tell shares in percent."""
    for axis in axes:
        axis.set_major_formatter(PercentFormatter(1.0))


def name_lines(
    axes: Axes, names: Sequence[str], corner: Literal["top left", "bottom right"], heading: str
) -> None:
    """Write the lines' names in their colours where the lines are not, under a heading."""
    told = [(heading, DARK), *((n, ln["color"]) for n, ln in zip(names, LINES, strict=False))]
    vertical, side = corner.split()
    for i, (text, color) in enumerate(told):
        down = 0.05 * i
        y = 0.99 - down if vertical == "top" else 0.02 + 0.05 * (len(told) - 1) - down
        axes.text(
            0.02 if side == "left" else 0.98,
            y,
            text,
            {"color": color, "ha": side, "va": vertical, "fontsize": 8.5},
            transform=axes.transAxes,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.0},
        )
