"""The command line: `fourbit train`, `compare`, `report`, and commands that show what there is to choose from.

Each command is a thin wrapper around the library, in the module of its group. Whatever a user can get wrong ends in one
line on standard error and exit code 2. Ctrl-C ends in 130 and SIGTERM in 143; a run that trains is saved before. Torch is
imported only by the commands that need it.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress

from cyclopts import CycloptsError

from fourbit._files import printable
from fourbit._interrupt import interrupted
from fourbit.cli import _catalogues as _catalogues
from fourbit.cli import _conform as _conform
from fourbit.cli import _diagnose as _diagnose
from fourbit.cli import _exports as _exports
from fourbit.cli import _networks as _networks
from fourbit.cli import _runs as _runs
from fourbit.cli import _tune as _tune
from fourbit.cli._app import EXIT_USER_ERROR, app
from fourbit.cli._config_file import with_config_file
from fourbit.cli._hardware import hardware
from fourbit.cli._interrupts import interruptible_imports
from fourbit.cli._terminal import is_first_process, program, say
from fourbit.errors import UserError

app.command(hardware)
app.register_install_completion_command()


@app.command
def doctor() -> int:
    """Show versions and hardware, and test the quantizers against the definition of every format."""
    from fourbit.train._doctor import examine

    healthy = True
    for line, good in examine():
        healthy &= good
        say(line)
    return 0 if healthy else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of the user are one line on standard error."""
    with warnings.catch_warnings(), interruptible_imports() as interrupts:
        warnings.showwarning = _show_warning
        try:
            if any("\0" in word for word in arguments or ()):
                raise UserError("an argument holds a zero byte, which no name can: leave it out.")
            code = app(
                with_config_file(arguments, sys.argv[1:]),
                exit_on_error=False,
                print_error=False,
                result_action="return_value",
            )
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except KeyboardInterrupt:
            return interrupted()
        except Exception as error:
            if interrupts.seen:  # what a library made of it
                return interrupted()
            return _failed(error, (arguments or sys.argv[1:] or [""])[0])


def _failed(error: Exception, command: str) -> int:
    """Say in one line what went wrong, where a user can mend it; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    text = " ".join(str(error).split())
    if isinstance(error, CycloptsError):
        page = f"{program()} {command} --help" if command in app else f"{program()} --help"
        text = text.removesuffix(", ...").rstrip(". ")
        text = f"{text}{'' if text.endswith('?') else '.'} See {page}."
    elif isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in ("", "fourbit"):
        text = f"this command needs {error.name}: pip install 'fourbit[train]'"
    elif _is_out_of_memory(error):
        text = (
            f"there was not enough memory ({text or 'none was left'}): use a smaller --batch-size, a smaller network or fewer "
            "--workers; a run goes on from its last checkpoint (train: with --resume)."
        )
    elif isinstance(error, OSError):
        text = f"{error.filename or 'a file'}: {error.strerror or error}."
    elif not isinstance(error, UserError):
        raise error
    with suppress(OSError):  # standard error may lie on a full disk
        print(f"fourbit: {printable(text)}", file=sys.stderr)
    return EXIT_USER_ERROR


_NO_MEMORY = re.compile(
    "out of memory|not enough memory|can(no|')t allocate memory|bad_alloc|could not create a (memory|primitive)|"
    "size calculation overflowed",
    re.IGNORECASE,
)
"""What torch, its libraries and the system say."""


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


def _show_warning(message: Warning | str, *_: object) -> None:
    if is_first_process():
        print(f"fourbit: warning: {printable(str(message))}", file=sys.stderr)
