"""The columns of one's own tables: which one holds files and which one labels, and the cells of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fourbit.data._columns import number_column, text_column
from fourbit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("label", "labels", "class", "category", "target")


class Cells(Sequence[Path | bytes]):
    """The files in a column, by row: contents, or paths where the table holds no more.

    Raises:
        UserError: the column holds something else, or a row is empty.
    """

    def __init__(self, table: Dataset, column: str, where: str):
        if not is_file(table.features[column]):
            raise UserError(
                f"column {column} of {where} must hold files, but holds {_type(table, column)}: name another."
            )
        self.where, self.column = where, column
        self.table = table if table._indices is None else table.flatten_indices()
        flat = self.table.data.table.flatten()
        parts = [n for n in (column, f"{column}.bytes", f"{column}.path") if n in flat.column_names]
        empty = np.logical_and.reduce([flat.column(n).is_null().to_numpy() for n in parts])
        if empty.any():
            row = int(empty.argmax())
            raise UserError(f"row {row} of column {column} of {where} is empty: remove the row, or replace the file.")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Path | bytes:  # type: ignore[override]
        # what the table stores: a row by way of `datasets` takes ten times as long
        cell: Any = self.table.data.table.column(self.column)[row].as_py()
        if isinstance(cell, bytes):
            return cell
        return Path(cell["path"]) if cell["bytes"] is None else cell["bytes"]

    def labels(self, column: str) -> list[str] | list[int]:
        """The labels beside them, text or whole numbers."""
        if _is_text(self.table.features[column]):
            found = text_column(self.table, self.where, column)
            empty = next((row for row, text in enumerate(found) if not text.strip()), None)
            if empty is not None:
                raise UserError(
                    f"row {empty} of column {column} of {self.where} is empty: remove the row, or fill it in."
                )
            return [" ".join(text.split()) for text in found]
        return number_column(self.table, self.where, column).tolist()


def table_columns(
    table: Dataset, known: Sequence[str], chosen: Sequence[str]
) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the columns of files and of labels, and those of the classes, where the table declares them.

    Args:
        known: names that a column of files may have; they decide among several.
        chosen: both columns as the user has them, or ().

    Raises:
        UserError: none fits, or several do.
    """
    columns = table.column_names
    if chosen and len(chosen) != 2:
        raise UserError(f"--columns has {','.join(chosen)}, but needs two: those of file and label.")
    for name in chosen:
        if name not in columns:
            raise UserError(f"there is no column {name}, only {', '.join(columns)}: name others with --columns.")
    if chosen:
        file, label = chosen
    else:
        files = [name for name in columns if is_file(table.features[name])]
        file = _one([[n for n in files if n in known], files], columns, f"files ({' or '.join(known)})")
        rest = [name for name in columns if name != file]
        declared = [n for n in rest if hasattr(table.features[n], "names")]
        others = [n for n in rest if _is_text(table.features[n]) or _is_number(table.features[n])]
        first = [[n] for n in ("label",) if n in rest]
        label = _one([*first, declared, [n for n in rest if n in LABELS], others], columns, "labels")
    names = getattr(table.features[label], "names", None)
    return file, label, None if names is None else tuple(names)


def is_file(feature: Any) -> bool:
    """Whether a column holds files: images, sound, structs with bytes, or bytes."""
    if type(feature).__name__ in ("Image", "Audio"):
        return True
    if isinstance(feature, dict):
        return "bytes" in feature and _dtype(feature["bytes"]) in ("binary", "large_binary")
    return _dtype(feature) in ("binary", "large_binary")


def _one(choices: Sequence[list[str]], columns: list[str], what: str) -> str:
    """The only name in the first of the lists that has any."""
    found = next((names for names in choices if names), [])
    if len(found) == 1:
        return found[0]
    problem = f"{' and '.join(found)} could all" if found else f"none of the columns {', '.join(columns)} seems to"
    raise UserError(f"{problem} hold the {what}: name those of file and label with --columns FILE,LABEL.")


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _is_number(feature: Any) -> bool:
    return "int" in _dtype(feature)


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def _type(table: Dataset, column: str) -> str:
    return str(table.data.table.schema.field(column).type)
