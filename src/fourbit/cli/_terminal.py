"""The command line's dealings with the terminal: what is printed, what is typed again, and Ctrl-C."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

EXIT_INTERRUPTED = 130


def is_first_process() -> bool:
    """Whether this is the one of several processes (torchrun) that speaks."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a text."""
    if is_first_process():
        print(text)


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


def interrupted() -> int:
    """Say that Ctrl-C was pressed; returns the exit code."""
    os.write(sys.stderr.fileno(), b"fourbit: interrupted\n")  # also in a signal handler, unlike print
    return EXIT_INTERRUPTED


@contextmanager
def interruptible_imports() -> Iterator[None]:
    """While this is active, Ctrl-C in the middle of an import ends the process at once, and elsewhere is as ever.

    Large libraries swallow a KeyboardInterrupt while they load, or turn it into errors of their own. Nothing is lost,
    since no file is written during an import.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
                os._exit(interrupted())
            frame = frame.f_back
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
