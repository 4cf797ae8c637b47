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
from typing import TYPE_CHECKING, Annotated, Literal, cast

from cyclopts import App, CycloptsError, Parameter

from fourbit._terminal import EXIT_INTERRUPTED, interrupted, interruptible_imports, make_table, program, say, show
from fourbit._version import __version__
from fourbit.errors import UserError, unknown
from fourbit.train import CompareConfig, TrainConfig
from fourbit.train._config import whole_numbers, words

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor
    from torch.nn import Module

    from fourbit.reproduce.catalog import TableName

EXIT_USER_ERROR = 2

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
    from fourbit.train._tasks import metric_of

    config = config or TrainConfig()
    result = run(config, resume=resume)
    if result.stopped == "interrupted":
        say(
            f"stopped after step {result.step}; the run goes on with:\n  {config.command('--resume', program=program())}"
        )
        return EXIT_INTERRUPTED
    metric = metric_of(config)
    value = metric.of(result.test_loss, result.test_accuracy, result.test_score)
    found = f"test {metric.name} {'unknown' if value is None else metric.text(value)}"
    skipped = f", {result.skipped} of them left out" if result.skipped else ""
    say(f"{result.stopped}: {found} after {result.step} steps{skipped}, {result.seconds:.1f} s")
    say(f"folder: {result.folder}")
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
        say(f"stopped; the comparison goes on with:\n  {config.command(program=program())}")
        return EXIT_INTERRUPTED
    say(f"folder: {comparison.folder}")
    return 0 if any(row.values for row in comparison.rows) else EXIT_USER_ERROR


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
    say(str(write_report(list(paths), out)))


@app.command
def formats(name: str | None = None, *, png: Path | None = None) -> None:
    """List the number formats, or show one code by code.

    Args:
        name: Format to show in full: every code with its value (of wide formats: every binade), and where rounding decides.
        png: Draw the format to this file.
    """
    from fourbit._format_pages import list_formats, show_format
    from fourbit.formats import get

    if name is not None:
        return show_format(get(name), png)
    if png is not None:
        raise UserError("--png needs the name of a format, as in: fourbit formats fp4_r4_even --png grid.png.")
    return list_formats()


@app.command
def recipes(name: str | None = None) -> None:
    """List the recipes, or show the rules of one.

    Args:
        name: Recipe to show in full.
    """
    from fourbit.ops import SLOTS
    from fourbit.recipes import CATALOG

    if name is None:
        table = make_table("recipe", "what it does", "source")
        for each in CATALOG.values():
            table.add_row(each.name, each.summary, each.source)
        return show(table)
    recipe = CATALOG[name]
    say(f"{recipe.name}: {recipe.summary}\nsource: {recipe.source or '-'}\nthe first rule that matches a layer wins:")
    for number, rule in enumerate(recipe.rules, 1):
        say(f"\n{number}. {rule}{' (may match nothing)' if rule.optional else ''}")
        if rule.spec is None:
            say("   full precision")
            continue
        for slot in SLOTS:
            value = getattr(rule.spec, slot)
            say(f"   {slot:8} {'full precision' if value is None else value}")
        say(f"   output   {rule.spec.output or 'float32'}")
    return None


@app.command
def models() -> None:
    """List the networks."""
    from fourbit.models._base import MODELS

    show(_documented("model", MODELS))


@app.command
def data() -> None:
    """List the data sets."""
    from fourbit.data._base import DATASETS

    show(_documented("data set", DATASETS))


@app.command
def explain(
    *, model: str = "resnet20", recipe: str = "ibm2020", input: str | None = None, classes: int | None = None
) -> None:
    """Show what a recipe does to each layer of a network, and the share of the work in each precision.

    Args:
        model: Network; `fourbit models` lists them.
        recipe: Recipe; `fourbit recipes` lists them.
        input: Channels, height and width of an image (None: 3x32x32, for ImageNet 3x224x224), tokens of a row of text
            (None: 35), frames and features of an utterance (None: 50x40), or tokens of source and target (None: 20x20).
        classes: Number of classes (None: 10), or of the vocabulary's tokens (None: 10000).
    """
    from fourbit.recipes import explain as explain_recipe

    network, batch = _network(model, input, classes, 1)
    say(str(explain_recipe(network, recipe, batch)))


