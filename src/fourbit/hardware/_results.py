"""Results of synthesis as data: what a unit costs at a clock period, with the registers around it.

The package comes with the results of `fourbit hardware synth` for two open libraries, so reports and estimates need no tools.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from fourbit.errors import UserError, unknown
from fourbit.hardware._synthesis import Point
from fourbit.hardware._unit import UNITS

LIBRARIES = ("sg13g2", "sky130")
"""Those of the stored results: IHP SG13G2 and SkyWater SKY130 (high density), both 130 nm, typical corner."""
BASELINE = "fma_fp16"
SHARED = 32
"""Units that share a converter, where nothing else is said."""


@dataclass(frozen=True)
class Cost:
    """A unit at a clock period.

    Args:
        unit: its name.
        macs: per cycle.
        period: in ps.
        area: in um^2, with what was asked for around it.
        energy: per cycle, in fJ.
        point: how it was mapped.
    """

    unit: str
    macs: int
    period: float
    area: float
    energy: float
    point: Point

    @property
    def density(self) -> float:
        """Multiply-accumulates per second and mm^2, in 10^9."""
        return self.macs / self.period * 1e12 / (self.area * 1e-6) / 1e9

    @property
    def energy_per_mac(self) -> float:
        """In fJ."""
        return self.energy / self.macs


@dataclass(frozen=True)
class Results:
    """Points of all units in one library.

    Args:
        library: its name; `gate_equivalent`: area of its NAND of two inputs in um^2; `voltage`: in V.
        tools: versions; `seconds`: run time; `processes`: at a time.
        points: what `synthesize` gave.
    """

    library: str
    gate_equivalent: float
    voltage: float
    tools: dict[str, str]
    seconds: float
    processes: int
    points: tuple[Point, ...]

    @staticmethod
    def read(path: Path) -> Results:
        """A file that `write` made.

        Raises:
            UserError: it is missing, or something else.
        """
        try:
            data: dict[str, Any] = json.loads(path.read_text())
            points = tuple(Point(**{**p, "cuts": tuple(p["cuts"])}) for p in data.pop("points"))
            for p in points:
                if not all(0 < x < math.inf for x in (p.area, p.delay, p.period, p.energy)):
                    raise ValueError(p)
            return Results(points=points, **data)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): run `fourbit hardware synth` first.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} holds no results of `fourbit hardware synth`: run it again.") from error

    def write(self, path: Path) -> None:
        """One point per line."""
        data = dataclasses.asdict(self)
        points = data.pop("points")
        head = json.dumps(data, indent=1)[:-2]
        lines = ",\n  ".join(json.dumps(p) for p in points)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{head},\n "points": [\n  {lines}\n ]\n}}\n')

    @cached_property
    def _by_unit(self) -> dict[str, list[Point]]:
        found: dict[str, list[Point]] = {}
        for point in self.points:
            found.setdefault(point.unit, []).append(point)
        return found

    @property
    def units(self) -> list[str]:
        """Names."""
        return list(self._by_unit)

    def points_of(self, unit: str) -> list[Point]:
        """Of one unit.

        Raises:
            UserError: an unknown unit, or there are none.
        """
        UNITS[unit]
        if unit not in self._by_unit:
            raise UserError(
                f"the results hold nothing about the unit {unit}: run `fourbit hardware synth` with it, or for all units."
            )
        return self._by_unit[unit]

    @cached_property
    def flop(self) -> tuple[float, float]:
        """Area of a flip-flop in um^2, and its energy per cycle in fJ."""
        point, width = self.points_of("register")[0], UNITS["register"].outputs["y"]
        return point.area / width, point.energy / width

    @cached_property
    def _costs(self) -> dict[tuple[str, bool, int], list[Cost]]:
        return {}

    def costs(self, unit: str, registers: bool = True, shared: int = SHARED) -> list[Cost]:
        """At every period that some point of the unit just meets.

        Args:
            registers: with the register that holds the sum, and between registers; without, the unit alone.
            shared: units that share one converter, where the unit adds into a fixed-point register; 0: no converter.
        """
        key = unit, registers, shared
        if key not in self._costs:
            self._costs[key] = self._make_costs(*key)
        return self._costs[key]

    def _make_costs(self, unit: str, registers: bool, shared: int) -> list[Cost]:
        found = []
        area, energy = self.flop if registers else (0.0, 0.0)
        width = UNITS[unit].outputs.get("y", 0)
        for p in self.points_of(unit):
            period = p.period if registers else p.delay
            cost = Cost(unit, UNITS[unit].macs, period, p.area + width * area, p.energy + width * energy, p)
            if unit.endswith("_fixed") and shared:
                converter = self._smallest("converter", cost.period)
                cost = dataclasses.replace(cost, area=cost.area + converter.area / shared)
            found.append(cost)
        return found

    def _smallest(self, unit: str, period: float) -> Point:
        """The smallest point within a period, or where none is, the fastest (which then takes several cycles)."""
        points = self.points_of(unit)
        within = [p for p in points if p.period <= period]
        return min(within, key=lambda p: p.area) if within else min(points, key=lambda p: p.delay)

    def at(self, unit: str, period: float, registers: bool = True, shared: int = SHARED) -> Cost:
        """The smallest within a clock period, as it is at that period.

        Raises:
            UserError: no point of the unit meets the period.
        """
        costs = self.costs(unit, registers, shared)
        within = [c for c in costs if c.period <= period]
        if not within:
            fastest = min(c.period for c in costs)
            raise UserError(
                f"{unit} misses a clock period of {period:.0f} ps in {self.library}: its fastest form needs {fastest:.0f} ps."
            )
        return dataclasses.replace(min(within, key=lambda c: c.area), period=period)

    def densest(self, unit: str, registers: bool = True, shared: int = SHARED) -> Cost:
        """Where it has the most multiply-accumulates per second and area, at its own clock."""
        return max(self.costs(unit, registers, shared), key=lambda c: c.density)

    def density(self, unit: str, period: float | None = None, registers: bool = True, shared: int = SHARED) -> float:
        """Relative to the FP16 fused multiply-add.

        Args:
            period: of both; None: each at its own best.
        """
        if period is None:
            return self.densest(unit, registers, shared).density / self.densest(BASELINE, registers).density
        return self.at(unit, period, registers, shared).density / self.at(BASELINE, period, registers).density


@cache
def stored(library: str = "sg13g2") -> Results:
    """The results that come with the package.

    Raises:
        UserError: an unknown library.
    """
    if library not in LIBRARIES:
        raise unknown("library", library, LIBRARIES)
    with resources.as_file(resources.files("fourbit.hardware").joinpath(f"data/{library}.json")) as path:
        return Results.read(path)


def tool_versions() -> dict[str, str]:
    """Of the packages that synthesis takes."""
    from importlib import metadata

    return {name: metadata.version(name) for name in ("amaranth", "pyosys")}


def _density(results: Results, unit: str, period: float | None) -> str:
    try:
        return f"{results.density(unit, period):.2f}"
    except UserError:
        return "-"


def summary_rows(results: Results, periods: Sequence[float]) -> list[tuple[str, ...]]:
    """One row per unit: its smallest form, and density relative to the baseline at each period and at its best."""
    rows = []
    for unit in results.units:
        small = min(results.points_of(unit), key=lambda p: p.area)
        fast = min(results.points_of(unit), key=lambda p: p.period)
        row = [
            unit,
            f"{small.area:.0f}",
            f"{small.area / results.gate_equivalent:.0f}",
            f"{small.period / 1000:.2f}",
            f"{fast.area:.0f}",
            f"{fast.period / 1000:.2f}",
        ]
        macs = UNITS[unit].macs
        row += [_density(results, unit, period) if macs else "" for period in (*periods, None)]
        row.append(f"{small.energy / max(1, macs) / 1000:.2f}")
        rows.append(tuple(row))
    return rows
