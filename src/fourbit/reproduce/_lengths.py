"""The gap to FP32 over the length of training: a table and a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from fourbit.reproduce._statistics import Paired
from fourbit.reproduce._table import REFERENCE, Column


def gaps(columns: Sequence[Column]) -> dict[str, dict[int, Paired]]:
    """{title of a recipe: {epochs: its difference to FP32 of as many}}, where both have finished."""
    references = {c.epochs: c for c in columns if c.recipe == REFERENCE}
    found: dict[str, dict[int, Paired]] = {}
    for column in columns:
        reference = references.get(column.epochs)
        if column.recipe != REFERENCE and reference is not None and (gap := column.against(reference)):
            found.setdefault(column.title, {})[column.epochs] = gap
    return found


def lengths_table(columns: Sequence[Column]) -> list[str]:
    """Lines of a table: FP32's own numbers, then the gap of each recipe with its 95 % interval (none of one seed)."""
    epochs = sorted({c.epochs for c in columns})
    lines = [
        "| to FP32, after epochs | " + " | ".join(map(str, epochs)) + " |",
        "|---|" + "---:|" * len(epochs),
    ]
    means = {c.epochs: c.mean for c in columns if c.recipe == REFERENCE and c.mean is not None}
    lines.append("| FP32 itself | " + " | ".join(f"{means[n]:.2f}" if n in means else "-" for n in epochs) + " |")
    for title, by_length in gaps(columns).items():
        lines.append(f"| {title} | " + " | ".join(_cell(by_length.get(n)) for n in epochs) + " |")
    return lines


def lengths_picture(columns: Sequence[Column], unit: str, title: str) -> bytes | None:
    """The same as a picture (PNG), bars for 95 % intervals; None where there is no gap yet."""
    found = gaps(columns)
    if not found:
        return None
    from fourbit.report import panels, style

    with style():
        figure, (axes,) = panels(1, title, columns=1, height=4)
        for number, (name, by_length) in enumerate(found.items()):
            epochs = sorted(by_length)
            axes.errorbar(
                [n * 1.03 ** (number - (len(found) - 1) / 2) for n in epochs],
                [by_length[n].mean for n in epochs],
                [by_length[n].half or 0.0 for n in epochs],
                label=name,
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1,
            )
        ticks = sorted({n for by_length in found.values() for n in by_length})
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_xlabel("epochs of training")
        axes.set_ylabel(f"to FP32 of as many epochs ({unit})")
        axes.legend()
        written = io.BytesIO()
        figure.savefig(written, format="png")
    return written.getvalue()


def _cell(gap: Paired | None) -> str:
    if gap is None:
        return "-"
    return f"{gap.mean:+.2f}" + (f" ±{gap.half:.2f}" if gap.half is not None else "") + f" ({gap.n})"