@app.command
def memory(
    *,
    model: str = "resnet20",
    recipe: str = "ibm2020",
    input: str | None = None,
    batch_size: int = 128,
    classes: int | None = None,
) -> None:
    """Show what each layer of a network keeps for its backward pass, against FP32 and bf16.

    Args:
        model: Network; `fourbit models` lists them.
        recipe: Recipe; `fourbit recipes` lists them.
        input: Channels, height and width of an image (None: 3x32x32, for ImageNet 3x224x224), tokens of a row of text
            (None: 35), frames and features of an utterance (None: 50x40), or tokens of source and target (None: 20x20).
        batch_size: Images, or rows of text, per step.
        classes: Number of classes (None: 10), or of the vocabulary's tokens (None: 10000).
    """
    from fourbit.recipes import convert, memory_report
    from fourbit.recipes._memory import format_bytes

    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")
    network, batch = _network(model, input, classes, batch_size)
    before = memory_report(network, batch).total
    report = memory_report(convert(network, recipe), batch)
    say(f"{report}\nby the same network in FP32: {format_bytes(before)}; now {report.total / before:.3f}x of it")


@app.command
def reproduce(
    what: str,
    *,
    row: str | None = None,
    scale: Literal["paper", "small", "smoke"] = "small",
    seeds: Annotated[tuple[int, ...], Parameter(converter=whole_numbers, n_tokens=1, negative="")] = (0,),
    columns: Annotated[tuple[str, ...], Parameter(converter=words, n_tokens=1, negative="")] = (),
    data_dir: Path | None = None,
    threads: int | None = None,
    progress: bool = True,
    out: Path = Path("runs/reproduce"),
) -> int:
    """Reproduce a row of the paper's tables, with the paper's numbers beside ours, a figure, or an open question.

    Started again, the command goes on where it was.

    Args:
        what: list: show everything there is. table1, table2, table3, questions: run a row of that table. Or a figure: fig1a,
            fig1b, fig2b, fig3, fig4, fig5, fig6, macs, sums, bias.
        row: Row, as the list calls it.
        scale: paper: the full schedule. small: an hour or two on two cores. smoke: a minute, to see that it runs.
        seeds: Seeds, separated by commas.
        columns: Recipes, separated by commas. None: the row's columns.
        data_dir: Folder with the files of the data set. None: the Hugging Face hub.
        threads: CPU threads. None: torch's own choice.
        progress: Show a progress bar, if the output is a terminal.
        out: Folder; each row has a folder of its own in it.
    """
    from fourbit.reproduce import reproduce as run
    from fourbit.reproduce import rows_of
    from fourbit.reproduce.catalog import TABLES

    if what == "list":
        return _list_reproductions()
    if what not in TABLES:
        from fourbit.reproduce.figures import FIGURES, draw

        if what not in FIGURES:
            raise unknown("thing to reproduce", what, ("list", *TABLES, *FIGURES))
        if row is not None or columns:
            raise UserError(f"{what} is a figure and has neither rows nor columns: leave out --row and --columns.")
        done = draw(what, scale=scale, data_dir=data_dir, out=out, threads=threads, progress=progress, seeds=seeds)
    else:
        if row is None:
            raise UserError(f"{what} has the rows {', '.join(rows_of(what))}: name one with --row.")
        done = run(
            cast("TableName", what),
            row,
            scale=scale,
            seeds=seeds,
            columns=columns,
            data_dir=data_dir,
            out=out,
            threads=threads,
            progress=progress,
        )
    if done.interrupted:
        say("stopped; the same command goes on with it.")
        return EXIT_INTERRUPTED
    say(f"{done.text}\nfolder: {done.folder}")
    return 0


