"""The command line: `fourbit train`, `compare`, `report`, and commands that show what there is to choose from.

Each command is a thin wrapper around the library. Whatever a user can get wrong ends in one line on standard error and
exit code 2; an interrupted run in 130. Torch is imported only by the commands that need it.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, CycloptsError, Parameter

from fourbit._version import __version__
from fourbit.errors import UserError
from fourbit.train import CompareConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from torch.nn import Module

    from fourbit.formats import Format

MAX_LISTED_BITS = 8
"""Wider formats have too many codes to list."""

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

app = App(
    name="fourbit",
    help="Train deep neural networks in 4 bits, compare recipes, and look inside them.",
    version=__version__,
    suppress_keyboard_interrupt=False,
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
    skipped = f", {result.skipped} of them left out" if result.skipped else ""
    _say(f"{result.stopped}: test accuracy {accuracy} after {result.step} steps{skipped}, {result.seconds:.1f} s")
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
    return 0 if any(row.accuracies for row in comparison.rows) else EXIT_USER_ERROR


@app.command
def report(*paths: Path, out: Path | None = None) -> None:
    """Write a page with tables and figures about runs.

    Args:
        paths: Run folders, or folders that contain run folders.
        out: Folder of index.html and figures/, or X.html for that page and X_figures/. None: report in the first path.
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
    from fourbit.formats import CATALOG, get

    if name is None:
        if png is not None:
            raise UserError("--png needs the name of a format, as in: fourbit formats fp4_r4_even --png grid.png.")
        table = _table("format", "bits", "numbers", "smallest", "largest", "definition")
        for each in CATALOG.values():
            numbers = (each.bits, len(each.grid), f"{each.smallest:g}", f"{each.max:g}")
            table.add_row(each.name, *map(str, numbers), each.summary)
        return _show(table)
    format = get(name)
    drawn = "" if png is None else f"\ndrawn: {_draw(format, png)}"
    _say(f"{format.name}: {format.summary}\nsource: {format.source or '-'}{drawn}")
    if format.bits > MAX_LISTED_BITS:
        return _say(f"{2**format.bits} codes, {len(format.grid)} numbers from {format.min:g} to {format.max:g}")
    table = _table("code", "bits", "value")
    for code, value in enumerate(format.values):
        table.add_row(str(code), f"{code:0{format.bits}b}", f"{value:.10g}")
    _show(table)
    table = _table("from", "up to", "becomes")
    edges = [float("-inf"), *format.decision_points, float("inf")]
    for low, high, value in zip(edges, edges[1:], format.grid, strict=False):
        table.add_row(f"{low:.10g}", f"{high:.10g}", f"{value:.10g}")
    _show(table)
    ties = "goes away from zero" if format.multiplier is not None else "goes to the number with the even code"
    return _say(f"A value exactly on a decision point {ties}.")


@app.command
def recipes(name: str | None = None) -> None:
    """List the recipes, or show the rules of one.

    Args:
        name: Recipe to show in full.
    """
    from fourbit.ops import SLOTS
    from fourbit.recipes import CATALOG

    if name is None:
        table = _table("recipe", "what it does", "source")
        for each in CATALOG.values():
            table.add_row(each.name, each.summary, each.source)
        return _show(table)
    recipe = CATALOG[name]
    _say(f"{recipe.name}: {recipe.summary}\nsource: {recipe.source or '-'}\nthe first rule that matches a layer wins:")
    for number, rule in enumerate(recipe.rules, 1):
        _say(f"\n{number}. {rule}{' (may match nothing)' if rule.optional else ''}")
        if rule.spec is None:
            _say("   full precision")
            continue
        for slot in SLOTS:
            value = getattr(rule.spec, slot)
            _say(f"   {slot:8} {'full precision' if value is None else value}")
        _say(f"   output   {rule.spec.output or 'float32'}")
    return None


