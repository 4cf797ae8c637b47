"""Standard-cell libraries in the Liberty format: areas, functions, delay and energy tables, as far as units need them.

The text is split into cells at once; a cell is parsed when it is asked for, so that only those in use cost time.
"""

from __future__ import annotations

import contextlib
import gzip
import re
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fourbit.errors import UserError
from fourbit.hardware._liberty_syntax import Group, parse
from fourbit.hardware._logic import compile_function

_NAND = (2, 0b1110)


class Table:
    """Numbers over slew and load, interpolated linearly, and beyond the ends extrapolated."""

    def __init__(self, slews: list[float], loads: list[float], values: list[list[float]]):
        self.slews, self.loads, self.values = slews, loads, values

    def __call__(self, slew: float, load: float) -> float:
        i, u = _place(self.slews, slew)
        j, v = _place(self.loads, load)
        rows = self.values[i : i + 2] if len(self.slews) > 1 else self.values[:1] * 2
        low, high = (r[j] + (r[j + 1] - r[j]) * v if len(self.loads) > 1 else r[0] for r in rows)
        return low + (high - low) * u


def _place(axis: list[float], x: float) -> tuple[int, float]:
    if len(axis) < 2:
        return 0, 0.0
    i = min(max(bisect_right(axis, x) - 1, 0), len(axis) - 2)
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


@dataclass(frozen=True)
class Arc:
    """From a pin to another: delay and slew of the output's rise and fall, in library units.

    Args:
        related: the input pin. `sense`: "positive_unate", "negative_unate" or "non_unate". `kind`: Liberty's timing_type.
        rise, fall: delay, or the setup time. `rise_slew`, `fall_slew`: None for setup.
    """

    related: str
    sense: str
    kind: str
    rise: Table
    fall: Table
    rise_slew: Table | None
    fall_slew: Table | None


@dataclass(frozen=True)
class Power:
    """Energy inside the cell per change of a pin, in `Library.energy_unit`."""

    related: str | None
    rise: Table
    fall: Table


@dataclass(frozen=True)
class Pin:
    """One pin of a cell."""

    name: str
    is_output: bool
    capacitance: float
    function: str | None
    arcs: tuple[Arc, ...]
    powers: tuple[Power, ...]


@dataclass(frozen=True)
class Cell:
    """A cell; `next_state` and `clock` where it is a flip-flop whose outputs are the variables `state`."""

    name: str
    area: float
    leakage: float
    pins: dict[str, Pin]
    next_state: str | None
    clock: str | None
    state: tuple[str, ...]