def _list_reproductions() -> int:
    from fourbit.reproduce import rows_of
    from fourbit.reproduce.catalog import COLUMNS, SHORT, TABLES, TITLES
    from fourbit.reproduce.figures import FIGURES
    from fourbit.reproduce.figures import title as figure_title

    for name in TABLES[:-1]:
        table = make_table(f"{name} --row", TITLES[name], "", *SHORT, "scales")
        for r in rows_of(name).values():
            numbers = (f"{r.paper[c]:.2f}{'*' if c == r.bold else ' '}" if c in r.paper else "- " for c in COLUMNS)
            table.add_row(r.name, r.title, r.metric, *numbers, ", ".join(r.scales))
        show(table)
    say("The paper's numbers; *: printed in bold. Recipes of the columns: " + ", ".join(COLUMNS))
    table = make_table("questions --row", TITLES["questions"], "recipes")
    for r in rows_of("questions").values():
        table.add_row(r.name, r.title, ", ".join(r.columns))
    show(table)
    table = make_table("figure", "what it shows")
    for name in FIGURES:
        table.add_row(name, figure_title(name))
    show(table)
    return 0


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
    with warnings.catch_warnings(), interruptible_imports():
        warnings.showwarning = _show_warning
        try:
            code = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
            sys.stdout.flush()
            return code if isinstance(code, int) else 0
        except KeyboardInterrupt:
            return interrupted()
        except Exception as error:
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
    elif isinstance(error, OSError):
        text = f"{error.filename or 'a file'}: {error.strerror or error}."
    elif not isinstance(error, UserError):
        raise error
    print(f"fourbit: {text}", file=sys.stderr)
    return EXIT_USER_ERROR


def _network(
    model: str, input: str | None, classes: int | None, batch_size: int
) -> tuple[Module, Tensor | tuple[int, ...] | tuple[Tensor, ...]]:
    """The network for such inputs, and a batch of them or its shape."""
    import torch

    from fourbit.models import MIN_IMAGE_SIZE, build, kind_of, min_image_size

    kind = kind_of(model)
    image = "3x224x224" if min_image_size(model) > MIN_IMAGE_SIZE else "3x32x32"
    defaults = {"image": image, "text": "35", "speech": "50x40", "translation": "20x20"}
    sizes = defaults[kind] if input is None else input.lower()
    parts = sizes.split("x")
    numbers = [int(part) for part in parts if part.isdigit() and int(part) > 0]
    if kind == "text":
        if len(parts) != 1 or not numbers:
            raise UserError(f"input is {input!r}, but {model} reads text: give the tokens of a row, such as 35.")
        network = build(model, num_classes=10_000 if classes is None else classes)
        return network, torch.zeros(numbers[0], batch_size, dtype=torch.int64)
    if kind == "translation":
        if len(parts) != 2 or len(numbers) != 2:
            raise UserError(
                f"input is {input!r}, but {model} translates: give tokens of source and target, such as 20x20."
            )
        network = build(model, num_classes=10_000 if classes is None else classes)
        return network, tuple(torch.ones(length, batch_size, dtype=torch.int64) for length in numbers)
    if kind == "speech":
        if len(parts) != 2 or len(numbers) != 2:
            raise UserError(f"input is {input!r}, but {model} reads speech: give frames and features, such as 50x40.")
        network = build(model, num_classes=10 if classes is None else classes, in_channels=numbers[1])
        return network, (numbers[0], batch_size, numbers[1])
    if len(parts) != 3 or len(numbers) != 3 or numbers[1] != numbers[2]:
        raise UserError(f"input is {input!r}, but must be channels, height and width of a square image: 3x32x32.")
    channels, size = numbers[:2]
    network = build(model, num_classes=10 if classes is None else classes, in_channels=channels, image_size=size)
    return network, (batch_size, channels, size, size)


def _documented(kind: str, functions: Mapping[str, object]) -> Table:
    """Names, and the first sentence of the docstring of what is registered under them."""
    table = make_table(kind, "description")
    for name, function in functions.items():
        table.add_row(name, (function.__doc__ or "").strip().split("\n\n")[0].replace("\n", " "))
    return table


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"fourbit: warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
