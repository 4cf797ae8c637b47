"""The drawings of the concept pages, from the formats themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from fourbit.formats import get

INK, SOFT, ONE, TWO, THREE = "#22303c", "#9aa7b1", "#0072b2", "#d55e00", "#009e73"


def draw_all(folder: Path) -> None:
    """Write every drawing into `folder`."""
    for name, draw in (
        ("products", products),
        ("scales", scales),
        ("tiles", tiles),
        ("radix", radix),
        ("two-phases", two_phases),
    ):
        figure = draw()
        figure.savefig(folder / f"{name}.svg", format="svg", facecolor="white", metadata={"Date": None})


def products() -> Figure:
    """Three products, each with two operands in, one result out, and where each operand comes from."""
    figure, axes = _canvas(9, 3.3, (0, 9), (0, 3.3))
    rows = (
        (0.3, "fprop", ("x_fprop", "w_fprop"), "y", ONE, "the next layer"),
        (3.3, "dgrad", ("g_dgrad", "w_dgrad"), "dx", TWO, "the layer before"),
        (6.3, "wgrad", ("g_wgrad", "x_wgrad"), "dw", THREE, "the optimizer"),
    )
    for left, name, slots, result, color, where in rows:
        axes.text(left + 1.2, 3.05, name, ha="center", va="center", color=color, fontsize=13, fontweight="bold")
        for number, slot in enumerate(slots):
            x = left + 1.25 * number
            _box(axes, x, 2.0, 1.15, 0.6, color)
            axes.text(x + 0.575, 2.38, slot, ha="center", va="center", color=INK, fontsize=9, family="monospace")
            axes.text(x + 0.575, 2.14, "4 bits", ha="center", va="center", color=SOFT, fontsize=8)
            _arrow(axes, (x + 0.575, 2.0), (left + 1.2, 1.5), color)
        axes.text(left + 1.2, 1.37, "multiply, add", ha="center", va="center", color=INK, fontsize=9)
        _arrow(axes, (left + 1.2, 1.24), (left + 1.2, 0.85), color)
        axes.text(left + 1.2, 0.68, result, ha="center", va="center", color=INK, fontsize=12, style="italic")
        axes.text(left + 1.2, 0.36, f"16 bits, to {where}", ha="center", va="center", color=SOFT, fontsize=8)
    return figure


def scales() -> Figure:
    """The same numbers, normally distributed, on INT4's grid with a large, a fitting and a small scale."""
    numbers = np.sort(np.random.default_rng(3).normal(size=60))
    grid = np.array(get("int4_sym").grid)
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for row, (scale, said) in enumerate(
        ((1.2, "scale 1.2: most become 0"), (0.36, "scale 0.36: fits"), (0.1, "scale 0.1: large ones are cut off"))
    ):
        axes = figure.add_subplot(3, 1, row + 1)
        near = scale * grid[np.abs(numbers[:, None] / scale - grid).argmin(1)]
        for value, becomes in zip(numbers, near, strict=True):
            axes.plot([value, becomes], [1, 0], color=SOFT, linewidth=0.6, zorder=1)
        axes.scatter(numbers, np.ones_like(numbers), s=9, color=ONE, zorder=2)
        shown = scale * grid
        axes.scatter(shown, np.zeros_like(shown), s=26, marker="|", color=INK, zorder=2)
        axes.set_xlim(-3.4, 3.4)
        axes.set_ylim(-0.35, 1.3)
        error = np.sqrt(np.square(near - numbers).sum() / np.square(numbers).sum())
        axes.set_ylabel("")
        axes.set_title(f"{said} (relative error {error:.2f})", fontsize=9, loc="left", color=INK)
        _bare(axes)
    return figure


def tiles() -> Figure:
    """An operand of 8 rows and 16 terms, coloured by who shares a scale."""
    rows, terms = np.mgrid[0:8, 0:16]
    kinds = (
        ("tensor", np.zeros((8, 16))),
        ("row", rows),
        ("Block(4)", rows * 4 + terms // 4),
        ("Tile(4, 4)", (rows // 4) * 4 + terms // 4),
    )
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    for number, (name, owner) in enumerate(kinds):
        axes = figure.add_subplot(1, 4, number + 1)
        shade = (owner * 7 % 16) / 16 * 0.75 + 0.15
        axes.pcolormesh(shade, cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.set_title(
            f"{name}: {len(np.unique(owner))} scale{'s' * (len(np.unique(owner)) > 1)}", fontsize=9, color=INK
        )
        axes.set_xlabel("terms of a sum", fontsize=8, color=SOFT)
        axes.set_ylabel("rows" if number == 0 else "", fontsize=8, color=SOFT)
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def radix() -> Figure:
    """The positive numbers of three formats of 4 bits, each with its largest at 1."""
    figure = Figure(figsize=(8, 2.1), layout="constrained")
    axes = figure.add_subplot()
    names = (("int4_sym", "INT4", INK), ("fp4_r2", "radix-2 FP4", ONE), ("fp4_r4_even", "radix-4 FP4", TWO))
    for height, (name, said, color) in enumerate(reversed(names)):
        grid = np.array([v for v in get(name).grid if v > 0])
        axes.scatter(grid / grid.max(), np.full_like(grid, height), color=color, s=36, zorder=2)
        axes.plot([grid.min() / grid.max(), 1], [height, height], color=color, linewidth=1, zorder=1)
        axes.text(1.6, height, f"{said}: {grid.max() / grid.min():g} to 1", va="center", fontsize=9, color=color)
    axes.set_xscale("log", base=2)
    axes.set_xlim(2.0**-13, 2.0**5)
    axes.set_ylim(-0.6, 2.6)
    axes.set_yticks([])
    axes.set_xticks([2.0**k for k in range(-12, 1, 2)], [f"2^{k}" if k else "1" for k in range(-12, 1, 2)], fontsize=8)
    axes.set_xlabel("magnitude, of the largest", fontsize=8, color=SOFT)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    return figure


def two_phases() -> Figure:
    """What each phase makes of a number, and the mean of both."""
    x = np.exp(np.linspace(np.log(0.2), np.log(40), 4000))
    even, odd = (_rounded(name, x) for name in ("fp4_r4_even", "fp4_r4_odd"))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(x, x, color=SOFT, linewidth=1, label="the number itself")
    axes.plot(x, even, color=TWO, linewidth=1.5, label="even phase (dgrad)")
    axes.plot(x, odd, color=ONE, linewidth=1.5, label="odd phase (wgrad)")
    axes.plot(x, (even + odd) / 2, color=THREE, linewidth=1, linestyle="--", label="mean of both")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xlabel("number", fontsize=9, color=INK)
    axes.set_ylabel("becomes", fontsize=9, color=INK)
    axes.legend(frameon=False, fontsize=9)
    for side in ("right", "top"):
        axes.spines[side].set_visible(False)
    return figure


def _rounded(name: str, x: np.ndarray) -> np.ndarray:
    format = get(name)
    points, grid = np.array(format.decision_points), np.array(format.grid)
    return grid[np.searchsorted(points, x, side="right")]


def _canvas(width: float, height: float, x: tuple[float, float], y: tuple[float, float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlim(*x)
    axes.set_ylim(*y)
    axes.axis("off")
    return figure, axes


def _box(axes: Any, x: float, y: float, width: float, height: float, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor="white", edgecolor=color, linewidth=1.4))


def _arrow(axes: Any, begin: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(FancyArrowPatch(begin, end, arrowstyle="-|>", mutation_scale=10, color=color, linewidth=1.2))


def _bare(axes: Any) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)
