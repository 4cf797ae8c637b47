"""Synthesis with yosys and ABC (the package `pyosys`): from a unit to gates, and from gates to cells of a library.

Every unit is treated alike: sums become carry-save trees, then ABC maps them by each of `SCRIPTS`, for one target or several.
What is kept are the points that no other one beats in both area and delay. Delays are `Netlist.delay`, from the
library's tables, not ABC's own estimates.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fourbit.errors import UserError
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware._liberty import Library
from fourbit.hardware._netlist import LOAD_FF, Netlist
from fourbit.hardware._simulate import circuit, streams
from fourbit.hardware._trace import operand_vectors, stored_trace
from fourbit.hardware._unit import UNITS, Unit

UNUSED = ("sky130_fd_sc_hd__lpflow_*", "sky130_fd_sc_hd__probe*", "*__dly*", "*_dlygate*", "*decap*", "*__clkdly*")
"""Cells that are no logic: delays, probes, isolation."""

_OPTIMISE = ("strash", "ifraig", "scorr", "dc2", "fraig", "strash")
_SIZE = ("cleanup", "buffer -c -N 8", "topo", "upsize -D {target}", "dnsize -D {target}")
SCRIPTS: dict[str, tuple[str, ...]] = {
    "small": ("strash", "dch", "amap", "topo"),
    "flow": ("&get -n", "&st", "&dch", "&nf", "&put", *_SIZE),
    "map": (*_OPTIMISE, "dch -f", "map -B 0.9 -D {target}", *_SIZE),
    "rebalance": (*_OPTIMISE, "if -g -K 6 -C 8", "strash", "dch -f", "map -B 0.9 -D {target}", *_SIZE),
}
"""ABC's commands: the least area; area and delay between; and depth rebuilt for speed."""


def require_yosys() -> Any:
    """The package's module.

    Importing it makes every library that is loaded later share its symbols with all others, kernels of `torch.compile` among
    them, which all have the same name: they would call one another. So that is undone.

    Raises:
        UserError: it is missing.
    """
    flags = sys.getdlopenflags()
    try:
        from pyosys import libyosys  # type: ignore[attr-defined]
    except ImportError as error:
        raise UserError(
            "synthesis needs yosys: pip install 'fourbit[hardware]'. Reports work without it, from the stored results."
        ) from error
    finally:
        sys.setdlopenflags(flags)
    return libyosys


@contextlib.contextmanager
def _log_to(path: Path) -> Iterator[None]:
    """Yosys writes to the process's standard output, and at an error to both, and ends the process."""
    saved, sink = (os.dup(1), os.dup(2)), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(sink, stream)
    try:
        yield
    finally:
        for stream, before in zip((1, 2), saved, strict=True):
            os.dup2(before, stream)
            os.close(before)
        os.close(sink)


@dataclass(frozen=True)
class Point:
    """A unit, mapped once.

    Args:
        unit, cuts: its name and pipeline.
        anticipated: whether the leading zeros of sums are found while they are added.
        script, target: how; the target in ps.
        area, register_area: in um^2, all and flip-flops.
        delay: the longest way, in ps.
        period: the shortest clock period between registers at its inputs and outputs, in ps.
        energy: per cycle, in fJ, of the stored trace; without glitches, wires and leakage.
    """

    unit: str
    cuts: tuple[str, ...]
    anticipated: bool
    script: str
    target: float | None
    area: float
    register_area: float
    delay: float
    period: float
    energy: float = 0.0


class Design:
    """A unit in yosys.

    Args:
        unit: what to build.
        folder: for intermediate files and yosys's log.

    Raises:
        UserError: Amaranth or yosys is missing.
    """

    def __init__(self, unit: Unit, folder: Path):
        self.unit, self.folder = unit, folder
        self.yosys = require_yosys()
        module, inputs, outputs = circuit(unit)
        from amaranth.back import rtlil

        self.source = folder / "unit.il"
        self.source.write_text(rtlil.convert(module, name="top", ports=[*inputs.values(), *outputs.values()]))

    def _run(self, *commands: str) -> None:
        design = self.yosys.Design()
        with _log_to(self.folder / "yosys.log"):
            for command in (f"read_rtlil {self.source}", "hierarchy -top top", "proc", "flatten", *commands):
                self.yosys.run_pass(command, design)

    def gates(self) -> Netlist:
        """In yosys's own gates, as written: nothing is optimised, so what is simulated is the circuit itself."""
        path = self.folder / "gates.json"
        self._run("opt_clean", "techmap", "opt_clean", f"write_json {path}")
        return Netlist.read(path)

    def map(self, library: Library, script: str = "small", target: float | None = None) -> Netlist:
        """In cells of a library, by one of `SCRIPTS`. An error of yosys ends the process; `synthesize` survives it."""
        constraints, commands = self.folder / "abc.constr", self.folder / "abc.script"
        constraints.write_text(f"set_load {LOAD_FF}\n")
        commands.write_text("".join(line.format(target=target) + "\n" for line in SCRIPTS[script]))
        path, plain = self.folder / "mapped.json", library.plain(self.folder)
        unused = " ".join(f"-dont_use {pattern}" for pattern in UNUSED)
        self._run(
            *("opt_expr", "opt_clean", "wreduce", "peepopt", "opt_clean", "alumacc", "maccmap", "opt"),
            *("techmap", "opt -fast", "opt_clean"),
            f"dfflibmap -liberty {plain} {unused}",
            f"abc -liberty {plain} {unused} -constr {constraints} -script {commands}",
            *("opt_clean", f"write_json {path}"),
        )
        return Netlist.read(path, library)

    def points(self, library: Library, targets: Sequence[float], flop: tuple[float, float]) -> list[Point]:
        """By every script and target; those that no other beats. `flop`: see `Netlist.flop`."""
        found: list[tuple[Point, Netlist]] = []
        anticipated = isinstance(self.unit, InnerProduct) and self.unit.anticipate
        for script, commands in SCRIPTS.items():
            timed = any("{target}" in line for line in commands)
            for target in (targets if script == "rebalance" else targets[:1]) if timed else (None,):
                n = self.map(library, script, target)
                sizes = round(n.area, 3), round(n.register_area, 3), round(n.delay, 1), round(n.period(*flop), 1)
                found.append((Point(self.unit.name, self.unit.cuts, anticipated, script, target, *sizes), n))
        kept = front([point for point, _ in found])
        vectors = operand_vectors(self.unit, stored_trace())
        cycles = len(vectors)
        energies = {}
        for point, n in found:
            if point in kept:
                energies[point] = round(n.energy(n.run(streams(self.unit, vectors), cycles), cycles), 2)
        return [replace(point, energy=energies[point]) for point in kept]


