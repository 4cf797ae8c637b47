"""Time, energy and area of a training step, from the costs of arithmetic units.

A step is the products of all layers: fprop, dgrad, wgrad. Each runs on a systolic array whose elements are the unit of its
formats, as many as fit into the area that R x C FP16 multiply-adders take (`Machine`). Cycles of an [m, k] by [k, n] product
on R rows and C columns, where m, n, k stand for rows S_R, columns S_C and time T as the dataflow maps them, and a unit of w
ways takes k / w steps:

    cycles = ceil(S_R / R) ceil(S_C / C) (T + fill),   fill = R + C - 2, and R more where b or a stays in the array

as SCALE-Sim 3.0.0 counts them (Samajdar et al., ISPASS 2020; its count is one cycle less per product). A product takes the
longer one of this and of moving its operands and its result to and from memory. What is between the products (normalization,
activation, their gradients) moves `ELEMENTWISE` numbers of 16 bits per output, and writes the operands of the next products;
the optimizer moves `OPTIMIZER_BITS` per weight.

Energy: multiply-accumulates by the synthesis's figure for the unit, quantizers and converters likewise, and per bit moved a
multiple of the energy of the FP16 multiply-add in its smallest form in the same technology (`SRAM_BIT`, `DRAM_BIT`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from fourbit.errors import UserError
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware._machine import Machine, cycles_of, dram_bits, sram_bits
from fourbit.hardware._product import DRAWN, Product, bits_of, number_bits, quantizers_of, unit_of
from fourbit.hardware._results import BASELINE, Cost, Results, stored
from fourbit.hardware._unit import RANDOM_BITS, UNITS

ELEMENTWISE = 3
"""16-bit numbers per output that are read between the products: y forward, y and the gradient backward."""
FLOPS_PER_GRADIENT = 10
"""The paper's count of FP16 operations per element of a gradient: PACT's backward pass, conversion of radix, both phases,
scaling."""
RANDOM_SHARE = RANDOM_BITS / 32
"""Of a step of the random source that a number takes."""


@dataclass(frozen=True)
class Part:
    """A product on a machine, or the work between products.

    Args:
        layer, gemm: "elementwise" for the work between products.
        unit: what it runs on, "" for none.
        macs: multiply-accumulates.
        seconds: what it takes; `compute`, `memory`: each alone.
        utilisation: multiply-accumulates per unit, way and cycle.
        energy: in J: `arithmetic`, `quantizers`, `sram`, `dram`.
    """

    layer: str
    gemm: str
    unit: str
    macs: int
    seconds: float
    compute: float
    memory: float
    utilisation: float
    energy: dict[str, float]


@dataclass(frozen=True)
class StepCost:
    """A training step on a machine."""

    machine: Machine
    parts: tuple[Part, ...]
    area: float
    quantizer_area: float
    gradient_flops: float

    @cached_property
    def seconds(self) -> float:
        """Of the step."""
        return sum(p.seconds for p in self.parts)

    @cached_property
    def macs(self) -> int:
        """Of the step."""
        return sum(p.macs for p in self.parts)

    @cached_property
    def energy(self) -> dict[str, float]:
        """Of the step by kind, in J."""
        total: dict[str, float] = defaultdict(float)
        for p in self.parts:
            for kind, value in p.energy.items():
                total[kind] += value
        return dict(total)

    @property
    def joules(self) -> float:
        """Of the step."""
        return sum(self.energy.values())

    @property
    def utilisation(self) -> float:
        """Mean over the time of the products."""
        busy = sum(p.compute for p in self.parts)
        return sum(p.utilisation * p.compute for p in self.parts) / busy if busy else 0.0

    def share(self, by: Callable[[Part], str]) -> dict[str, float]:
        """Of the time, by a property of the parts, largest first."""
        total: dict[str, float] = defaultdict(float)
        for p in self.parts:
            total[by(p)] += p.seconds
        return dict(sorted(((k, v / self.seconds) for k, v in total.items()), key=lambda item: -item[1]))


def _operand_bits(p: Product, dgrad: Product | None) -> float:
    """Of the operands that are written for a product between the products."""
    a, b = number_bits(p)
    if p.gemm == "fprop":
        return p.a_numbers * a
    if p.gemm == "dgrad":
        return 0.0
    twice = dgrad is not None and (dgrad.a != p.a or bool(p.block))
    again = p.b_numbers * b if p.block else 0.0
    return p.a_numbers * (a + (number_bits(dgrad)[0] if dgrad and twice else 0.0)) + again


def estimate(products: Sequence[Product], machine: Machine | None = None, results: Results | None = None) -> StepCost:
    """What a step costs.

    Args:
        products: of all layers, for one step's batch.
        machine: None: `Machine()`.
        results: of synthesis; None: the stored ones.

    Raises:
        UserError: there is nothing to compute, no unit for a product, or a unit misses the clock.
    """
    machine = machine or Machine()
    results = results or stored()
    if not products:
        raise UserError("there are no products: give the shape of the model's input.")
    dgrads = _dgrads(products)
    made = [quantizers_of(p, d) for p, d in zip(products, dgrads, strict=True)]
    _check(products, made, machine, results)
    base = _cost(results, BASELINE, machine)
    area = machine.rows * machine.columns * base.area
    parts = [_part(p, q, machine, results, base, area) for p, q in zip(products, made, strict=True)]
    bits = 16.0 * ELEMENTWISE * sum(p.results for p in products if p.gemm == "fprop")
    bits += sum(_operand_bits(p, d) for p, d in zip(products, dgrads, strict=True))
    parts.append(_traffic("between the products", "elementwise", bits, machine, results, base))
    weights = sum(p.b_numbers for p in products if p.gemm == "fprop" and p.learned)
    parts.append(_traffic("weights", "optimizer", weights * machine.optimizer_bits, machine, results, base))
    names = {name for entries in made for name, _ in entries}
    quantizers = sum(min(results.points_of(name), key=lambda q: q.area).area for name in names)
    columns = max(_columns(_cost(results, unit_of(p, machine.accumulator), machine), machine, area) for p in products)
    gradients = sum(p.a_numbers for p in products if p.gemm == "wgrad" and bits_of(p.a) < 16)
    flops = 2 * sum(p.macs for p in products)
    return StepCost(machine, tuple(parts), area, columns * quantizers, FLOPS_PER_GRADIENT * gradients / flops)


def _dgrads(products: Sequence[Product]) -> list[Product | None]:
    """For every wgrad, the dgrad of the same call of its layer."""
    found: list[Product | None] = []
    last: Product | None = None
    for p in products:
        last = p if p.gemm == "dgrad" else (None if p.gemm == "fprop" else last)
        found.append(last if p.gemm == "wgrad" and last is not None and last.layer == p.layer else None)
    return found


def _check(
    products: Sequence[Product], made: Sequence[Sequence[tuple[str, int]]], machine: Machine, results: Results
) -> None:
    """That the results have every unit that is needed."""
    units = {unit_of(p, machine.accumulator) for p in products} | {name for entries in made for name, _ in entries}
    units |= {BASELINE, "register"} | ({"converter"} if any(u.endswith("_fixed") for u in units) else set())
    units |= {"random"} if any(p.stochastic for p in products) else set()
    units |= {"hadamard"} if any(p.stochastic and p.block for p in products) else set()
    missing = [name for name in UNITS if name in units and name not in results.units]
    if missing:
        raise UserError(
            f"the results hold nothing about {', '.join(missing)}: run `fourbit hardware synth --units "
            f"{','.join(name for name in UNITS if name in units)}`, or for all units."
        )


def _cost(results: Results, unit: str, machine: Machine) -> Cost:
    if machine.period is None:
        return results.densest(unit, shared=machine.shared)
    return results.at(unit, machine.period, shared=machine.shared)


def _columns(cost: Cost, machine: Machine, area: float) -> int:
    """Of units, in the array's area."""
    return max(1, round(area / (machine.rows * cost.area)))