@app.command
def models() -> None:
    """List the networks."""
    from fourbit.models._base import MODELS

    _show(_documented("model", MODELS))


@app.command
def data() -> None:
    """List the data sets."""
    from fourbit.data._base import DATASETS

    _show(_documented("data set", DATASETS))


@app.command
def explain(*, model: str = "resnet20", recipe: str = "ibm2020", input: str = "3x32x32", classes: int = 10) -> None:
    """Show what a recipe does to each layer of a network, and the share of the work in each precision.

    Args:
        model: Network; `fourbit models` lists them.
        recipe: Recipe; `fourbit recipes` lists them.
        input: Channels, height and width of an image.
        classes: Number of classes.
    """
    from fourbit.recipes import explain as explain_recipe

    network, shape = _network(model, input, classes)
    _say(str(explain_recipe(network, recipe, (1, *shape))))


@app.command
def memory(
    *,
    model: str = "resnet20",
    recipe: str = "ibm2020",
    input: str = "3x32x32",
    batch_size: int = 128,
    classes: int = 10,
) -> None:
    """Show what each layer of a network keeps for its backward pass, against FP32 and bf16.

    Args:
        model: Network; `fourbit models` lists them.
        recipe: Recipe; `fourbit recipes` lists them.
        input: Channels, height and width of an image.
        batch_size: Images per step.
        classes: Number of classes.
    """
    from fourbit.recipes import convert, memory_report
    from fourbit.recipes._memory import format_bytes

    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")
    network, shape = _network(model, input, classes)
    before = memory_report(network, (batch_size, *shape)).total
    report = memory_report(convert(network, recipe), (batch_size, *shape))
    _say(f"{report}\nby the same network in FP32: {format_bytes(before)}; now {report.total / before:.3f}x of it")


@app.command
def doctor() -> int:
    """Show versions and hardware, and test the quantizers against the definition of every format."""
    from fourbit.train._doctor import examine

    healthy = True
    for line, good in examine():
        healthy &= good
        _say(line)
    return 0 if healthy else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of the user are one line on standard error."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except (UserError, CycloptsError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, CycloptsError):
                command = (arguments or sys.argv[1:] or [""])[0]
                page = f"fourbit {command} --help" if command in app else "fourbit --help"
                text = f"{text.rstrip('. ')}. See {page}."
            print(f"fourbit: {text}", file=sys.stderr)
            return EXIT_USER_ERROR
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in ("", "fourbit"):
                raise
            print(f"fourbit: this command needs {error.name}: pip install 'fourbit[train]'", file=sys.stderr)
            return EXIT_USER_ERROR
        except KeyboardInterrupt:
            print("fourbit: interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            print(f"fourbit: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
            return EXIT_USER_ERROR


def _network(model: str, input: str, classes: int) -> tuple[Module, tuple[int, int, int]]:
    """The network for images of that size, and the size."""
    from fourbit.models import build

    parts = input.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts) or parts[1] != parts[2]:
        raise UserError(f"input is {input!r}, but must be channels, height and width of a square image: 3x32x32.")
    channels, size = int(parts[0]), int(parts[1])
    return build(model, num_classes=classes, in_channels=channels, image_size=size), (channels, size, size)


def _console() -> Console:
    from fourbit.train._display import make_console

    return make_console()


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes (torchrun), the first one speaks
        print(text)


def _show(table: Table) -> None:
    _console().print(table)


def _table(*columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0)
    return table


def _documented(kind: str, functions: Mapping[str, object]) -> Table:
    """Names, and the first sentence of the docstring of what is registered under them."""
    table = _table(kind, "description")
    for name, function in functions.items():
        table.add_row(name, (function.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "))
    return table


def _draw(format: Format, path: Path) -> Path:
    """Write the picture of a format."""
    from fourbit.report import draw_number_line

    try:
        draw_number_line(format).savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} could not be written ({error}): give a file name that ends in .png.") from error
    return path


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"fourbit: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