def front(points: Sequence[Point]) -> list[Point]:
    """Those of which no other one is both as small and as fast (between registers), from the smallest to the fastest."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (p.area, p.period)):
        if not kept or point.period < kept[-1].period:
            kept.append(point)
    return kept


def variants(unit: Unit) -> list[Unit]:
    """The pipelines in which a unit is built: with as many registers as there are places, with none, and between; and one
    with leading zeros that are found while a sum is being added."""
    if unit.cuts:
        return [unit]
    stages = unit.stages
    if len(stages) < 5:
        return [replace(unit, cuts=cuts) for cuts in dict.fromkeys(((), stages[:1], stages))]
    multiply, align, add, count, normalise = stages
    pipelines = ((), (multiply,), (multiply, add, normalise), (multiply, add, count, normalise), stages)
    found = [replace(unit, cuts=cuts) for cuts in pipelines]
    if isinstance(unit, InnerProduct) and unit.style != "window":
        found.append(replace(unit, cuts=(multiply, align, add, normalise), anticipate=True))
    return found


def _flop(task: tuple[str, str]) -> tuple[float, float]:
    liberty, folder = task
    own = Path(tempfile.mkdtemp(dir=folder))
    (own / "unit").write_text("register")
    return Design(UNITS["register"], own).map(Library(liberty)).flop


def _points(task: tuple[Unit, str, Sequence[float], tuple[float, float], str]) -> list[Point]:
    unit, liberty, targets, flop, folder = task
    library, found = Library(liberty), []
    for variant in variants(unit):
        own = Path(tempfile.mkdtemp(dir=folder))
        (own / "unit").write_text(unit.name)
        found += Design(variant, own).points(library, targets, flop)
    return [
        point for cuts in dict.fromkeys(p.cuts for p in found) for point in front([p for p in found if p.cuts == cuts])
    ]


def synthesize(
    names: Sequence[str],
    liberty: str | Path,
    targets: Sequence[float] = (1000.0, 4000.0),
    processes: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Point]:
    """Every unit in all its `variants`, mapped to a library; the points of each that no other one of it beats.

    What yosys and ABC find depends on the numbers that yosys has given to wires before. So each unit has a process of its own,
    and its points are the same whatever else is synthesised.

    Args:
        names: of units.
        liberty: a Liberty file.
        targets: delays to try for, in ps: the script "rebalance" for all of them, others for the first.
        processes: at a time; None: one per core.
        progress: called with the number of units done, their number, and the last one's name.

    Raises:
        UserError: an unknown unit, a damaged library or one without the cells that it takes, a missing tool, or yosys broke
            off.
    """
    require_yosys()
    for name in names:
        UNITS[name]
    Library(liberty).check()
    found: list[Point] = []
    with (
        tempfile.TemporaryDirectory(prefix="fourbit-synth-") as folder,
        ThreadPoolExecutor(processes or os.cpu_count()) as pool,
    ):
        try:
            flop = _alone(_flop, (str(liberty), folder))
            tasks = [(UNITS[name], str(liberty), tuple(targets), flop, folder) for name in names]
            done = pool.map(lambda task: _alone(_points, task), tasks)
            for number, (name, points) in enumerate(zip(names, done, strict=True), 1):
                found += points
                if progress is not None:
                    progress(number, len(names), name)
        except BrokenProcessPool as error:
            raise UserError(f"yosys broke off: {_last_error(Path(folder))}") from error
        finally:
            pool.shutdown(cancel_futures=True)
    return found


def _alone(function: Callable[[tuple[Any, ...]], Any], task: tuple[Any, ...]) -> Any:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, task).result()


def _last_error(folder: Path) -> str:
    for log in sorted(folder.glob("*/yosys.log"), key=os.path.getmtime, reverse=True):
        lines = [line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()]
        if lines:
            return f"{(log.parent / 'unit').read_text()}: {lines[-1].strip()}"
    return "it left no message; is there enough memory?"
