"""Numbers as text: the result table in Markdown, and the rows of the tables on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fourbit.report._groups import Group, differing, setting, settings
from fourbit.report._read import Run, text
from fourbit.report._stats import RecipeSummary

DASH = "\N{EN DASH}"

RESULT_HEADER = ("recipe", "seeds", "test accuracy (%)", "difference to fp32", "train loss", "s per epoch", "notes")


def percent(mean: float | None, std: float | None, *, signed: bool = False) -> str:
    """Fractions as percent with the sample standard deviation, to two decimals as published tables have it.

    >>> percent(0.9271, 0.0012), percent(-0.0027, None, signed=True), percent(None, None)
    ('92.71 ± 0.12', '−0.27', '–')
    """
    if mean is None:
        return DASH
    number = f"{100 * mean:+.2f}" if signed else f"{100 * mean:.2f}"
    number = number.replace("-", "\N{MINUS SIGN}")
    return number if std is None else f"{number} ± {100 * std:.2f}"


def plain(value: float | None, digits: int) -> str:
    """A number to so many decimals, or a dash."""
    return DASH if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def result_row(summary: RecipeSummary) -> tuple[str, ...]:
    """The cells of one line of the result table, in the order of `RESULT_HEADER`."""
    return (
        summary.label,
        str(summary.n),
        percent(summary.accuracy_mean, summary.accuracy_std),
        percent(summary.diff_mean, summary.diff_std, signed=True),
        plain(summary.train_loss, 4),
        plain(summary.seconds_per_epoch, 1),
        "; ".join(summary.notes),
    )


def result_rows(summaries: Sequence[RecipeSummary]) -> list[tuple[str, ...]]:
    """The result table with its header as the first row; the column of notes only if there are any."""
    rows = [RESULT_HEADER, *map(result_row, summaries)]
    return rows if any(row[-1] for row in rows[1:]) else [row[:-1] for row in rows]


def markdown_table(summaries: Sequence[RecipeSummary]) -> str:
    """The result table as Markdown, aligned to be readable as plain text too."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in result_rows(summaries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    to_left = {0, len(RESULT_HEADER) - 1}

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


def run_rows(groups: Sequence[Group]) -> list[tuple[str, ...]]:
    """One line per run: recipe, seed, status, steps, test accuracy, train loss, folder."""
    return [
        (
            g.label,
            r.seed,
            r.status,
            str(r.num_steps),
            percent(None if math.isnan(r.accuracy) else r.accuracy, None),
            plain(r.train_loss, 4),
            str(r.path),
        )
        for g in groups
        for r in g.runs
    ]
