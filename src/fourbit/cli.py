"""The command line: `fourbit train`, `compare`, `report`, and commands that show what there is to choose from.

Each command is a thin wrapper around the library. Whatever a user can get wrong ends in one line on standard error and
exit code 2; an interrupted run in 130. Torch is imported only by the commands that need it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

from cyclopts import App, CycloptsError, Parameter

from fourbit._version import __version__
from fourbit.errors import UserError
from fourbit.train import CompareConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

app = App(
    name="fourbit",
    help="Train deep neural networks in 4 bits, compare recipes, and look inside them.",
    version=__version__,
)


@app.command
def train(
    config: Annotated[TrainConfig | None, Parameter(name="*")] = None,
    *,
    resume: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Train a network with one recipe.

    Everything about the run goes into the folder --out. Ctrl-C ends the run after the step in progress and prints the
    command that continues it, bit for bit.

    Args:
        resume: Go on with the run in --out, which must have been made with the same settings.
    """
    from fourbit.train import train as run

    config = config or TrainConfig()
    result = run(config, resume=resume)
    if result.stopped == "interrupted":
        _say(f"stopped after step {result.step}; the run goes on with:\n  {config.command('--resume')}")
        return EXIT_INTERRUPTED
    accuracy = "unknown" if result.test_accuracy is None else f"{result.test_accuracy:.2%}"
    _say(f"{result.stopped}: test accuracy {accuracy} after {result.step} steps, {result.seconds:.1f} s")
    _say(f"folder: {result.folder}")
    return 0


@app.command
def compare(config: Annotated[CompareConfig | None, Parameter(name="*")] = None) -> int:
    """Train one network with several recipes and seeds, and print a table.

    All runs start from the same weights per seed and see the same batches. Started again, the command skips the runs that
    are finished and goes on with the others.
    """
    from fourbit.train import compare as run

    config = config or CompareConfig()
    comparison = run(config)
    if comparison.interrupted:
        _say(f"stopped; the comparison goes on with:\n  {config.command()}")
        return EXIT_INTERRUPTED
    _say(f"folder: {comparison.folder}")
    return 0


@app.command
def report(*paths: Path, out: Path | None = None) -> None:
    """Write a page with tables and figures about runs.

    Args:
        paths: Run folders, or folders that contain run folders.
        out: Folder of the page, or its name if it ends in .html. None: the folder report in the first path.
    """
    from fourbit.report import write_report

    if not paths:
        raise UserError("report needs at least one run folder: fourbit report runs/compare.")
    _say(str(write_report(list(paths), out)))


@app.command
def formats(name: str | None = None, *, png: Path | None = None) -> None:
    """List the number formats, or show one code by code.

    Args:
        name: Format to show in full: every code with its value, and where rounding decides.
        png: Draw the format to this file.
    """
    from fourbit._tables import format_codes, format_list

    if name is not None:
        _print(*format_codes(name, png))
    elif png is not None:
        raise UserError("--png needs the name of a format: fourbit formats fp4_r4_even --png grid.png.")
    else:
        _print(format_list())


@app.command
def recipes(name: str | None = None) -> None:
    """List the recipes, or show the rules of one.

    Args:
        name: Recipe to show in full.
    """
    from fourbit._tables import recipe_list, recipe_rules

    _print(recipe_list() if name is None else recipe_rules(name))
