"""Commands that train, and that look at what was trained: train, compare, report, fidelity, reproduce."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

from cyclopts import Parameter

from fourbit._files import problem, replace_file
from fourbit._interrupt import EXIT_INTERRUPTED, EXIT_TERMINATED
from fourbit.cli._app import EXIT_USER_ERROR, app
from fourbit.cli._config_file import ConfigFile
from fourbit.cli._terminal import make_table, program, say, show
from fourbit.errors import UserError, unknown
from fourbit.train import CompareConfig, TrainConfig
from fourbit.train._config import WHOLE, whole_numbers, words

if TYPE_CHECKING:
    from fourbit.reproduce._row import TableName


@app.command
def train(
    config: Annotated[TrainConfig | None, Parameter(name="*")] = None,
    *,
    resume: Annotated[bool, Parameter(negative="")] = False,
    config_file: ConfigFile = None,
) -> int:
    """Train a network with one recipe.

    Everything about the run goes into the folder --out. Ctrl-C ends the run after the step in progress and prints the
    command that continues it, bit for bit.

    Args:
        resume: Go on with the run in --out, which must have been made with the same settings.
        config_file: TOML file with settings, by the names of the flags; a flag goes before the file.
    """
    from fourbit.train import train as run
    from fourbit.train.tasks import metric_of

    config = config or TrainConfig()
    result = run(config, resume=resume)
    if result.stopped == "interrupted":
        say(
            f"stopped after step {result.step}; the run goes on with:\n  {config.command('--resume', program=program())}"
        )
        return _exit_code()
    metric = metric_of(config)
    value = metric.of(result.test_loss, result.test_accuracy, result.test_score)
    found = f"test {metric.name} {'unknown' if value is None else metric.text(value)}"
    skipped = f", {result.skipped} of them left out" if result.skipped else ""
    say(f"{result.stopped}: {found} after {result.step} steps{skipped}, {result.seconds:.1f} s")
    say(f"folder: {result.folder}")
    return 0


def _exit_code() -> int:
    """Of a run that was stopped: which signal did it."""
    from fourbit.train._signals import StopRequest

    return EXIT_TERMINATED if StopRequest.last == signal.SIGTERM else EXIT_INTERRUPTED


@app.command
def compare(
    config: Annotated[CompareConfig | None, Parameter(name="*")] = None, *, config_file: ConfigFile = None
) -> int:
    """Train one network with several recipes and seeds, and print a table.

    All runs start from the same weights per seed and see the same batches. Started again, the command skips the runs that
    are finished and goes on with the others.

    Args:
        config_file: TOML file with settings, by the names of the flags; a flag goes before the file.
    """
    from fourbit.train import compare as run

    config = config or CompareConfig()
    comparison = run(config)
    if comparison.interrupted:
        say(f"stopped; the comparison goes on with:\n  {config.command(program=program())}")
        return _exit_code()
    say(f"folder: {comparison.folder}")
    return 0 if any(row.values for row in comparison.rows) else EXIT_USER_ERROR


@app.command
def runs(*paths: Path) -> None:
    """List run folders: recipe, data, steps, state and score.

    Finished, running (a process trains in it now), stopped (goes on with --resume), diverged, or damaged, with the reason.

    Args:
        paths: Run folders, or folders that contain run folders. None: runs.
    """
    from rich.markup import escape

    from fourbit.train._runs import described

    table = make_table("folder", "model", "data", "recipe", "seed", "state", "step", "score")
    for row in described(paths or (Path("runs"),)):
        table.add_row(*map(escape, row))
    show(table)


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
def fidelity(
    run: Path,
    *,
    recipes: Annotated[tuple[str, ...], Parameter(converter=words, n_tokens=1, negative="")] = (
        "ibm2020",
        "ibm2020-dw8",
        "ibm2020-luq",
    ),
    data_dir: Path | None = None,
    threads: Annotated[int | None, WHOLE] = None,
    progress: bool = True,
    model: str | None = None,
    markdown: Path | None = None,
) -> None:
    """Show how much of the exact gradient of each weight is left in 4 bits, layer by layer.

    Every recipe gets the weights of the run and the same batch. Two numbers per layer: the projection on the exact gradient (1:
    all of it, below 1: it shrinks on the way to the input), and the cosine of the angle between both.

    Args:
        run: Folder of a run that has a checkpoint.
        recipes: Recipes, separated by commas.
        data_dir: Folder with the files of the data set. None: as in the run.
        threads: CPU threads. None: torch's own choice.
        progress: Show a progress bar, if the output is a terminal.
        model: The run's network again, if it is your own (path/to/file.py:function): no code runs because a folder names it.
        markdown: Write the table to this file as well.
    """
    from fourbit.train import gradient_fidelity

    if not recipes:
        raise UserError("recipes is empty: name at least one; fourbit recipes lists them.")
    found = gradient_fidelity(run, recipes, data_dir=data_dir, threads=threads, progress=progress, model=model)
    rows = []
    for layer in dict.fromkeys(layer for each in found.values() for layer in each):
        both = (each.get(layer) for each in found.values())
        rows.append((layer, *("-" if f is None else f"{f.projection:.2f}, {f.cosine:.2f}" for f in both)))
    table = make_table("layer", *found)
    for row in rows:
        table.add_row(*row)
    show(table)
    say("projection on the exact gradient (1: all of it), and cosine")
    if markdown is not None:
        lines = ["| layer | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        try:
            replace_file(markdown, ("\n".join(lines) + "\n").encode())
        except OSError as error:
            raise UserError(f"the table could not be written to {markdown}: {problem(error, markdown)}.") from error


@app.command
def reproduce(
    what: str,
    *,
    row: str | None = None,
    scale: Literal["paper", "converged", "small", "smoke"] = "small",
    seeds: Annotated[tuple[int, ...], Parameter(converter=whole_numbers, n_tokens=1, negative="")] = (),
    columns: Annotated[tuple[str, ...], Parameter(converter=words, n_tokens=1, negative="")] = (),
    data_dir: Path | None = None,
    threads: Annotated[int | None, WHOLE] = None,
    progress: bool = True,
    table_only: Annotated[bool, Parameter(negative="")] = False,
    out: Path = Path("runs/reproduce"),
) -> int:
    """Reproduce a row of the paper's tables, with the paper's numbers beside ours, a figure, or an open question.

    Started again, the command goes on where it was.

    Args:
        what: list: show everything there is. table1, table2, table3, questions, debates: run a row of that table. Or a
            figure: fig1a, fig1b, fig2b, fig3, fig4, fig5, fig6, macs, sums, bias.
        row: Row, as the list calls it.
        scale: paper: the full schedule. converged: the full schedule of half a network on small pictures, an hour or two of
            one core for each run; only of questions. small: an hour or two on two cores. smoke: a minute, to see that it runs.
        seeds: Seeds, separated by commas. None: 0.
        columns: Recipes, separated by commas. None: the row's columns.
        data_dir: Folder with the files of the data set. None: the Hugging Face hub. Figures and questions at the scale smoke
            take the built-in digits instead.
        threads: CPU threads. None: torch's own choice.
        progress: Show a progress bar, if the output is a terminal.
        table_only: Train nothing: write the table of a row from the runs that lie in --out and are finished, of all seeds;
            --columns adds recipes to the row's.
        out: Folder; each row and each figure has a folder of its own in it. The runs of figures, questions and debates,
            which share them, are in networks-SCALE.
    """
    from fourbit.reproduce import reproduce as run
    from fourbit.reproduce import rows_of
    from fourbit.reproduce._row import TABLES

    if what == "list":
        if row is not None or columns:
            raise UserError("list shows everything there is: leave out --row and --columns.")
        return _list_reproductions()
    if table_only and seeds:
        raise UserError("--table-only shows all seeds that lie there: leave out --seeds.")
    seeds = seeds or (0,)
    try:
        if what not in TABLES:
            from fourbit.reproduce.figures import FIGURES, draw

            if what not in FIGURES:
                raise unknown("thing to reproduce", what, ("list", *TABLES, *FIGURES))
            if row is not None or columns:
                raise UserError(f"{what} is a figure and has neither rows nor columns: leave out --row and --columns.")
            if table_only:
                raise UserError(f"{what} is a figure and looks into the trained networks: leave out --table-only.")
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
                table_only=table_only,
            )
    except KeyboardInterrupt:  # outside of a training step, which ends by itself
        done = None
    if done is None or done.interrupted:
        say("stopped; the same command goes on with it.")
        return _exit_code()
    say(f"{done.text}\nfolder: {done.folder}" + (f"\nruns: {done.runs}" if done.runs != done.folder else ""))
    return 0


def _list_reproductions() -> int:
    from fourbit.reproduce import rows_of
    from fourbit.reproduce._row import COLUMNS, HALF_ONLY, OWN, SCALES, SHORT, TABLES, TITLES
    from fourbit.reproduce.figures import FIGURES, PAPER
    from fourbit.reproduce.figures import title as figure_title

    for name in (t for t in TABLES if t not in OWN):
        rows = rows_of(name).values()
        metrics = {r.metric for r in rows}
        table = (
            make_table(f"{name} --row", *metrics)
            if len(metrics) == 1
            else make_table(f"{name} --row", TITLES[name], "")
        )
        for title in SHORT:
            table.add_column(title, no_wrap=True)
        for r in rows:
            numbers = (f"{r.paper[c]:.2f}{'*' if c == r.bold else ' '}" if c in r.paper else "- " for c in COLUMNS)
            missing = ", not at the scale paper" if "paper" not in r.scales else ""
            table.add_row(r.name, r.title + missing, *([] if len(metrics) == 1 else [r.metric]), *numbers)
        show(table)
    say("The paper's numbers; *: printed in bold. Recipes of the columns: " + ", ".join(COLUMNS))
    say("Scales: " + ", ".join(SCALES) + f" ({HALF_ONLY})")
    for name in OWN:
        table = make_table(f"{name} --row", TITLES[name], "recipes")
        for r in rows_of(name).values():
            table.add_row(r.name, r.title, ", ".join(r.columns))
        show(table)
    table = make_table("figure", "what it shows", "in the paper")
    for name in FIGURES:
        table.add_row(name, figure_title(name), PAPER.get(name, "-"))
    show(table)
    return 0
