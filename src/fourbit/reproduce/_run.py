"""A row of a table: a comparison over the recipes of its columns, the paper's numbers beside ours."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fourbit.errors import UserError, unknown
from fourbit.reproduce._statistics import Paired, paired, sentence
from fourbit.reproduce.catalog import COLUMNS, ScaleName, TableName, TableRow, rows_of
from fourbit.train import CompareConfig, compare

if TYPE_CHECKING:
    from fourbit.train import Comparison

REFERENCE = "fp32"


@dataclass(frozen=True)
class Reproduction:
    """What came out. `interrupted`: some runs are missing, and the same call goes on with them."""

    row: TableRow
    folder: Path
    text: str
    interrupted: bool


def reproduce(
    table: TableName,
    row: str,
    *,
    scale: ScaleName = "small",
    seeds: Sequence[int] = (0,),
    columns: Sequence[str] = (),
    data_dir: Path | None = None,
    out: Path = Path("runs/reproduce"),
    threads: int | None = None,
    **settings: Any,
) -> Reproduction:
    """Run one row of a table, or go on with it, and write reproduced.md and reproduced.json.

    Args:
        table, row: as in `fourbit.reproduce.ROWS`.
        scale: see `fourbit.reproduce.catalog`.
        seeds: one run per column and seed.
        columns: recipes, some of the row's or any others to compare; (): all of the row's.
        data_dir: folder of the data set.
        out: the row gets the folder TABLE-ROW-SCALE in it; the runs of questions are in networks-SCALE.
        threads: CPU threads.
        settings: other fields of `fourbit.train.Settings`, instead of the row's.

    Raises:
        UserError: an unknown row or scale, a row that cannot run, or as `fourbit.train.compare`.
    """
    rows = rows_of(table)
    if row not in rows:
        raise unknown(f"row of {table}", row, rows)
    chosen = rows[row]
    values: dict[str, Any] = {**chosen.settings(scale), "data_dir": data_dir, "threads": threads, **settings}
    if values["data"] == "digits":
        values["data_dir"] = None
    recipes = tuple(columns) or chosen.columns
    folder = out / f"{table}-{row}-{scale}"
    parts, contents = [], []
    for rate in chosen.rates or (None,):
        varied: dict[str, Any] = values if rate is None else values | {"lr": rate}
        place = _runs_folder(chosen, scale, out, varied["model"], rate)
        comparison = compare(CompareConfig(**varied, recipes=recipes, seeds=tuple(seeds), out=place))
        if comparison.interrupted:
            return Reproduction(chosen, folder, "", True)
        lines, content = _table(chosen, scale, comparison, rate)
        parts.append("\n".join(lines))
        contents.append(content)
    content = contents[0] if len(contents) == 1 else contents
    if chosen.rates:
        parts.append(_best(chosen, contents))
    text = "\n\n".join(parts) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "reproduced.md").write_text(text)
        (folder / "reproduced.json").write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"the table could not be written to {folder}: {error.strerror or error}.") from error
    return Reproduction(chosen, folder, text, False)


def _runs_folder(row: TableRow, scale: str, out: Path, model: str, rate: float | None) -> Path:
    """Of a row of the paper its own; questions and figures share the runs of a network."""
    if row.table != "questions":
        return out / f"{row.table}-{row.name}-{scale}"
    shared = out / f"networks-{scale}" / model
    return shared if rate is None or rate == row.settings(scale)["lr"] else shared.with_name(f"{model}-lr-{rate:g}")


def _best(row: TableRow, contents: Sequence[dict[str, Any]]) -> str:
    """Every column at its best learning rate, by the mean over the seeds. (Chosen on the test data, for all alike.)"""
    lines = ["| column | best learning rate | ours |", "|---|---:|---:|"]
    for columns in zip(*(content["columns"] for content in contents), strict=True):
        found = [
            (c["mean"], content["lr"]) for c, content in zip(columns, contents, strict=True) if c["mean"] is not None
        ]
        if found:
            mean, rate = max(found) if row.higher_is_better else min(found)
            lines.append(f"| {columns[0]['column']} | {rate:g} | {mean:.2f} |")
    return "\n".join(lines)


def _table(row: TableRow, scale: str, comparison: Comparison, rate: float | None) -> tuple[list[str], dict[str, Any]]:
    factor = comparison.metric.factor
    values = {r.recipe: {seed: v * factor for seed, v in r.values.items()} for r in comparison.rows}
    reference = values.get(REFERENCE, {})
    lines = [
        f"**{row.title}** ({row.table}), {row.metric}, scale {scale}"
        + ("" if rate is None else f", learning rate {rate:g}"),
        "",
        f"| column | recipe |{' paper | paper to FP32 |' if row.paper else ''} ours | n | ours to FP32 | 95 % interval |",
        f"|---|---|{'---:|---:|' if row.paper else ''}---:|---:|---:|---:|",
    ]
    sentences, content = [], []
    for found in comparison.rows:
        recipe, mine = found.recipe, values[found.recipe]
        title = COLUMNS.get(recipe, recipe)
        printed, base = row.paper.get(recipe), row.paper.get(REFERENCE)
        differences = (
            paired([v - reference[s] for s, v in mine.items() if s in reference]) if recipe != REFERENCE else None
        )
        mean = sum(mine.values()) / len(mine) if mine else None
        gap = None if printed is None or base is None or recipe == REFERENCE else printed - base
        name = f"**{title}**" if recipe == row.bold else title
        cells = (
            name,
            f"`{recipe}`",
            *((_text(printed), _text(gap, "+")) if row.paper else ()),
            _text(mean),
            str(len(mine)),
            *_interval(differences),
        )
        lines.append("| " + " | ".join(cells) + " |")
        if differences is not None and scale != "smoke":
            unit = "points" if comparison.metric.unit == "%" else comparison.metric.name
            sentences.append("- " + sentence(title, "FP32", differences, unit, row.higher_is_better))
        content.append(
            {
                "recipe": recipe,
                "column": title,
                "paper": printed,
                "by_seed": {str(s): v for s, v in mine.items()},
                "mean": mean,
                "difference": None if differences is None else differences.mean,
                "half_interval": None if differences is None else differences.half,
                "diverged": list(found.diverged),
            }
        )
    bold = [] if not row.bold else ["", "The paper prints the column in bold type in bold."]
    described: dict[str, Any] = {} if rate is None else {"lr": rate}
    described |= {"table": row.table, "row": row.name, "scale": scale, "metric": row.metric, "columns": content}
    if scale == "smoke":
        sentences = ["A smoke run trains for a few steps: its numbers say nothing about accuracy."]
    return [*lines, *bold, "", *sentences], described


def _interval(found: Paired | None) -> tuple[str, str]:
    if found is None:
        return "-", "-"
    return f"{found.mean:+.2f}", "-" if found.half is None else f"±{found.half:.2f}"


def _text(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.2f}"
