"""The plots of the benchmarks: lines on log axes, bars of ratios, stacked bars. Colours go with the kind of entrant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

COLORS = {
    "limit": "#888888",
    "baseline": "#333333",
    "ours": "#0072B2",
    "reference": "#56B4E9",
    "compiled": "#009E73",
    "naive": "#E69F00",
    "peer": "#D55E00",
}
SERIES = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#999933",
    "#555555",
    "#bbbbbb",
    "#332288",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 10.5
_STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def _panels(count: int, columns: int, height: float, title: str) -> tuple[Figure, list[Any]]:
    columns = max(1, min(columns, count))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(WIDTH, rows * height + 0.8), layout="constrained")
    axes = [a for row in figure.subplots(rows, columns, squeeze=False) for a in row]
    for unused in axes[count:]:
        unused.remove()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, axes[:count]


Line = tuple[Sequence[float], Sequence[float], str]
"""x, y, and the kind of entrant."""


def lines(panels: Mapping[str, Mapping[str, Line]], title: str, x_label: str, y_labels: Sequence[str]) -> Figure:
    """One panel of lines on log axes per key, with a legend for all below; y labels are used in turn, row by row."""
    with rc_context(_STYLE):
        columns = min(3, len(panels)) if len(y_labels) == 1 else len(panels) // len(y_labels)
        figure, axes = _panels(len(panels), columns, 2.7, title)
        names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
        handles: dict[str, Any] = {}
        for i, (axis, (label, panel)) in enumerate(zip(axes, panels.items(), strict=True)):
            for name, (x, y, kind) in panel.items():
                position = names.index(name)
                handles[name] = axis.loglog(
                    x,
                    y,
                    color=COLORS[kind] if kind in ("limit", "ours") else SERIES[1:][position % (len(SERIES) - 1)],
                    linestyle="--" if kind == "limit" else "-",
                    linewidth=2.4 if kind == "ours" else 1.3,
                    marker=MARKERS[position % len(MARKERS)],
                    markersize=3.5,
                    zorder=3 if kind == "ours" else 2,
                )[0]
            axis.set_title(label, loc="left", fontweight="bold")
            axis.set_xlabel(x_label)
            _plain_ticks(axis, sorted({x for xs, _, _ in panel.values() for x in xs}))
            if i % columns == 0:
                axis.set_ylabel(y_labels[min(i // columns, len(y_labels) - 1)])
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _plain_ticks(axis: Any, sizes: Sequence[float]) -> None:
    """Ticks at the sizes themselves, and numbers instead of powers of ten where the range is small."""
    axis.set_xticks(sizes, [f"$2^{{{math.log2(s):g}}}$" if s >= 4096 else f"{s:g}" for s in sizes])
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = axis.get_ylim()
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    narrow = high / low < 30
    first = (1, 2, 3, 4, 5, 6, 8) if high / low < 6 else (1, 2, 5)
    minor = FuncFormatter(lambda v, _: f"{v:g}" if round(v / 10 ** math.floor(math.log10(v) + 1e-9)) in first else "")
    axis.yaxis.set_minor_formatter(minor if narrow else NullFormatter())


def bars(panels: Mapping[str, Mapping[str, tuple[Any, Any, str]]], title: str) -> Figure:
    """Horizontal bars of ratios (a `Spread`) with their quartiles and times, on a log axis, one panel per key."""
    with rc_context(_STYLE):
        most = max((len(panel) for panel in panels.values()), default=1)
        figure, axes = _panels(len(panels), 2, 0.24 * most + 0.7, title)
        for axis, (label, panel) in zip(axes, panels.items(), strict=True):
            for i, (relative, seconds, kind) in enumerate(panel.values()):
                error = [[relative.median - relative.low], [relative.high - relative.median]]
                axis.barh(i, relative.median, color=COLORS[kind], xerr=error, error_kw={"elinewidth": 0.8})
                text = f" {relative.median:.2f}  ({seconds.median * 1e3:.0f} ms)"
                axis.text(relative.high, i, text, va="center", fontsize=7.5)
            axis.set_yticks(range(len(panel)), list(panel))
            axis.invert_yaxis()
            axis.set_xscale("log")
            values = [relative.median for relative, _, _ in panel.values()] or [1.0]
            axis.set_xlim(min(values) / 2, max(values) * 6)
            axis.axvline(1.0, color="#333333", linewidth=0.8)
            axis.set_title(label, loc="left", fontweight="bold")
            axis.grid(False, axis="y")
    return figure


def stacks(panels: Mapping[str, Mapping[str, Mapping[str, float]]], parts: Sequence[str], title: str) -> Figure:
    """Stacked horizontal bars of milliseconds, one panel per key."""
    with rc_context(_STYLE):
        figure, axes = _panels(len(panels), 2, 1.5, title)
        handles: dict[str, Any] = {}
        for axis, (label, panel) in zip(axes, panels.items(), strict=True):
            for i, seconds in enumerate(panel.values()):
                left = 0.0
                for part, color in zip(parts, SERIES[: len(parts)], strict=True):
                    width = seconds.get(part, 0.0) * 1e3
                    bar = axis.barh(i, width, left=left, color=color)
                    left += width
                    if width:
                        handles.setdefault(part, bar)
            axis.set_yticks(range(len(panel)), list(panel))
            axis.invert_yaxis()
            axis.set_xlabel("ms")
            axis.set_title(label, loc="left", fontweight="bold")
            axis.grid(False, axis="y")
        entries = [part for part in parts if part in handles]
        figure.legend([handles[p] for p in entries], entries, loc="outside lower center", ncols=3)
    return figure
