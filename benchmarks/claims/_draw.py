"""Pictures of claims: the quantities with their intervals and bounds, or curves."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.claims._claim import Claim, Lines, Part, Verdict

KEY = "Description"
"""Of the text in a picture's file that says which numbers it shows."""
COLORS = {Verdict.HOLDS: "#009E73", Verdict.FAILS: "#D55E00", Verdict.OPEN: "#0072B2"}


def digest(claim: Claim) -> str:
    """A short name of the numbers that the picture of a claim shows."""
    return hashlib.sha256(json.dumps(_shown(claim)).encode()).hexdigest()[:16]


def drawn(path: Path) -> str:
    """The digest of the numbers that a picture was drawn from; "" if there is none."""
    from PIL import Image

    if not path.exists():
        return ""
    with Image.open(path) as image:
        return str(image.info.get(KEY, ""))


def draw(claim: Claim, path: Path) -> None:
    """Write the picture of a claim, PNG."""
    from fourbit.report import style

    with style():
        figure = _curves(claim.picture) if isinstance(claim.picture, Lines) else _intervals(claim)
        figure.savefig(path, format="png", dpi=100, metadata={KEY: digest(claim), "Software": None})


def _shown(claim: Claim) -> Any:
    if isinstance(claim.picture, Lines):
        return [claim.picture.title, claim.picture.ticks, claim.picture.curves, claim.picture.axis]
    return [[p.what, *(_text(x) for x in (p.value, p.low, p.high, p.least, p.most)), p.unit] for p in _parts(claim)]


def _text(number: float | None) -> str:
    return "" if number is None else f"{number:.6g}"


def _parts(claim: Claim) -> tuple[Part, ...]:
    return (*claim.parts, *claim.beside)


def _intervals(claim: Claim) -> Any:
    from fourbit.report import panels
    from fourbit.report._style import short

    parts = [part for part in _parts(claim) if not math.isnan(part.value)]
    units = list(dict.fromkeys(part.unit for part in parts))
    figure, axes = panels(
        len(units), "", columns=1, height=0.62 + 0.34 * len(parts) / len(units), extra=0.25, sharey=False
    )
    figure.set_figwidth(7.5)  # so that words can be read on a telephone
    for axis, unit in zip(axes, units, strict=True):
        mine = [part for part in parts if part.unit == unit]
        for y, part in enumerate(mine):
            color = COLORS[part.verdict] if part.bound else "#777777"
            if part.low is not None and part.high is not None:
                axis.plot([part.low, part.high], [y, y], color=color, linewidth=2.5, solid_capstyle="butt")
            axis.plot([part.value], [y], "o" if part.low is not None else "x", color=color, markersize=6)
            for bound in (part.least, part.most):
                if bound is not None:
                    bound = math.ceil(bound) if part.counted else bound  # a count needs all of them
                    axis.plot([bound, bound], [y - 0.35, y + 0.35], color="black", linewidth=1.4, linestyle=(0, (2, 1)))
        axis.axvline(0, color="#999999", linewidth=0.8)
        axis.set_yticks(range(len(mine)), [short(part.what.replace("`", ""), 72) for part in mine])
        axis.set_ylim(len(mine) - 0.4, -0.6)
        marks = ["dashed: what the claim needs"] + ["x: one seed, no interval"] * any(p.low is None for p in mine)
        axis.set_xlabel(f"{unit or 'number'} ({'; '.join(marks)})", loc="right")
    return figure


def _curves(lines: Lines) -> Any:
    from fourbit.report import legend, panels

    figure, (axis,) = panels(1, lines.title, columns=1, height=4.0)
    entries = {}
    for name, values in lines.curves.items():
        entries[name] = axis.plot(range(len(values)), values, "o-", markersize=3)[0]
    if len(lines.ticks) <= 24:
        axis.set_xticks(range(len(lines.ticks)), lines.ticks, rotation=60, ha="right")
    axis.set_ylabel(lines.axis)
    axis.set_ylim(bottom=0)
    legend(figure, entries)
    return figure
