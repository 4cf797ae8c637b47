"""A number format as a picture: its numbers on a line, and where rounding moves from one to the next."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from fourbit.formats import Format
from fourbit.report._style import DPI, WIDTH, style

MAX_LABELS = 33
"""Grids with more numbers than this go without a label for each."""

NUMBERS, DECISIONS = "#0072B2", "#D55E00"


def draw_number_line(format: Format) -> Figure:
    """Two panels: the numbers to scale, and on a logarithmic axis that starts at the smallest magnitude.

    Numbers are long ticks, decision points short ones; the second panel shows positive numbers only, with the value of
    each number above it and the value of each decision point below (for grids of up to 33 numbers).
    """
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
