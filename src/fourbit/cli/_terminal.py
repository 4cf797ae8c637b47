"""The command line's dealings with the terminal: what is printed, and what is typed again."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fourbit._files import printable

if TYPE_CHECKING:
    from rich.table import Table


def is_first_process() -> bool:
    """Whether this is the one of several processes (torchrun) that speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a text."""
    if is_first_process():
        print(printable(text))


def show(table: Table) -> None:
    """Print a table."""
    from fourbit.train._display import make_console

    make_console().print(table)


def make_table(*columns: str) -> Table:
    """An empty table."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    return table


def program() -> str:
    """How to call fourbit again: by its name where the shell finds it, else as it was called."""
    called, found = Path(sys.argv[0]), shutil.which("fourbit")
    if called.name != "fourbit":  # python -m fourbit
        return "fourbit" if found else f"{shlex.quote(sys.executable)} -m fourbit"
    return "fourbit" if found and os.path.realpath(found) == os.path.realpath(called) else shlex.quote(str(called))
