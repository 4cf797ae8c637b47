"""Every row that can be reproduced: Tables 1 to 3 (`paper`), questions that the paper leaves open (`questions`), and questions
on which papers contradict one another (`debates`)."""

from __future__ import annotations

from fourbit.errors import unknown
from fourbit.reproduce._row import TABLES, TableRow
from fourbit.reproduce.debates import DEBATES
from fourbit.reproduce.paper import PAPER
from fourbit.reproduce.questions import QUESTIONS

ROWS: tuple[TableRow, ...] = (*PAPER, *QUESTIONS, *DEBATES)


def rows_of(table: str) -> dict[str, TableRow]:
    """The rows of a table by name.

    Raises:
        UserError: an unknown table.
    """
    if table not in TABLES:
        raise unknown("table", table, TABLES)
    return {row.name: row for row in ROWS if row.table == table}
