"""The table of a comparison: on the screen, as Markdown, and as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from fourbit.train._comparison import Comparison, Row
from fourbit.train._folder import finite, replace_file
from fourbit.train.tasks import Metric


def columns(metric: Metric) -> tuple[str, ...]:
    """Headings. Accuracies and differences are in percent and percentage points."""
    return ("recipe", f"test {metric.title}", "std", "n", "to fp32", "95 %", "train loss", "s/epoch")


def write_tables(comparison: Comparison, console: Console) -> None:
    """Print the table, and write table.md and table.json to the folder of the comparison."""
    console.print(_rich(comparison))
    for row in comparison.rows:
        if row.diverged:
            console.print(f"{row.recipe}: diverged with seed {', '.join(map(str, row.diverged))}", markup=False)
    replace_file(comparison.folder / "table.md", markdown(comparison).encode())
    content = json.dumps(finite([as_dict(row, comparison.metric) for row in comparison.rows]), indent=2) + "\n"
    replace_file(comparison.folder / "table.json", content.encode())


def cells(row: Row, metric: Metric) -> tuple[str, ...]:
    """One row as text; "-" for what is not known."""
    return (
        row.recipe,
        _text(row.mean, metric.factor, ".2f"),
        _text(row.std, metric.factor, ".2f"),
        str(len(row.values)) + (f" ({len(row.diverged)} diverged)" if row.diverged else ""),
        _text(row.difference, metric.factor, "+.2f"),
        _text(row.difference_half, metric.factor, ".2f", "±"),
        _text(row.train_loss, 1, ".4f"),
        _text(row.seconds_per_epoch, 1, ".1f"),
    )


def markdown(comparison: Comparison) -> str:
    """The table in Markdown."""
    names = columns(comparison.metric)
    lines = ["| " + " | ".join(names) + " |", "|---" + "|---:" * (len(names) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row, comparison.metric)) + " |" for row in comparison.rows]
    note = (
        "Mean and sample standard deviation over n seeds; differences to fp32 are taken seed by seed, with the 95 % confidence "
        "interval of their mean (Student's t)."
    )
    return "\n".join([*lines, "", note, ""])


def as_dict(row: Row, metric: Metric) -> dict[str, Any]:
    """The row with full precision, fractions instead of percent."""
    return {
        "recipe": row.recipe,
        "n": len(row.values),
        f"test_{metric.name}_mean": row.mean,
        f"test_{metric.name}_std": row.std,
        "difference_to_fp32_mean": row.difference,
        "difference_to_fp32_half_interval": row.difference_half,
        "train_loss": row.train_loss,
        "seconds_per_epoch": row.seconds_per_epoch,
        f"test_{metric.name}_by_seed": {str(seed): value for seed, value in row.values.items()},
        "diverged_seeds": list(row.diverged),
    }


def _rich(comparison: Comparison) -> Table:
    table = Table()
    for number, name in enumerate(columns(comparison.metric)):
        table.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    for row in comparison.rows:
        table.add_row(*cells(row, comparison.metric))
    return table


def _text(value: float | None, factor: float, style: str, sign: str = "") -> str:
    return "-" if value is None else sign + format(value * factor, style)
