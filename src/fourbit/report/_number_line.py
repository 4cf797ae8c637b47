"""A number format as a picture: its numbers on a line, and where rounding moves from one to the next.

Of a format with thousands of numbers a line would be black from end to end; it is drawn by its precision instead.
"""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fourbit.formats import Format
from fourbit.report._style import DPI, WIDTH, style

MAX_LABELS = 33
"""Grids with more numbers than this go without a label for each."""

MAX_TICKS = 256
"""Grids with more numbers than this are drawn by their precision."""

NUMBERS, DECISIONS = "#0072B2", "#D55E00"
ZERO, CLIPPED = "#888888", "#CC3311"


def draw_number_line(format: Format) -> Figure:
    """The numbers of a format and its decision points, or, of grids with more than 256 numbers, its precision.

    Two panels: the numbers to scale, and on a logarithmic axis that starts at the smallest magnitude. Numbers are long
    ticks, decision points short ones; the second panel shows positive numbers only, with the value of each number above
    it and the value of each decision point below (for grids of up to 33 numbers). The precision of a fine grid is the
    largest relative error of nearest rounding over the magnitude, with what becomes zero and what exceeds the range.
    """
    return _draw_precision(format) if len(format.grid) > MAX_TICKS else _draw_ticks(format)


def _draw_precision(format: Format) -> Figure:
    """Largest relative error of nearest rounding over the magnitude, both logarithmic, with the ends of the range."""
    magnitudes = [v for v in format.grid if v > 0]
    points = [p for p in format.decision_points if p > magnitudes[0]]
    errors = [(high - point) / point for point, high in zip(points, magnitudes[1:], strict=True)]
    with style():
        figure = Figure(figsize=(WIDTH, 4.2), dpi=DPI, layout="constrained")
        axis = figure.subplots()
        figure.suptitle(f"{format.name}: {format.summary}", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.plot(points, errors, color=NUMBERS, linewidth=1.0, label="largest relative error of nearest rounding")
        axis.margins(x=0.08)
        axis.autoscale_view()
        left, right = axis.get_xlim()
        threshold = next(p for p in format.decision_points if p > 0)
        if 0 in format.grid:
            axis.axvspan(left, threshold, color=ZERO, alpha=0.18, linewidth=0, label="rounded to zero")
        beyond = "clipped to the largest" if format.overflow == "saturate" else "infinity"
        axis.axvspan(format.max, right, color=CLIPPED, alpha=0.14, linewidth=0, label=beyond)
        axis.set_xlim(left, right)
        axis.set_xlabel(f"magnitude (smallest {format.smallest:.6g}, largest {format.max:.6g}), in units of the scale")
        axis.set_ylabel("relative error")
        figure.legend(loc="outside lower center", ncols=3)
    return figure


def _draw_ticks(format: Format) -> Figure:
    with style():
        figure = Figure(figsize=(WIDTH, 3.6), dpi=DPI, layout="constrained")
        whole, positive = figure.subplots(2, 1)
        figure.suptitle(f"{format.name}: {format.summary}", fontsize=10)
        _ticks(whole, format.grid, format.decision_points)
        whole.set_title("to scale", loc="left")
        magnitudes = [v for v in format.grid if v > 0]
        points = [v for v in format.decision_points if v > 0]
        positive.set_xscale("log", base=2)
        _ticks(positive, magnitudes, points)
        positive.set_title(
            "magnitudes, logarithmic axis" + (" (0 lies at the far left)" if 0 in format.grid else ""), loc="left"
        )
        positive.xaxis.set_minor_locator(NullLocator())
        if len(magnitudes) <= MAX_LABELS:
            for value in magnitudes:
                positive.text(value, 1.04, _text(value), ha="center", va="bottom", fontsize=7, color=NUMBERS)
            for value in points:
                positive.text(
                    value, -0.06, _text(value), ha="center", va="top", fontsize=6.5, color=DECISIONS, rotation=35
                )
            positive.set_xticks([])
            positive.set_ylim(-0.75, 1.35)
        positive.set_xlabel("value, in units of the scale")
        handles, labels = whole.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def _ticks(axis, numbers, points) -> None:
    axis.vlines(numbers, 0, 1, colors=NUMBERS, linewidth=1.6 if len(numbers) < 64 else 0.4, label="numbers")
    axis.vlines(points, 0, 0.45, colors=DECISIONS, linewidth=1.0 if len(points) < 64 else 0.2, label="decision points")
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.set_yticks([])
    axis.grid(False)
    axis.spines["left"].set_visible(False)


def _text(value: float) -> str:
    log2 = math.log2(value)
    if log2.is_integer() and abs(log2) > 6:
        return f"$2^{{{int(log2)}}}$"
    return f"{value:.9g}"
