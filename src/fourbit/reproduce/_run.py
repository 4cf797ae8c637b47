"""A row of a table: a comparison over the recipes of its columns, the paper's numbers beside ours."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourbit._files import replace_file
from fourbit.errors import UserError, unknown
from fourbit.reproduce._lengths import lengths_picture, lengths_table
from fourbit.reproduce._provenance import said_of_commits
from fourbit.reproduce._row import OWN, ScaleName, Settings, TableName, TableRow, said_of
from fourbit.reproduce._sizes import require_whole
from fourbit.reproduce._table import Column, best_of, best_table, columns_of, described, sentences, table_of
from fourbit.reproduce.catalog import rows_of
from fourbit.train import CompareConfig, collect, compare
from fourbit.train._display import make_console


@dataclass(frozen=True)
class Reproduction:
    """What came out, and the folder of its runs. `interrupted`: some are missing, and the same call goes on with them."""

    row: TableRow
    folder: Path
    runs: Path
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
    table_only: bool = False,
    **settings: Any,
) -> Reproduction:
    """Run one row of a table, or go on with it, and write reproduced.md and reproduced.json, of several lengths also
    reproduced.png, with the row's columns that earlier calls have left in `out`, too.

    Args:
        table, row: as in `fourbit.reproduce.ROWS`.
        scale: see `fourbit.reproduce.paper`.
        seeds: one run per column and seed.
        columns: recipes, some of the row's or any others to compare; (): all of the row's.
        data_dir: folder of the data set.
        out: the row gets the folder TABLE-ROW-SCALE in it; the runs of questions and debates are in networks-SCALE.
        threads: CPU threads.
        table_only: train nothing, and write the table of the runs that lie there and are finished, with all their seeds.
        settings: other fields of `fourbit.train.Settings`, instead of the row's.

    Raises:
        UserError: an unknown row or scale, a row that cannot run, as `fourbit.train.compare`, or there is no finished run for
            `table_only`.
    """
    rows = rows_of(table)
    if row not in rows:
        raise unknown(f"row of {table}", row, rows)
    chosen = rows[row]
    values: dict[str, Any] = {**chosen.settings(scale), "data_dir": data_dir, "threads": threads, **settings}
    if values["data"] == "digits":
        values["data_dir"] = None
    folder = out / f"{table}-{row}-{scale}"
    parts, contents, all_columns, unit = [], [], [], ""
    for variation in chosen.variations(scale):
        varied: dict[str, Any] = {**values, **variation}
        place = _runs_folder(chosen, scale, out, varied["model"], variation)
        plan = CompareConfig(**varied, recipes=tuple(columns) or chosen.columns, seeds=tuple(seeds), out=place)
        if variation:
            make_console().print(_words(variation))
        check = require_whole if scale == "paper" else None
        if not table_only and compare(plan, check_data=check, table=False).interrupted:
            return Reproduction(chosen, folder, place, "", True)
        comparison = collect(replace(plan, recipes=_wanted(plan, chosen)))
        if not comparison.rows and table_only and chosen.lengths:
            continue
        if not comparison.rows:
            raise UserError(
                f"{place} has no finished run of {row} at the scale {scale}: check --out, or leave out --table-only."
            )
        there = [r.recipe for r in comparison.rows]
        if table_only and (lacking := [name for name in columns if name not in there]):
            raise UserError(
                f"{place} has no finished run of {', '.join(lacking)}: leave out --table-only, or that column."
            )
        unit = "points" if comparison.metric.unit == "%" else comparison.metric.name
        mine = columns_of(comparison, varied["lr"], varied["epochs"])
        all_columns += mine
        at = f", {_words(variation)}" if variation else ""
        parts += [
            f"**{chosen.title}** ({table}), {chosen.metric}, scale {scale}{at}",
            f"Ours: {said_of(varied, sorted({s for r in comparison.rows for s in (*r.values, *r.diverged)}))}. "
            + said_of_commits(place, mine),
            "\n".join(table_of(chosen, mine)),
        ]
        parts += ["The paper prints the column in bold type in bold."] if chosen.bold else []
        if any(len(column.values) > 1 for column in mine):
            parts.append("Differences are taken seed by seed, over the seeds that both columns have.")
        if missing := [name for name in chosen.columns if name not in there]:
            parts.append(f"Columns of the row without a finished run: {', '.join(f'`{name}`' for name in missing)}.")
        parts.append(_said(chosen, mine, unit, scale))
        contents.append(
            dict(variation)
            | {"table": table, "row": row, "scale": scale, "metric": chosen.metric, "columns": described(chosen, mine)}
        )
    if not contents:
        raise UserError(
            f"{out} has no finished run of {row} at the scale {scale}: check --out, or leave out --table-only."
        )
    content = contents[0] if len(contents) == 1 else contents
    picture: bytes | None = None
    if len(chosen.lengths.get(scale, ())) > 1:
        parts.append("\n".join(lengths_table(all_columns)))
        picture = lengths_picture(all_columns, unit, f"{chosen.title} ({values['model']} on {values['data']})")
        if picture is not None:
            parts.append("![The gap to FP32 over the length of training](reproduced.png)")
    if chosen.rates:
        best = best_of(chosen, all_columns)
        parts += ["\n".join(best_table(best, chosen.rates)), _said(chosen, best, unit, scale)]
    text = "\n\n".join(parts) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / "reproduced.md", text.encode())
        replace_file(folder / "reproduced.json", (json.dumps(content, indent=2) + "\n").encode())
        if picture is not None:
            replace_file(folder / "reproduced.png", picture)
    except OSError as error:
        raise UserError(f"the table could not be written to {folder}: {error.strerror or error}.") from error
    return Reproduction(chosen, folder, _runs_folder(chosen, scale, out, values["model"], {}), text, False)


def _runs_folder(row: TableRow, scale: str, out: Path, model: str, variation: Settings) -> Path:
    """Of a row of the paper its own; questions, debates and figures share the runs of a network.

    The folder of a network with options, as in resnet20?width=8, is called resnet20-width-8.
    """
    if row.table not in OWN:
        return out / f"{row.table}-{row.name}-{scale}"
    name = row.network or re.sub("[?&=]", "-", model)
    usual = row.settings(scale)
    for key, value in variation.items():
        name += "" if value == usual[key] else f"-{key}-{value:g}"
    return out / f"networks-{scale}" / name


def _words(variation: Settings) -> str:
    """Of one key.

    >>> _words({"lr": 0.05}), _words({"epochs": 30})
    ('learning rate 0.05', '30 epochs')
    """
    return f"{variation['epochs']} epochs" if "epochs" in variation else f"learning rate {variation['lr']:g}"


def _wanted(plan: CompareConfig, row: TableRow) -> tuple[str, ...]:
    """Recipes of the table: the row's, the plan's, and, in a folder that belongs to the row alone, whatever lies there."""
    wanted = dict.fromkeys((*row.columns, *plan.recipes))
    if row.table not in OWN:
        from fourbit import recipes

        lying = {path.name.rpartition("-seed")[0] for path in plan.out.glob("*-seed*")}
        wanted |= dict.fromkeys(name for name in recipes.names() if name in lying)
    return tuple(wanted)


def _said(row: TableRow, columns: Sequence[Column], unit: str, scale: str) -> str:
    if scale == "smoke":
        return "A smoke run trains for a few steps: its numbers say nothing about accuracy."
    return "\n".join(sentences(row, columns, unit))
