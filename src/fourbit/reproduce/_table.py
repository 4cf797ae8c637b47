"""What the runs of a row came to, in words: a table, sentences about each column against FP32, and about pairs of columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fourbit.reproduce._row import COLUMNS, TableRow
from fourbit.reproduce._statistics import Paired, paired, sentence, together

if TYPE_CHECKING:
    from fourbit.train import Comparison

REFERENCE = "fp32"


@dataclass(frozen=True)
class Column:
    """The runs of one recipe.

    Args:
        recipe: its name.
        values: {seed: the metric}, percentages as such.
        diverged: seeds that met NaN or infinity.
        lr: the learning rate.
        epochs: the length of training.
    """

    recipe: str
    values: Mapping[int, float]
    diverged: tuple[int, ...]
    lr: float
    epochs: int

    @property
    def title(self) -> str:
        """As tables call it."""
        return COLUMNS.get(self.recipe, self.recipe)

    @property
    def mean(self) -> float | None:
        """Over the seeds that did not diverge."""
        return sum(self.values.values()) / len(self.values) if self.values else None

    def against(self, other: Column) -> Paired | None:
        """Seed by seed; None where a run of either diverged, because the others do not stand for it."""
        if self.diverged or other.diverged:
            return None
        return paired([v - other.values[s] for s, v in self.values.items() if s in other.values])


def columns_of(comparison: Comparison, lr: float, epochs: int) -> list[Column]:
    """The columns of one comparison."""
    factor = comparison.metric.factor
    return [
        Column(r.recipe, {s: v * factor for s, v in r.values.items()}, r.diverged, lr, epochs) for r in comparison.rows
    ]


def best_of(row: TableRow, columns: Sequence[Column]) -> list[Column]:
    """Every recipe at its best learning rate, by the mean over the seeds that all its rates have, or that each has, where they
    have none in common. (Chosen on the test data, for all alike.)"""
    by_recipe: dict[str, list[Column]] = {}
    for column in columns:
        if column.values and not column.diverged:
            by_recipe.setdefault(column.recipe, []).append(column)
    found = []
    for rates in by_recipe.values():
        common = set(rates[0].values).intersection(*(c.values for c in rates))

        def merit(column: Column, common: set[int] = common) -> float:
            values = [v for s, v in column.values.items() if not common or s in common]
            return sum(values) / len(values) * (1 if row.higher_is_better else -1)

        found.append(max(rates, key=merit))
    return found


def table_of(row: TableRow, columns: Sequence[Column]) -> list[str]:
    """Lines of a table with the paper's numbers beside ours."""
    lines = [
        f"| column | recipe |{' paper | paper to FP32 |' if row.paper else ''} ours | n | ours to FP32 | 95 % interval |",
        f"|---|---|{'---:|---:|' if row.paper else ''}---:|---:|---:|---:|",
    ]
    reference = _find(columns, REFERENCE)
    for column in columns:
        printed, base = row.paper.get(column.recipe), row.paper.get(REFERENCE)
        compared = reference is not None and column.recipe != REFERENCE
        gap = None if printed is None or base is None or column.recipe == REFERENCE else printed - base
        cells = (
            f"**{column.title}**" if column.recipe == row.bold else column.title,
            f"`{column.recipe}`",
            *((_text(printed), _text(gap, "+")) if row.paper else ()),
            _text(column.mean),
            f"{len(column.values)}" + (f" ({len(column.diverged)} diverged)" if column.diverged else ""),
            *_interval(column.against(reference) if compared and reference else None),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def best_table(best: Sequence[Column], rates: Sequence[float]) -> list[str]:
    """Lines of the table of `best_of`; a rate at the edge of those that were tried is marked."""
    edges = (min(rates), max(rates))
    lines = ["| column | best learning rate | ours |", "|---|---:|---:|"]
    lines += [f"| {c.title} | {c.lr:g}{'*' if c.lr in edges else ''} | {_text(c.mean)} |" for c in best]
    if any(c.lr in edges for c in best):
        lines += ["", "*: the least or the largest that was tried; a better one may lie beyond."]
    return lines


def sentences(row: TableRow, columns: Sequence[Column], unit: str) -> list[str]:
    """What follows and what does not: each column against FP32, then the pairs that answer the row's question."""
    reference = _find(columns, REFERENCE)
    others = [c for c in columns if c.recipe != REFERENCE]
    pairs = [(c, reference) for c in others]
    pairs += [(_find(columns, a), _find(columns, b)) for a, b in row.pairs]
    said = [
        f"- {c.title}: {len(c.diverged)} of {len(c.values) + len(c.diverged)} runs diverged; the rest are not compared."
        for c in columns
        if c.diverged
    ]
    found = [(a, b, a.against(b)) for a, b in pairs if a and b]
    said += ["- " + sentence(a.title, b.title, d, unit, row.higher_is_better) for a, b, d in found if d]
    notes = together([(a.title, b.title, d) for a, b, d in found if d], unit)
    said += ["\n" + "\n".join(notes)] if notes else []
    return said


def described(row: TableRow, columns: Sequence[Column]) -> list[dict[str, Any]]:
    """The columns as JSON."""
    reference, found = _find(columns, REFERENCE), []
    for column in columns:
        difference = column.against(reference) if reference and column.recipe != REFERENCE else None
        found.append(
            {
                "recipe": column.recipe,
                "column": column.title,
                "paper": row.paper.get(column.recipe),
                "by_seed": {str(s): v for s, v in column.values.items()},
                "mean": column.mean,
                "difference": None if difference is None else difference.mean,
                "half_interval": None if difference is None else difference.half,
                "diverged": list(column.diverged),
            }
        )
    return found


def _find(columns: Sequence[Column], recipe: str) -> Column | None:
    return next((c for c in columns if c.recipe == recipe), None)


def _interval(found: Paired | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return f"{found.mean:+.2f}", "-" if found.half is None else f"±{found.half:.2f}"


def _text(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"
