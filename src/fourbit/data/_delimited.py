"""Tables in text files: comma-separated (.csv, with quotes) and tab-separated (.tsv, without), the first line the head."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from fourbit.data._text_files import lines_of, read_text
from fourbit.errors import UserError


def read_delimited(path: Path) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Number of the line and cells of each row, and the names of the columns. Blank lines are left out.

    Raises:
        UserError: as `read_text`; no rows; or one with more or fewer cells than columns.
    """
    text = read_text(path)
    if path.suffix.lower() == ".tsv":
        found = [(number, line.split("\t")) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    else:
        reader = csv.reader(io.StringIO(text, newline=""))
        try:
            found = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
        except csv.Error as error:
            raise UserError(
                f"{path} cannot be read as CSV (line {reader.line_num}: {error}): mend the file."
            ) from error
    if len(found) < 2:
        raise UserError(f"{path} has no rows behind its first line, which names the columns: replace the file.")
    head = [name.strip() for name in found[0][1]]
    for number, row in found[1:]:
        if len(row) != len(head):
            raise UserError(
                f"line {number} of {path} has {len(row)} cells, but there are {len(head)} columns: mend the line."
            )
    return found[1:], head
