"""Commands about silicon: units, synth, estimate, report."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter

from fourbit.cli._terminal import make_table, say, show
from fourbit.errors import UserError
from fourbit.train._config import whole_numbers, words

if TYPE_CHECKING:
    from fourbit.hardware import Product, Results
    from fourbit.recipes import Recipe

hardware = App(
    name="hardware", help="Arithmetic units for 4-bit training: what they cost, and what a training step costs on them."
)

PERIODS = (3000.0, 4000.0, 6000.0)
"""Clock periods of tables, in ps."""


@hardware.command
def units(
    *, results: Path | None = None, library: Literal["sg13g2", "sky130"] = "sg13g2", define: Path | None = None
) -> None:
    """List the arithmetic units, with area, delay and density in a cell library.

    Args:
        results: File that `fourbit hardware synth` wrote. None: the stored results of `library`.
        library: Of the stored results: IHP SG13G2 or SkyWater SKY130.
        define: Python file that enters units of your own, as docs/hardware.md shows.
    """
    from fourbit.hardware import UNITS, summary_rows

    _define(define)
    found = _results(results, library)
    table = make_table(
        "unit", "um2", "gates", "ns", "um2, fast", "ns", *(f"{p / 1000:g} ns" for p in PERIODS), "best", "pJ"
    )
    for row in summary_rows(found, PERIODS):
        table.add_row(*row)
    show(table)
    say(f"{found.library}, typical corner; versions: {', '.join(f'{k} {v}' for k, v in found.tools.items())}.")
    say(
        "um2, gates (NAND equivalents), ns (clock period between registers): the smallest form; then the fastest. At a clock "
        "period: multiply-accumulates per second and area against the FP16 fused multiply-add, each with its accumulator and, "
        "if it adds in fixed point, a 32nd of a converter; -: it misses the clock. pJ: of the smallest form per "
        "multiply-accumulate (per cycle where it does none), of a real trace, without glitches and wires; dense forms have "
        "more registers and take more."
    )
    for name in found.units:
        say(f"  {name:18} {UNITS[name].title}")


@hardware.command
def synth(
    *,
    liberty: Path,
    units: Annotated[tuple[str, ...], Parameter(converter=words, n_tokens=1, negative="")] = (),
    out: Path = Path("synthesis.json"),
    targets: Annotated[tuple[int, ...], Parameter(converter=whole_numbers, n_tokens=1, negative="")] = (1000, 4000),
    processes: int | None = None,
    define: Path | None = None,
    progress: bool = True,
) -> None:
    """Map units onto a standard-cell library: area, delay and energy of each, in several pipelines.

    Args:
        liberty: Library in Liberty format, plain or gzipped.
        units: Names, separated by commas; the FP16 baseline, a register and a converter are added. None: all.
        out: File for the results, which the other commands read by --results.
        targets: Delays to optimise for, in ps, separated by commas.
        processes: At a time. None: one per core.
        define: Python file that enters units of your own, as docs/hardware.md shows.
        progress: Show a progress bar, if the output is a terminal.
    """
    import os
    import time

    from fourbit.hardware import BASELINE, UNITS, Library, Results, synthesize, tool_versions
    from fourbit.train._display import make_console

    _define(define)
    for name in units:
        UNITS[name]
    if any(t <= 0 for t in targets) or not targets:
        raise UserError(f"targets are {', '.join(map(str, targets))}, but must be positive times in ps.")
    if processes is not None and processes < 1:
        raise UserError(f"processes is {processes}, but must be at least 1.")
    if out.exists() and out.is_dir():
        raise UserError(f"{out} is a folder: give --out the name of a file.")
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    library = Library(liberty)
    library.check()
    around = [BASELINE, "register", "converter"]  # without which there is nothing to compare with
    names = list(dict.fromkeys([*units, *around])) if units else list(UNITS)
    start = time.monotonic()
    console = make_console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal), transient=True) as bar:
        task = bar.add_task("synthesis")

        def step(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        points = synthesize(names, liberty, targets, processes, step)
    seconds = time.monotonic() - start
    workers = processes or os.cpu_count() or 1
    results = Results(
        library.name,
        library.gate_equivalent,
        library.voltage,
        tool_versions(),
        round(seconds, 1),
        workers,
        tuple(points),
    )
    results.write(out)
    say(
        f"{len(points)} forms of {len(names)} units in {seconds:.0f} s: {out}. See: fourbit hardware units --results {out}"
    )


@hardware.command
def estimate(
    *,
    model: str = "resnet20",
    recipe: str = "ibm2020",
    input: str | None = None,
    classes: int | None = None,
    batch_size: int = 32,
    results: Path | None = None,
    library: Literal["sg13g2", "sky130"] = "sg13g2",
    accumulator: Literal["fp16", "fixed"] = "fp16",
    rows: int = 32,
    columns: int = 32,
    dataflow: Literal["os", "ws", "is"] = "ws",
    sram_kb: int = 1024,
    bandwidth: float = 1.0,
    period: float | None = None,
    define: Path | None = None,
    layers: bool = False,
) -> None:
    """Time, energy and area of a training step of a network on systolic arrays of the recipe's units, against FP16.

    Args:
        model: Network; `fourbit models` lists them.
        recipe: Recipe; `fourbit recipes` lists them. With a second one behind it (ibm2020/nvfp4): the formats of that one in
            the layers that the first one quantizes.
        input: Channels, height and width of an image (None: 3x32x32, for ImageNet 3x224x224), tokens of a row of text
            (None: 35), frames and features of an utterance (None: 50x40), or tokens of source and target (None: 20x20).
        classes: Number of classes (None: 10), or of the vocabulary's tokens (None: 10000).
        batch_size: Images, or rows of text, per step.
        results: File that `fourbit hardware synth` wrote. None: the stored results of `library`.
        library: Of the stored results: IHP SG13G2 or SkyWater SKY130.
        accumulator: Sums of 4-bit products in FP16, or in a fixed-point register with a shared converter.
        rows: Of the array.
        columns: Of the array, if it is made of FP16 units; others get the same area.
        dataflow: Systolic array that keeps results (os), weights (ws) or inputs (is).
        sram_kb: On-chip memory for operands, in KB.
        bandwidth: Of memory, in bits per cycle and FP16 unit.
        period: Clock period in ps for all units. None: each at its own best.
        define: Python file that enters units of your own, as docs/hardware.md shows.
        layers: Show every product.
    """
    from fourbit.hardware import Machine, in_full_precision
    from fourbit.hardware import estimate as estimate_step

    _define(define)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")
    found = _results(results, library)
    products = step_products(model, recipe, input, classes, batch_size)
    machine = Machine(rows, columns, dataflow, sram_kb, bandwidth, period, accumulator)
    cost = estimate_step(products, machine, found)
    base = estimate_step(in_full_precision(products), machine, found)
    if layers:
        table = make_table("layer", "GEMM", "unit", "MACs", "us", "bound by", "used")
        for p in cost.parts:
            bound = "memory" if p.memory > p.compute else "arithmetic"
            used = f"{p.utilisation:.0%}" if p.macs else ""
            table.add_row(p.layer, p.gemm, p.unit, f"{p.macs:,}", f"{p.seconds * 1e6:.1f}", bound, used)
        show(table)
    say(
        f"{model}, {recipe}, batch of {batch_size}: a training step on {rows} x {columns} FP16 units' area ({found.library})"
    )
    say(machine.describe())
    table = make_table("", "FP16", recipe, "FP16 / this")
    for title, a, b, unit, scale in (
        ("time", base.seconds, cost.seconds, "ms", 1e3),
        ("energy", base.joules, cost.joules, "mJ", 1e3),
        ("  arithmetic", base.energy["arithmetic"], cost.energy["arithmetic"], "mJ", 1e3),
        ("  on-chip memory", base.energy["sram"], cost.energy["sram"], "mJ", 1e3),
        ("  DRAM", base.energy["dram"], cost.energy["dram"], "mJ", 1e3),
        ("  quantizers", base.energy["quantizers"], cost.energy["quantizers"], "mJ", 1e3),
    ):
        ratio = f"{a / b:.2f}" if a and b else ""
        table.add_row(f"{title}, {unit}", f"{a * scale:.4g}", f"{b * scale:.4g}", ratio)
    table.add_row("area, mm2", f"{base.area / 1e6:.2f}", f"{cost.area / 1e6:.2f}", "")
    table.add_row("  quantizers on top", "", f"{cost.quantizer_area / 1e6:.2f}", "")
    table.add_row("units busy", f"{base.utilisation:.0%}", f"{cost.utilisation:.0%}", "")
    show(table)
    for title, by in (
        ("time by GEMM", lambda p: p.gemm),
        ("time by unit", lambda p: p.unit or "none (memory between the products)"),
        ("time bound by", lambda p: "memory" if p.memory > p.compute else "arithmetic"),
    ):
        say(f"{title}: " + ", ".join(f"{k} {v:.1%}" for k, v in cost.share(by).items()))
    say(
        f"quantizing gradients, by the paper's count of 10 FLOP per element: {cost.gradient_flops:.1%} of the products' FLOP"
    )


@hardware.command
def report(
    *,
    out: Path = Path("hardware.html"),
    results: Path | None = None,
    library: Literal["sg13g2", "sky130"] = "sg13g2",
    runs: Annotated[tuple[str, ...], Parameter(converter=words, n_tokens=1, negative="")] = (),
) -> None:
    """Write a page: what the paper's 7.3 rests on, what conversion costs, networks, accuracy against energy.

    Args:
        out: Name of the page, or a folder.
        results: File that `fourbit hardware synth` wrote. None: the stored results of `library`, which need no tools.
        library: Of the stored results: IHP SG13G2 or SkyWater SKY130.
        runs: Folders with training runs, separated by commas, for accuracy against energy.
    """
    from fourbit.reproduce._hardware_page import write

    found = _results(results, library)
    say(f"from the results of synthesis with {', '.join(f'{k} {v}' for k, v in found.tools.items())} ({found.library})")
    say(str(write(out, found, step_products, [Path(r) for r in runs])))


def _define(path: Path | None) -> None:
    """Run a user's file."""
    import runpy

    if path is None:
        return
    try:
        runpy.run_path(str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a Python file.") from error
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} breaks off with {type(error).__name__}: {' '.join(str(error).split())}") from error