def _part(
    p: Product, made: Sequence[tuple[str, int]], machine: Machine, results: Results, base: Cost, area: float
) -> Part:
    unit = unit_of(p, machine.accumulator)
    fixed = isinstance(UNITS[unit], InnerProduct) and isinstance(UNITS[unit].accumulator, int)  # type: ignore[attr-defined]
    cost = _cost(results, unit, machine)
    columns = _columns(cost, machine, area)
    steps = math.ceil(p.k / cost.macs)
    if p.depthwise:
        cycles = math.ceil(p.macs / (machine.rows * columns * cost.macs))
    else:
        cycles = p.count * cycles_of(p.m, p.n, steps, machine.rows, columns, machine.dataflow, machine.overlapped)
    compute = cycles * cost.period * 1e-12
    dram = dram_bits(p, machine.sram_kb * 8192)
    memory = dram / _bandwidth(machine, base)
    sram_bit, dram_bit = _bit_energies(machine, results)
    arithmetic = p.macs * cost.energy_per_mac * 1e-15
    if fixed:
        arithmetic += p.count * p.m * p.n * _smallest_energy(results, "converter")
    word = 32 if fixed and machine.dataflow != "os" else 16  # partial sums return; results are converted
    energy = {
        "arithmetic": arithmetic,
        "quantizers": sum(n * _quantizer_energy(name, p, results) for name, n in made),
        "sram": sram_bits(p, steps * cost.macs, machine, columns, cost.macs, word) * sram_bit,
        "dram": dram * dram_bit,
    }
    used = p.macs / (cycles * machine.rows * columns * cost.macs)
    return Part(p.layer, p.gemm, unit, p.macs, max(compute, memory), compute, memory, used, energy)


