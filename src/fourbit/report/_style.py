"""One look for every figure: colours that stay with their recipe, panels that never crowd, legends outside the axes.

Figures are built with matplotlib's object interface (`Figure`, never `pyplot`), so that rendering needs no display
and leaves no global state behind. The palette is Okabe and Ito's with two of Tol's colours, which people with any
common form of colour blindness can tell apart; full precision is always dark grey; a ninth recipe starts over with
dashed lines and other markers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fourbit.report._groups import Group

WIDTH = 10.5
"""Width of every figure in inches; at `DPI` that is some more pixels than the column of the page is wide."""

DPI = 125

REFERENCE_COLOR = "#333333"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P")

# The last tenth of viridis is a yellow that cannot be seen on white.
DEPTH = LinearSegmentedColormap.from_list("depth", matplotlib.colormaps["viridis"]([i / 255 * 0.9 for i in range(256)]))

_RC: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "lines.linewidth": 1.6,
    "axes.prop_cycle": cycler(color=PALETTE),
}


@dataclass(frozen=True)
class Plot:
    """A finished figure: `name` is its file name, `title` stands on it, `caption` under it on the page."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Look:
    """How a group is drawn, on every figure of a page."""

    color: str
    dashes: Any
    marker: str = "o"

    @property
    def is_repeated(self) -> bool:
        """Whether an earlier group has the same colour."""
        return self.marker != "o"


@contextmanager
def style() -> Iterator[None]:
    """Apply the look inside a `with` block, and restore whatever the program had set."""
    with matplotlib.rc_context(_RC):
        yield


def looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Colour and dashes of each group by label; groups of different networks that have the same name look the same."""
    found: dict[str, Look] = {}
    for group in groups:
        cycle, index = divmod(group.place, 1 if group.is_reference else len(PALETTE))
        color = REFERENCE_COLOR if group.is_reference else PALETTE[index]
        found[group.label] = Look(color, DASHES[cycle % len(DASHES)], MARKERS[cycle % len(MARKERS)])
    return found


def short(label: str, length: int = 30) -> str:
    """`label` cut in its middle (names differ at their ends), and safe for matplotlib, which reads $ as mathematics.

    >>> short("features.stage4.block2.conv1.weight", 20)
    'features…onv1.weight'
    """
    label = " ".join(label.split())
    if len(label) > length:
        head = (length - 1) // 2 - 1
        label = f"{label[:head]}…{label[-(length - head - 1) :]}"
    label = label.replace("$", r"\$")
    return f" {label}" if label.startswith("_") else label  # a legend leaves out labels that begin with "_"


def panels(
    count: int, title: str, *, columns: int = 3, height: float = 2.3, sharey: bool = True, extra: float = 0.9
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` small panels, at most `columns` in a row; `extra` inches for its title and legend."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, rows * height + extra), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.07)  # type: ignore[union-attr]
    grid = figure.subplots(rows, columns, squeeze=False, sharex=False, sharey=sharey)
    axes = [a for row in grid for a in row]
    for unused in axes[count:]:
        unused.remove()
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    for axis in axes[:count]:
        axis.tick_params(labelleft=True)
    return figure, axes[:count]


def legend(figure: Figure, entries: Mapping[str, Artist], title: str | None = None) -> None:
    """A legend under the panels, in as many columns as its longest entry allows; the figure grows with its lines."""
    names = [short(name, 44) for name in entries]
    columns = max(1, min(len(names), int(120 / (max(map(len, names)) + 8))))
    figure.set_figheight(figure.get_figheight() + 0.2 * max(0, math.ceil(len(names) / columns) - 3))
    figure.legend(list(entries.values()), names, loc="outside lower center", ncols=columns, title=title)


def step_axis(axis: Axes, label: str = "optimizer step") -> None:
    """Few, short tick labels ("50k", "2M") on an axis of steps or tokens."""
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _brief(v)))
    axis.set_xlabel(label)


def _brief(count: float) -> str:
    """A count on an axis.

    >>> _brief(5000), _brief(50_000), _brief(1_500_000), _brief(2e9)
    ('5000', '50k', '1.5M', '2G')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= max(size, 10_000):
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def panel_title(axis: Axes, label: str, look: Look | None = None, length: int = 38) -> None:
    """The recipe above its panel, in its colour, its settings in lines of at most `length` characters."""
    lines = wrapped(label, length)
    axis.set_title("\n".join(lines), loc="left", color=look.color if look else "black", fontweight="bold")


def wrapped(label: str, length: int) -> list[str]:
    """`label` broken at its commas; what is longer than a line is cut in its middle.

    >>> wrapped("ibm2020-corrected, epochs=3, lr=0.05, schedule=step", 27)
    ['ibm2020-corrected,', 'epochs=3, lr=0.05,', 'schedule=step']
    """
    lines: list[str] = []
    *parts, last = label.split(", ")
    for part in (*(f"{each}," for each in parts), last):
        if lines and len(lines[-1]) + 1 + len(part) <= length:
            lines[-1] = f"{lines[-1]} {part}"
        else:
            lines.append(short(part, length))
    return lines


def outer_labels(axes: Sequence[Axes]) -> None:
    """Keep the y label on the first column of panels alone."""
    for axis in axes:
        spec = axis.get_subplotspec()
        if spec is not None and not spec.is_first_col():
            axis.set_ylabel("")
