"""Where gradients fall on the 4-bit grid: histograms of log2|g / scale| with the grid of each rounding phase.

Dividing by the scale gives grid units, in which the grid is the same at every step and layer. Two-phase rounding
sends the same gradient through two grids, `g_dgrad` (even powers of two) and `g_wgrad` (odd powers); side by side one
sees that each phase is fine where the other is coarse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MultipleLocator, PercentFormatter

from fourbit.report._groups import Group
from fourbit.report._layers import SLOT_COLOR
from fourbit.report._read import number, text
from fourbit.report._style import WIDTH, Plot, legend, short

GRADIENT_SLOTS = {"g_dgrad": "gradient for dx", "g_wgrad": "gradient for dw"}
REUSED = "gradient for dx and dw"
ROUNDING = {
    "nearest": "Rounding is to the nearest number: a dotted line is where it changes from one to the next, and elements "
    "in the grey area become zero.",
    "stochastic": "Rounding is stochastic: an element between two numbers becomes one of them at random, the nearer the "
    "likelier, so that the mean is kept; below the smallest number it becomes that or zero in the same way.",
    "underflow": "Rounding is to the nearest number: a dotted line is where it changes from one to the next. Below the "
    "smallest number an element becomes that or zero at random, the nearer the likelier, so that the mean is kept.",
    "truncate": "Rounding is towards zero, and elements in the grey area become zero.",
}
LINES_AT_MOST = 24  # an 8-bit grid has over a hundred values: drawn, they would be a wall
GRID_COLOR = "#111111"


@dataclass(frozen=True)
class Histogram:
    """Counts between edges (log2 of grid units), how many exact zeros, and the positive part of the grid.

    `decisions` is empty unless rounding is "nearest": nothing else is decided at points. `reused`: the numbers of g_dgrad
    serve the product that gives dw too.
    """

    edges: np.ndarray
    shares: np.ndarray
    zeros: float
    grid: tuple[float, ...]
    decisions: tuple[float, ...]
    rounding: str = "nearest"
    reused: bool = False


def parse(entry: object) -> Histogram | None:
    """A histogram as the trainer writes it; None if it is missing, empty or malformed."""
    if not isinstance(entry, dict):
        return None
    edges, counts = _numbers(entry.get("log2_edges")), _numbers(entry.get("counts"))
    zeros = number(entry.get("zeros", 0))
    total = counts.sum() + (zeros if math.isfinite(zeros) else 0)
    if len(counts) == 0 or len(edges) != len(counts) + 1 or not np.isfinite(edges).all() or not total > 0:
        return None
    rounding = text(entry.get("rounding", "nearest"))
    decisions = _numbers(entry.get("decision_points")) if rounding == "nearest" else ()
    return Histogram(
        edges,
        counts / total,
        (zeros if math.isfinite(zeros) else 0.0) / total,
        tuple(float(v) for v in _numbers(entry.get("grid")) if v > 0),
        tuple(float(v) for v in decisions if v > 0),
        rounding,
        entry.get("reused") is True,
    )


def gradient_histograms(group: Group, index: int) -> Plot | None:
    """First, middle and last 4-bit layer of one recipe, both phases; filled now, outlined at the first observation."""
    records = group.shown.histograms
    if not records:
        return None
    first, last = _layers(records[0], group.recipe), _layers(records[-1], group.recipe)
    names = [n for n, slots in last.items() if any(slots.values())]
    if not names:
        return None
    coarse = [n for n in names if any(map(_is_coarse, last[n].values()))]
    names = coarse or names  # layers in 16 bits, such as the first and the last, show nothing of interest
    chosen = list(dict.fromkeys([names[0], names[len(names) // 2], names[-1]]))
    slots = [s for s in GRADIENT_SLOTS if any(last[n][s] for n in chosen)]
    title = f"Gradients on the grid: {short(group.name, 60)}"
    figure = Figure(figsize=(WIDTH, 1.95 * len(chosen) + 1.0), layout="constrained")
    grid = figure.subplots(len(chosen), len(slots), squeeze=False, sharex=True)
    keys: dict[str, Artist] = {}
    for name, row in zip(chosen, grid, strict=True):
        for axis, slot in zip(row, slots, strict=True):
            now = last[name][slot]
            before = first[name][slot] if records[0] is not records[-1] and name in first else None
            purpose = REUSED if now is not None and now.reused else GRADIENT_SLOTS[slot]
            axis.set_title(f"{short(name, 28)}: {slot}, {purpose}", loc="left", fontsize=9)
            if now is None:
                axis.text(
                    0.5,
                    0.5,
                    "no numbers of its own here: full precision, or those of the other product",
                    ha="center",
                    transform=axis.transAxes,
                    color="#666666",
                )
                continue
            keys |= _draw(axis, now, before, SLOT_COLOR[slot], slot)
            if name == chosen[-1]:
                axis.set_xlabel("log2 |g / scale| (grid units)")
        row[0].set_ylabel("share of elements")
    shown = {(n, s): h for n in chosen for s in slots if (h := last[n][s]) is not None}
    _limit(grid, list(shown.values()))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    legend(figure, keys)
    rounding = _rounding({slot: h.rounding for (_, slot), h in shown.items()})
    steps = f"step {records[-1]['step']}" + (
        f", the outline at step {records[0]['step']}" if records[0] is not records[-1] else ""
    )
    return Plot(
        f"gradients-{index:02d}",
        title,
        f"Filled: all gradient elements of a layer at {steps}, seed {group.shown.seed}. A solid line is a number that "
        f"the format has. {rounding} Elements in the red area are clipped to the largest number.",
        figure,
    )


def _rounding(by_slot: Mapping[str, str]) -> str:
    """What the caption says about the way from an element to a number of the grid."""
    if len(set(by_slot.values())) == 1:
        return ROUNDING.get(next(iter(by_slot.values())), "")
    return " ".join(f"{slot}: {ROUNDING.get(rounding, '')}" for slot, rounding in by_slot.items())


def _is_coarse(histogram: Histogram | None) -> bool:
    return histogram is not None and 0 < len(histogram.grid) <= LINES_AT_MOST


def _draw(axis: Axes, now: Histogram, before: Histogram | None, color: str, slot: str) -> dict[str, Artist]:
    keys: dict[str, Artist] = {}
    axis.stairs(now.shares, now.edges, fill=True, color=color, alpha=0.45)
    keys[f"{slot}, newest"] = Patch(color=color, alpha=0.45)
    if before is not None:
        axis.stairs(before.shares, before.edges, color=color, linewidth=1.1)
        keys[f"{slot}, first"] = Line2D([], [], color=color, linewidth=1.1)
    if _is_coarse(now):
        for value in now.grid:
            axis.axvline(math.log2(value), color=GRID_COLOR, linewidth=0.9)
        keys["number of the grid"] = Line2D([], [], color=GRID_COLOR, linewidth=0.9)
        for value in now.decisions:
            axis.axvline(math.log2(value), color=GRID_COLOR, linewidth=0.9, linestyle=(0, (1, 2)))
            keys["decision point"] = Line2D([], [], color=GRID_COLOR, linewidth=0.9, linestyle=(0, (1, 2)))
        zero_below = now.decisions if now.rounding == "nearest" else now.grid if now.rounding == "truncate" else ()
        if zero_below:
            axis.axvspan(-200, math.log2(min(zero_below)), color="#888888", alpha=0.18, linewidth=0)
            keys["rounded to zero"] = Patch(color="#888888", alpha=0.18)
    if now.grid:
        axis.axvspan(math.log2(max(now.grid)), 200, color="#CC3311", alpha=0.14, linewidth=0)
        keys["clipped to the largest"] = Patch(color="#CC3311", alpha=0.14)
    if now.zeros > 0.0005:
        axis.text(
            1.0, 1.02, f"+ {100 * now.zeros:.2g} % exact zeros", ha="right", va="bottom", fontsize=7.5,
            transform=axis.transAxes, color="#555555",
        )  # fmt: skip
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.grid(False)
    return keys


def _limit(grid: np.ndarray, shown: Sequence[Histogram]) -> None:
    """A common x range: the data (but for its far tails) and the grid; whole octaves, grid values labelled."""
    low, high = [], []
    for h in shown:
        seen = np.cumsum(h.shares) / max(float(h.shares.sum()), 1e-30)
        low.append(h.edges[int(np.searchsorted(seen, 0.002))])
        high.append(h.edges[min(int(np.searchsorted(seen, 1.0 - 1e-9)) + 1, len(h.edges) - 1)])
        if h.grid:
            low.append(math.log2(min(h.grid)) - 2)
            high.append(math.log2(max(h.grid)) + 1.5)
    if not low:
        return
    left, right = math.floor(max(min(low), max(high) - 40)), math.ceil(max(high))
    for axis in grid.flat:
        axis.set_xlim(left, right)
        step = 2 if right - left <= 28 else 4
        axis.xaxis.set_major_locator(MultipleLocator(step))
        axis.xaxis.set_minor_locator(FixedLocator([]))


def _layers(record: Mapping[str, Any], recipe: str) -> dict[str, dict[str, Histogram | None]]:
    """{layer: {gradient slot: histogram}} of a line of the file.

    Runs of the first version do not say how they rounded, nor what was reused. Of the recipes that there were, LUQ's
    rounded stochastically, and a gradient that was not quantized for dw apart was reused for it.
    """
    layers = record.get("histograms")
    entries = {k: v for k, v in layers.items() if isinstance(v, dict)} if isinstance(layers, dict) else {}
    found: dict[str, dict[str, Histogram | None]] = {}
    for name, slots in entries.items():
        unsaid = {"rounding": "stochastic" if "luq" in recipe else "nearest", "reused": "g_wgrad" not in slots}
        both = {slot: slots.get(slot) for slot in GRADIENT_SLOTS}
        found[name] = {slot: parse(unsaid | e if isinstance(e, dict) else None) for slot, e in both.items()}
    return found


def _numbers(values: object) -> np.ndarray:
    return np.array([number(v) for v in values], dtype=float) if isinstance(values, list) else np.zeros(0)
