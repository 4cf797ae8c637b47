"""Numbers as text: the result table in Markdown, and the rows of the tables on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress

from fourbit._files import printable
from fourbit.report._groups import Group, differing, metrics, setting, settings
from fourbit.report._metric import decimal, heading
from fourbit.report._read import Run, text
from fourbit.report._stats import RecipeSummary

DASH = "\N{EN DASH}"

FIGURES = {
    "bits per byte": ("bits_per_byte", 4),
    "train loss": ("train_loss", 4),
    "s per epoch": ("seconds_per_epoch", 1),
    "tokens per s": ("tokens_per_s", 0),
}
"""Columns: the field of `RecipeSummary`, and its decimals."""
WORDS = ("recipe", "notes")
OPTIONAL = ("bits per byte", "tokens per s", "notes")


def measured(mean: float | None, std: float | None, *, signed: bool = False) -> str:
    """A mean with the sample standard deviation.

    >>> measured(92.71, 0.12), measured(-0.27, None, signed=True), measured(None, None)
    ('92.71 ± 0.12', '−0.27', '–')
    """
    if mean is None:
        return DASH
    number = decimal(mean, signed=signed)
    return number if std is None else f"{number} ± {decimal(std)}"


def plain(value: float | None, digits: int) -> str:
    """A number to so many decimals, or a dash."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def result_header(metric: str) -> tuple[str, ...]:
    """The names of the columns of the result table."""
    return ("recipe", "seeds", heading(metric), "difference to fp32", *FIGURES, "notes")


def result_row(summary: RecipeSummary) -> tuple[str, ...]:
    """The cells of one line of the result table, in the order of `result_header`."""
    return (
        summary.label,
        str(summary.n),
        measured(summary.metric_mean, summary.metric_std),
        measured(summary.diff_mean, summary.diff_half, signed=True),
        *(plain(getattr(summary, field), digits) for field, digits in FIGURES.values()),
        "; ".join(summary.notes),
    )


def result_tables(summaries: Sequence[RecipeSummary]) -> list[list[tuple[str, ...]]]:
    """A table for each metric, with its header as the first row; columns of figures that only some kinds of runs have, and of
    notes, only if there are any."""
    found = []
    for metric in dict.fromkeys(s.metric for s in summaries):
        rows = [result_header(metric), *(result_row(s) for s in summaries if s.metric == metric)]
        kept = [not (name in OPTIONAL and {row[i] for row in rows[1:]} <= {"", DASH}) for i, name in enumerate(rows[0])]
        found.append([tuple(compress(row, kept)) for row in rows])
    return found


def markdown_table(summaries: Sequence[RecipeSummary]) -> str:
    """The result table as Markdown, aligned to be readable as plain text too; one under the other if metrics differ."""
    return "\n\n".join(map(_markdown, result_tables(summaries)))


def _markdown(table: Sequence[tuple[str, ...]]) -> str:
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in table]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    to_left = {i for i, name in enumerate(table[0]) if name in WORDS}

    def line(row: Sequence[str]) -> str:
        cells = [c.ljust(w) if i in to_left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(cells)} |"

    rule = "| " + " | ".join("-" * w if i in to_left else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(rows[0]), rule, *(line(row) for row in rows[1:])])


def shared_settings(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(field, value) of what every group has in common."""
    configs = [settings(g.config) for g in groups]
    unequal = differing(configs)
    return [(k, setting(configs[0], k)) for k in configs[0] if k not in unequal]


def differing_settings(groups: Sequence[Group]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Names of the fields that differ among groups, and for each label their values."""
    configs = [settings(g.config) for g in groups]
    names = differing(configs)
    return names, [(g.label, [setting(c, k) for k in names]) for g, c in zip(groups, configs, strict=True)]


def environment(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(field, value) of `env.json`; where runs differ, the values with their counts, or how many there are."""
    envs = [r.env for r in runs if r.env]
    rows = []
    for name in dict.fromkeys(k for e in envs for k in e):
        values = [text(e[name]) for e in envs if name in e]
        distinct = list(dict.fromkeys(values))
        if len(distinct) == 1:
            rows.append((name, distinct[0]))
        elif len(distinct) <= 4:
            rows.append((name, "; ".join(f"{v} ({values.count(v)} runs)" for v in distinct)))
        else:
            rows.append((name, f"{min(distinct)} … {max(distinct)} ({len(distinct)} different values)"))
    return rows


def run_tables(groups: Sequence[Group]) -> list[list[tuple[str, ...]]]:
    """A table for each metric, with its header as the first row, and one row per run."""
    found = []
    for metric in metrics(groups):
        shown = [(g, r) for g in groups if g.metric == metric for r in g.runs]
        items = " or ".join(dict.fromkeys(r.rate[0] for _, r in shown))
        rows = [("recipe", "seed", "status", "steps", heading(metric), "train loss", f"{items} per s", "folder")]
        rows += [_run_row(g, r) for g, r in shown]
        found.append(rows)
    return found


def _run_row(group: Group, run: Run) -> tuple[str, ...]:
    return (
        group.label,
        run.seed,
        run.status,
        str(run.num_steps),
        measured(None if math.isnan(run.result) else run.result, None),
        plain(run.train_loss, 4),
        plain(run.rate[1], 0),
        printable(str(run.path)),
    )
