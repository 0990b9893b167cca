"""One look for all figures: colours, lines, axes and numbers.

Figures are drawn in the light colours. Each is used for one thing only, so that `to_html_svg` can put the name of a CSS
variable in its place, and light and dark pages share a drawing.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

# name -> (light, dark). The six series keep apart under protanopia, deuteranopia and tritanopia (smallest CIELAB
# distance 24), and have a contrast of 3.5 and more with the paper, as WCAG 2.2 asks of graphics (3) and text (4.5).
PALETTE = {
    "paper": ("#ffffff", "#15181d"),
    "ink": ("#1c1e21", "#e8e9eb"),
    "muted": ("#5c6370", "#a3a9b4"),
    "grid": ("#dfe2e6", "#343a43"),
    "series-1": ("#1f52d0", "#4b8bf5"),
    "series-2": ("#e2600a", "#f0742f"),
    "series-3": ("#07997a", "#4fe38a"),
    "series-4": ("#b35fc0", "#c07fc0"),
    "series-5": ("#6e2c0a", "#f2d91c"),
    "series-6": ("#403148", "#c4e6d8"),
}
PAPER, INK, MUTED, GRID, *SERIES = (light for light, _ in PALETTE.values())
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 1)))
MARKERS = "osD^vP*"  # seven, and six colours: 42 series before two look the same
WIDTH = 5.0  # inches: nearly what a phone is wide, so that a figure on one needs no smaller letters than on paper
LONGEST_NAME = 40
BAND = 0.16  # opacity
MOST_BANDS = 2  # series that have one; more would hide each other
Z95 = 1.959963984540054  # standard errors on each side of a 95 % interval
SETTINGS = {
    "font.family": ["sans-serif"],
    "font.size": 9,
    "text.parse_math": False,  # a name with two dollar signs is no formula
    "text.color": INK,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "patch.linewidth": 0,
    "errorbar.capsize": 2,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 2.6,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "gpuxent",  # the same ids every time
}


def colour(number: int) -> str:
    """Of a run, by its place."""
    return SERIES[number % len(SERIES)]


def line(number: int) -> dict[str, Any]:
    """The look of the line of a run."""
    return {"color": colour(number), "linestyle": LINES[number % len(LINES)]}


def marked(number: int) -> dict[str, Any]:
    """The same with markers."""
    return line(number) | {"marker": MARKERS[number % len(MARKERS)]}


def marks(number: int) -> dict[str, Any]:
    """Markers without a line."""
    return marked(number) | {"linestyle": "none"}


# ---- words ----


def shown(name: str, longest: int = LONGEST_NAME) -> str:
    """A name in characters that only show themselves, cut in the middle if it is long."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest - 1) // 2 :]}"


def listed(parts: Sequence[str]) -> str:
    """a, b and c"""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def compact(value: float, _: Any = None) -> str:
    """A number on an axis: 20k, 1.5M, 0.001, 1e-06"""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size and value < 1e12:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


# ---- axes ----


def log_axis(axis: Any, low: float, high: float) -> None:
    """Ticks with plain numbers; over less than two decades at 2 and 5 as well."""
    from matplotlib import ticker

    few = high / low < 100 if low > 0 and math.isfinite(high) else False
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,), numticks=9))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(compact)


def count_axis(axis: Any) -> None:
    """Ticks at whole numbers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
    axis.set_major_formatter(compact)


def legend(axes: Any, several: bool) -> None:
    """Above the axes, in as many columns as the names leave room for; none of a report of a single run."""
    if not several:
        return
    handles, labels = axes.get_legend_handles_labels()
    columns = legend_columns(labels)
    axes.legend(handles, labels, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2, ncols=columns)


def legend_columns(labels: Sequence[str]) -> int:
    return max(1, min(3, len(labels), 68 // (max(map(_columns, labels)) + 9)))


def legend_height(labels: Sequence[str]) -> float:
    """About how many inches it takes."""
    return 0.17 * math.ceil(len(labels) / legend_columns(labels))


def _columns(text: str) -> int:
    """Roughly how wide a text is, in letters."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def note(axes: Any, text: str, where: str = "upper left") -> None:
    """Small words in a corner of the axes."""
    vertical, horizontal = where.split()
    axes.text(
        0.02 if horizontal == "left" else 0.98,
        0.97 if vertical == "upper" else 0.04,
        text,
        transform=axes.transAxes,
        ha=horizontal,
        va="top" if vertical == "upper" else "bottom",
        fontsize=8,
        color=MUTED,
        zorder=5,
        bbox={"facecolor": PAPER, "alpha": 0.75, "linewidth": 0, "pad": 1.5},
    )


def dodged(number: int, count: int) -> float:
    """How far to move the marks of a series aside, so that those of others are seen."""
    return min(0.2, 0.7 / count) * (number - (count - 1) / 2)


def finite(*columns: np.ndarray) -> np.ndarray:
    """Where all are."""
    return np.logical_and.reduce([np.isfinite(column) for column in columns])
