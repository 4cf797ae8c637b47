"""Figures about layers over time and at the end: scales, clip values, and what quantization loses in each operand
slot.

Every figure has one panel per recipe and shows one run of it (the lowest seed that recorded layers): layers are what
is compared here, not seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fourbit.report._groups import Group
from fourbit.report._style import DEPTH, WIDTH, Plot, legend, looks, outer_labels, panel_title, panels, short, step_axis

# Tol's muted palette: none of its colours is one that stands for a recipe.
SLOT_COLOR = {
    "x_fprop": "#88CCEE",
    "w_fprop": "#44AA99",
    "g_dgrad": "#CC6677",
    "w_dgrad": "#DDCC77",
    "g_wgrad": "#332288",
    "x_wgrad": "#AA4499",
}


@dataclass(frozen=True)
class Statistic:
    """A number that is observed for each layer and slot, and how its figures are worded."""

    key: str
    title: str
    unit: str
    colors: str
    caption: str
    is_share: bool = True


STATISTICS = (
    Statistic(
        "underflow",
        "Underflow",
        "share of non-zero elements",
        "Oranges",
        "Share of the non-zero elements of an operand that were rounded to zero.",
    ),
    Statistic(
        "saturation",
        "Saturation",
        "share of elements",
        "Purples",
        "Share of the elements that lay beyond the largest number of the grid and were clipped to it.",
    ),
    Statistic(
        "sqnr_db",
        "Signal-to-quantization-noise ratio",
        "SQNR (dB)",
        "viridis",
        "Power of the operand over the power of its rounding error; higher is better, 0 dB means that the error is "
        "as large as the signal, and every 6 dB is one bit.",
        is_share=False,
    ),
)


def layer_lines(groups: Sequence[Group], key: str, title: str, unit: str, caption: str, name: str) -> Plot | None:
    """One line per layer over the steps, coloured by depth; `key` names a number that each layer has once."""
    shown = [g for g in groups if g.shown.scales.has(key)]
    if not shown:
        return None
    look = looks(groups)
    figure, axes = panels(len(shown), title, height=3.3 if len(shown) <= 3 else 2.7, extra=0.4)
    for axis, group in zip(axes, shown, strict=True):
        trace = group.shown.scales
        values = trace.values(key)
        having = np.flatnonzero(np.isfinite(values).any(axis=0))
        for i in having:
            depth = i / max(1, len(trace.layers) - 1)
            axis.plot(
                trace.steps,
                values[:, i] + (0.7 * (0.5 - depth) if key == "g_exponent" else 0.0),
                color=DEPTH(depth),
                linewidth=1.1,
                alpha=0.85,
                drawstyle="steps-mid" if key == "g_exponent" else "default",
                marker="o" if len(trace.steps) == 1 else None,
            )
        panel_title(axis, f"{group.name} ({len(having)} layer{'s' if len(having) > 1 else ''})", look[group.label])
        axis.set_ylabel(unit)
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=key == "g_exponent"))
        step_axis(axis)
    outer_labels(axes)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), DEPTH), ax=axes, fraction=0.02, pad=0.01, aspect=30)
    bar.set_ticks([0, 1], labels=["first", "last"])
    bar.set_label("quantized layer, by depth", labelpad=-12)
    return Plot(name, title, f"{caption} {_which_runs(shown)}", figure)


def grad_scales(groups: Sequence[Group]) -> Plot | None:
    """The power-of-two gradient multiplier of every layer over time."""
    return layer_lines(
        groups,
        "g_exponent",
        "GradScale of every layer",
        "log2 of the multiplier",
        "GradScale multiplies the gradient of each layer by a power of two so that its largest element sits in the "
        "top interval of the 4-bit grid. A line that climbs belongs to a layer whose gradients shrink; flipping between "
        "two neighbours is normal, while a line that only ever climbs means gradients of zero. Exponents are whole "
        "numbers; lines are drawn up to a third apart so that none hides another.",
        "gradscale",
    )


def clip_values(groups: Sequence[Group]) -> Plot | None:
    """The learned PACT clip value of every layer over time."""
    return layer_lines(
        groups,
        "x_alpha",
        "Learned clip value (PACT alpha) of every layer",
        "alpha (units of the activation)",
        "Activations above alpha are clipped to it, and the 4-bit steps divide the range from 0 to alpha (from -alpha "
        "where inputs go negative). Over a long training they usually fall and settle; one that nears zero switches its "
        "layer off. Layers without a clip value, such as those in 16 bits, are left out.",
        "alpha",
    )


def slot_lines(groups: Sequence[Group]) -> Plot | None:
    """Underflow, saturation and SQNR of every slot over time: median over layers and the middle 80 %."""
    shown = [g for g in groups if any(g.shown.trace.has(s, "underflow") for s in g.shown.trace.slots())]
    if not shown:
        return None
    look = looks(groups)
    title = "Quantization over time: median over the layers"
    figure = Figure(figsize=(WIDTH, 2.1 * len(shown) + 0.9), layout="constrained")
    grid = figure.subplots(len(shown), len(STATISTICS), squeeze=False, sharey="col")
    for axis in grid[-1]:
        axis.set_xlabel("optimizer step")
    slots: dict[str, Line2D] = {}
    for row, group in zip(grid, shown, strict=True):
        trace = group.shown.trace
        for axis, statistic in zip(row, STATISTICS, strict=True):
            for slot in trace.slots():
                if not trace.has(slot, statistic.key):
                    continue
                low, middle, high = _percentiles(trace.values(slot, statistic.key))
                color = SLOT_COLOR[slot]
                axis.fill_between(trace.steps, low, high, color=color, alpha=0.13, linewidth=0)
                axis.plot(trace.steps, middle, color=color, marker="o" if len(trace.steps) == 1 else None)
                slots.setdefault(slot, Line2D([], [], color=color, linewidth=2))
            axis.tick_params(labelleft=True)
            axis.set_ylabel(
                f"{statistic.key}\n({statistic.unit})" if statistic.is_share else statistic.unit, fontsize=8
            )
            if statistic.is_share:
                axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
            step_axis(axis, "optimizer step" if row is grid[-1] else "")
        panel_title(row[0], group.name, look[group.label], 36)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    legend(figure, {s: slots[s] for s in SLOT_COLOR if s in slots})
    return Plot(
        "slots-over-time",
        title,
        "One row per recipe: underflow, saturation, signal-to-quantization-noise ratio. Lines are medians over the "
        "quantized layers, bands hold the middle 80 % of them. Slots are named operand_product: g_dgrad is the output "
        f"gradient in the product that gives dx, g_wgrad the same in the product that gives dw. {_which_runs(shown)}",
        figure,
    )


def slot_map(groups: Sequence[Group], statistic: Statistic) -> Plot | None:
    """A heat map per recipe, layers by slots, of the newest observation."""
    shown = [g for g in groups if any(g.shown.trace.has(s, statistic.key) for s in g.shown.trace.slots())]
    if not shown:
        return None
    look = looks(groups)
    tables = [np.stack([g.shown.trace.last(s, statistic.key) for s in g.shown.trace.slots()], axis=1) for g in shown]
    num_layers = max(len(t) for t in tables)
    same = all(g.shown.trace.layers == shown[0].shown.trace.layers for g in shown)
    columns = 3 if not same or len(shown) <= 3 else 4 if len(shown) <= 8 or max(len(g.name) for g in shown) > 18 else 5
    title = f"{statistic.title} by layer and slot, newest observation"
    height = 0.75 + _row_height(num_layers) * num_layers
    figure, axes = panels(len(shown), title, columns=columns, height=height, sharey=False, extra=0.75)
    finite = np.concatenate([t[np.isfinite(t)] for t in tables])
    norm = Normalize(0, max(float(finite.max()), 0.01)) if statistic.is_share else Normalize(finite.min(), finite.max())
    for axis, group, table in zip(axes, shown, tables, strict=True):
        axis.imshow(table, aspect="auto", cmap=statistic.colors, norm=norm, interpolation="nearest")
        spec = axis.get_subplotspec()
        _name_cells(axis, group, named=not same or spec is None or spec.is_first_col())
        if len(table) <= 40:
            _write_numbers(axis, table, statistic, norm)
        panel_title(axis, group.name, look[group.label], 90 // min(columns, len(shown)) - 1)
        axis.grid(False)
    bar = figure.colorbar(
        ScalarMappable(norm, statistic.colors), ax=axes, orientation="horizontal", fraction=0.02, aspect=60, pad=0.01
    )
    bar.ax.locator_params(axis="x", nbins=2)
    bar.set_label(statistic.unit)
    if statistic.is_share:
        bar.ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    return Plot(
        f"map-{statistic.key.replace('_', '-')}",
        title,
        f"{statistic.caption} One row per layer from input (top) to output; darker is more; "
        f"an empty cell was not observed. {_which_runs(shown)}"
        if statistic.is_share
        else f"{statistic.caption} One row per layer from input (top) to output; an empty cell was not observed. "
        f"{_which_runs(shown)}",
        figure,
    )


def _row_height(num_layers: int) -> float:
    """Inches for one layer of a heat map: enough for its name where there are few, less where there are many."""
    return max(0.13, min(0.21, 8.5 / num_layers))


def _name_cells(axis: Axes, group: Group, named: bool) -> None:
    trace = group.shown.trace
    every = max(1, round(len(trace.layers) / 70))  # names further apart than every one, so that they never touch
    rows = range(0, len(trace.layers), every)
    size = min(8.0, 45 * every * _row_height(len(trace.layers)))  # in points: 0.62 of the distance between names
    axis.set_yticks(list(rows), [short(trace.layers[i], 26) if named else "" for i in rows], fontsize=size)
    axis.set_xticks(
        range(len(trace.slots())), trace.slots(), fontsize=7.5, rotation=40, ha="right", rotation_mode="anchor"
    )
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)


def _write_numbers(axis: Axes, table: np.ndarray, statistic: Statistic, norm: Normalize) -> None:
    for (row, column), value in np.ndenumerate(table):
        if not np.isfinite(value):
            continue
        level = float(norm(value))
        light = level > 0.6 if statistic.is_share else level < 0.5
        label = f"{value:.0f}" if not statistic.is_share else _share(value)
        axis.text(column, row, label, ha="center", va="center", fontsize=6.5, color="white" if light else "black")


def _share(value: float) -> str:
    """A fraction as percent in few characters.

    >>> [_share(v) for v in (0.0, 0.0001, 0.034, 0.4)]
    ['0', '<0.1', '3.4', '40']
    """
    percent = 100 * value
    if percent == 0:
        return "0"
    return "<0.1" if percent < 0.1 else f"{percent:.1f}" if percent < 9.95 else f"{percent:.0f}"


def _percentiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step at which no layer was observed
        low, middle, high = np.nanpercentile(values, [10, 50, 90], axis=1)
    return low, middle, high


def _which_runs(groups: Sequence[Group]) -> str:
    seeds = sorted({g.shown.seed for g in groups})
    return f"Shown is the run with seed {seeds[0]}." if len(seeds) == 1 else "Shown is the lowest seed of each recipe."