def _results(path: Path | None, library: str) -> Results:
    from fourbit.hardware import Results, stored

    return stored(library) if path is None else Results.read(path)


def step_products(model: str, recipe: str, input: str | None, classes: int | None, batch_size: int) -> list[Product]:
    """All products of a training step of a network with a recipe; "RECIPE/FORMATS": with the formats of
    another recipe in the layers that the first one quantizes."""
    from fourbit.cli._networks import build_network
    from fourbit.recipes import CATALOG, explain
    from fourbit.tuning._products import products_of

    name, slash, formats = recipe.partition("/")
    chosen = with_formats(CATALOG[name], CATALOG[formats]) if slash else CATALOG[name]
    import torch

    with contextlib.nullcontext() if ":" in model else torch.device("meta"):  # shapes are all that is needed
        network, batch = build_network(model, input, classes, batch_size)
    return products_of(explain(network, chosen, batch))


def with_formats(recipe: Recipe, other: Recipe) -> Recipe:
    """A recipe with the formats that another one has in linear layers, wherever its own operands have fewer than 16 bits."""
    from torch import nn

    from fourbit.ops import SLOTS

    spec = next(r.spec for r in reversed(other.rules) if r.types is None or nn.Linear in r.types)
    rules = []
    for rule in recipe.rules:
        specs = () if rule.spec is None else map(rule.spec.resolved, SLOTS)
        narrow = any(found is not None and found.format.bits < 16 for found in specs)
        rules.append(replace(rule, spec=spec) if narrow else rule)
    return replace(recipe, name=f"{recipe.name}/{other.name}", rules=tuple(rules), phases=(), upkeep=())
