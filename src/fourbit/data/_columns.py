"""The columns of parquet tables, checked in one place: a column is there, holds what its loader reads, and has no empty row.

Each function takes a `datasets` table, the words for it in errors, such as "train of cifar10", and the names that the column
may have; NAME.FIELD is a field of a column of structs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from fourbit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


def text_column(table: Dataset, where: str, *names: str) -> list[str]:
    """A string per row."""
    return _checked(table, where, names, "text").to_pylist()


def number_column(table: Dataset, where: str, *names: str) -> Tensor:
    """A whole number per row, int64 [rows]."""
    return torch.from_numpy(_checked(table, where, names, "whole numbers").to_numpy().astype(np.int64))


def file_column(table: Dataset, where: str, *names: str) -> pa.ChunkedArray:
    """The content of a file per row: bytes or, as the hub has them, structs of bytes and path."""
    return _checked(table, where, tuple(n for name in names for n in (f"{name}.bytes", name)), "bytes of files")


def _checked(
    table: Dataset, where: str, names: tuple[str, ...], holds: Literal["text", "whole numbers", "bytes of files"]
) -> pa.ChunkedArray:
    """The first of the columns that is there.

    Raises:
        UserError: none is there, it is of another type, or a row is empty.
    """
    from pyarrow import types

    columns = table.data.table.flatten()  # that of `datasets` follows its own types
    name = next((name for name in names if name in columns.column_names), None)
    if name is None:
        raise UserError(
            f"{where} has no column {' or '.join(names)}, only {', '.join(columns.column_names)}: give the folder of that "
            "data set."
        )
    column = columns.column(name)
    fits = {
        "text": (types.is_string, types.is_large_string),
        "whole numbers": (types.is_integer,),
        "bytes of files": (types.is_binary, types.is_large_binary),
    }
    if not any(fit(column.type) for fit in fits[holds]):
        raise UserError(
            f"column {name} of {where} must hold {holds}, but holds {column.type}: give the folder of that data set."
        )
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise UserError(f"row {row} of column {name} of {where} is empty: remove the row, or replace the file.")
    return column