class Library:
    """A library of cells.

    Args:
        path: a Liberty file, plain or gzipped.

    Raises:
        UserError: no such file, or it is damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            raw = self.path.read_bytes()
            self.text = (gzip.decompress(raw) if self.path.suffix == ".gz" else raw).decode("utf-8", "replace")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self.path} is damaged ({error}): get it anew.") from error
        except OSError as error:
            raise UserError(
                f"cannot read the Liberty file {self.path} ({error.strerror}): give a file that is there."
            ) from error
        self._spans = self._find_cells()
        self._cells: dict[str, Cell] = {}

    def _find_cells(self) -> dict[str, tuple[int, int]]:
        spans: dict[str, tuple[int, int]] = {}
        starts = list(re.finditer(r"^\s*cell\s*\(\s*\"?([^\")\s]+)\"?\s*\)\s*\{", self.text, re.MULTILINE))
        for found in starts:
            depth, position = 0, found.end() - 1
            for mark in _marks(self.text, position):
                depth += 1 if self.text[mark] == "{" else -1
                if depth == 0:
                    spans[found.group(1)] = (found.start(), mark + 1)
                    break
        end = self.text.rstrip().endswith("}")
        if not starts or len(spans) != len(starts) or not end or "library" not in self.text:
            raise UserError(f"{self.path} is damaged or no Liberty file: get it anew.")
        return spans

    @cached_property
    def header(self) -> Group:
        """The library without its cells."""
        text, position = [], 0
        for start, end in sorted(self._spans.values()):
            text.append(self.text[position:start])
            position = end
        return parse("".join([*text, self.text[position:]]), str(self.path))

    @property
    def name(self) -> str:
        """As the file says."""
        return self.header.arguments[0]

    @cached_property
    def time_unit(self) -> float:
        """In ps."""
        return _unit(self.header.attributes.get("time_unit", "1ns"), {"ps": 1.0, "ns": 1e3, "us": 1e6})

    @cached_property
    def capacitance_unit(self) -> float:
        """In fF."""
        words = self.header.complex.get("capacitive_load_unit", ["1", "pf"])
        return _unit(" ".join(words), {"ff": 1.0, "pf": 1e3})

    @cached_property
    def voltage(self) -> float:
        """Supply, in V."""
        text = self.header.attributes.get("nom_voltage", "1")
        try:
            return float(text)
        except ValueError as error:
            raise UserError(f"{self.path} has a nom_voltage of {text}, which is no number: get it anew.") from error

    @property
    def energy_unit(self) -> float:
        """Of the tables of internal power, in fJ: capacitance unit times V^2."""
        return self.capacitance_unit

    @property
    def names(self) -> list[str]:
        """Of all cells."""
        return list(self._spans)

    def cell(self, name: str) -> Cell:
        """A cell, parsed once.

        Raises:
            UserError: the library has none of that name, or what it says of it cannot be read.
        """
        if name not in self._cells:
            if name not in self._spans:
                raise UserError(
                    f"the library {self.path.name} has no cell {name}: use that which was synthesised with."
                )
            start, end = self._spans[name]
            try:
                self._cells[name] = self._make(parse(self.text[start:end], str(self.path)))
            except UserError:
                raise
            except (ValueError, KeyError, IndexError) as error:
                raise UserError(f"{self.path} is damaged in the cell {name} ({error}): get it anew.") from error
        return self._cells[name]

    def plain(self, folder: Path) -> Path:
        """The library as a file that is not compressed, which ABC reads; `folder` takes it if need be."""
        if self.path.suffix != ".gz":
            return self.path
        path = folder / self.path.with_suffix("").name
        if not path.exists():
            path.write_text(self.text)
        return path

    @cached_property
    def _gates(self) -> dict[tuple[int, int], float]:
        """{(number of inputs, truth table): the smallest area} of the gates with one or two inputs and one output."""
        found: dict[tuple[int, int], float] = {}
        for cell in map(self.cell, self.names):
            inputs = sorted(p.name for p in cell.pins.values() if not p.is_output)
            functions = [p.function for p in cell.pins.values() if p.is_output]
            if cell.next_state is not None or len(functions) != 1 or not functions[0] or not 1 <= len(inputs) <= 2:
                continue
            with contextlib.suppress(UserError):  # the state of a latch is no pin
                table = compile_function(functions[0], inputs)(0b1111, *(0b0011, 0b0101)[: len(inputs)])
                key = len(inputs), table
                found[key] = min(cell.area, found.get(key, cell.area))
        return found

    def check(self) -> None:
        """Whether units can be built of it.

        Raises:
            UserError: there is no inverter, no NAND of two inputs, or no flip-flop; a unit or a cell cannot be read.
        """
        _ = self.time_unit, self.capacitance_unit, self.voltage
        has_flop = any((self.cell(name).next_state or "").strip("() ") == "D" for name in self.names)
        needed = {"an inverter": (1, 0b1100) in self._gates, "a NAND of two inputs": _NAND in self._gates}
        missing = [what for what, there in {**needed, "a D flip-flop": has_flop}.items() if not there]
        if missing:
            raise UserError(f"the library {self.path.name} lacks {' and '.join(missing)}: give a complete one.")

    @property
    def gate_equivalent(self) -> float:
        """Area of the smallest NAND of two inputs, in um^2."""
        return self._gates[_NAND]

    @cached_property
    def templates(self) -> dict[str, Group]:
        """Tables' axes by name."""
        return {
            g.arguments[0]: g for g in self.header.groups if g.name.endswith("lut_template") or "_template" in g.name
        }

    def _make(self, group: Group) -> Cell:
        flops = group.all("ff")
        pins = {}
        for pin in group.all("pin"):
            name = pin.arguments[0]
            is_output = pin.attributes.get("direction") == "output"
            arcs = tuple(arc for t in pin.all("timing") for arc in self._arcs(t))
            powers = tuple(p for g in pin.all("internal_power") for p in self._powers(g))
            capacitance = float(pin.attributes.get("capacitance", "0"))
            pins[name] = Pin(name, is_output, capacitance, pin.attributes.get("function"), arcs, powers)
        flop = flops[0] if flops else None
        return Cell(
            group.arguments[0],
            float(group.attributes.get("area", "0")),
            float(group.attributes.get("cell_leakage_power", "0")),
            pins,
            flop.attributes.get("next_state") if flop else None,
            flop.attributes.get("clocked_on") if flop else None,
            tuple(flop.arguments) if flop else (),
        )

    def _arcs(self, timing: Group) -> Iterator[Arc]:
        tables = {g.name: self._table(g) for g in timing.groups}
        kind = timing.attributes.get("timing_type", "combinational")
        rise = tables.get("cell_rise", tables.get("rise_constraint"))
        fall = tables.get("cell_fall", tables.get("fall_constraint"))
        if rise is None and fall is None:
            return
        sense = timing.attributes.get("timing_sense", "non_unate")
        either = rise or fall
        assert either is not None
        for related in timing.attributes.get("related_pin", "").split():
            slews = tables.get("rise_transition"), tables.get("fall_transition")
            yield Arc(related, sense, kind, rise or either, fall or either, *slews)

    def _powers(self, group: Group) -> Iterator[Power]:
        tables = {g.name: self._table(g) for g in group.groups}
        rise, fall = tables.get("rise_power"), tables.get("fall_power")
        either = rise or fall or tables.get("power")
        if either is not None:
            related = group.attributes.get("related_pin")
            yield Power(related, rise or either, fall or either)

    def _table(self, group: Group) -> Table:
        template = self.templates.get(group.arguments[0]) if group.arguments else None
        axes: dict[str, list[float]] = {"slew": [0.0], "load": [0.0]}
        order = []
        for k in "12":
            variable = template.attributes.get(f"variable_{k}") if template else None
            index = group.complex.get(f"index_{k}") or (template.complex.get(f"index_{k}") if template else None)
            if variable is None or index is None:
                continue
            axis = "load" if "capacitance" in variable or variable == "constrained_pin_transition" else "slew"
            axes[axis] = _numbers(index)
            order.append(axis)
        values = [_numbers([row]) for row in group.complex.get("values", ["0"])]
        flat = [v for row in values for v in row]
        if order == ["load", "slew"]:
            columns = len(axes["slew"])
            rows = [[flat[j * columns + i] for j in range(len(axes["load"]))] for i in range(columns)]
        else:
            columns = len(axes["load"])
            rows = [flat[i * columns : (i + 1) * columns] for i in range(len(axes["slew"]))]
        return Table(axes["slew"], axes["load"], rows)


def _marks(text: str, position: int) -> Iterator[int]:
    for found in re.compile(r"[{}]").finditer(text, position):
        yield found.start()


def _numbers(words: list[str]) -> list[float]:
    return [float(w) for word in words for w in word.replace(",", " ").split()]


def _unit(text: str, units: dict[str, float]) -> float:
    found = re.fullmatch(r"([\d.]+)\s*([a-z]+)", text.lower())
    if found is None or found.group(2) not in units:
        raise UserError(f"the Liberty file has the unit {text}, which is not understood.")
    return float(found.group(1)) * units[found.group(2)]