def _bandwidth(machine: Machine, base: Cost) -> float:
    """Bits per second: of the machine, whatever its units."""
    return machine.bandwidth * machine.rows * machine.columns / (base.period * 1e-12)


def _bit_energies(machine: Machine, results: Results) -> tuple[float, float]:
    """Of on-chip memory and DRAM, in J."""
    fma = min(c.energy_per_mac for c in results.costs(BASELINE)) * 1e-15
    return machine.sram_bit * math.sqrt(machine.sram_kb / 8) * fma, machine.dram_bit * fma


def _traffic(layer: str, kind: str, bits: float, machine: Machine, results: Results, base: Cost) -> Part:
    seconds = bits / _bandwidth(machine, base)
    energy = {"dram": bits * _bit_energies(machine, results)[1]}
    return Part(layer, kind, "", 0, seconds, 0.0, seconds, 0.0, energy)


def _quantizer_energy(name: str, p: Product, results: Results) -> float:
    """Per number, with its random bits and its part of a Hadamard transform, in J."""
    total = _smallest_energy(results, name)
    if p.stochastic and name in DRAWN.values():
        total += RANDOM_SHARE * _smallest_energy(results, "random")
        if p.block:
            total += _smallest_energy(results, "hadamard") / 16
    return total


def _smallest_energy(results: Results, unit: str) -> float:
    """Per cycle, in J, of the smallest form."""
    return min(results.points_of(unit), key=lambda q: q.area).energy * 1e-15


def separate_arrays(times: Iterable[float]) -> float:
    """How much longer a step takes if every kind of unit has silicon of its own, divided as well as can be, than if all the
    area could be each of them in turn.

    Args:
        times: of each kind, on the whole area.

    With shares a_i of the area, the time is the sum of t_i / a_i; a_i ~ sqrt(t_i) makes it least: (sum sqrt(t_i))^2.
    """
    times = [t for t in times if t > 0]
    return sum(math.sqrt(t) for t in times) ** 2 / sum(times) if times else 1.0
