"""The machine that products run on: cycles of a systolic array, and the traffic of its memories."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fourbit.errors import UserError, unknown
from fourbit.hardware._product import Product, number_bits
from fourbit.hardware._results import SHARED

Dataflow = Literal["os", "ws", "is"]
SRAM_BIT = 0.10
"""Reading or writing one bit of 8 KB of on-chip memory, in FP16 multiply-adds: 10 pJ for 64 bits against 1.5 pJ for a
multiplication and an addition (45 nm; Horowitz, ISSCC 2014). It grows with the root of the size: there, 32 KB take 20 pJ and
1 MB 100 pJ."""
DRAM_BIT = 2.6
"""The same of stacked DRAM: 3.9 pJ per bit (HBM2; O'Connor et al., MICRO 2017)."""
OPTIMIZER_BITS = 144
"""Per weight: the gradient in 16 bits is read, weight and momentum in FP32 are read and written."""


@dataclass(frozen=True)
class Machine:
    """What the products run on.

    Args:
        rows, columns: the array, were its elements FP16 multiply-adders; other units get the same area, as more columns.
        dataflow: what stays in the array: "os" the results, "ws" b, "is" a.
        sram_kb: on-chip memory for operands.
        bandwidth: of memory, in bits per cycle and FP16 multiply-adder of the array.
        period: of the clock, in ps; None: each unit at its own best.
        accumulator: "fp16" or "fixed", for products of 4-bit operands.
        shared: units per converter of fixed-point sums.
        overlapped: whether the next block of operands enters while the last leaves (no cycles of filling between blocks).
        sram_bit: energy per bit of 8 KB of on-chip memory, in FP16 multiply-adds; larger ones take more by the root.
        dram_bit: energy per bit of memory, in FP16 multiply-adds.
        optimizer_bits: that the optimizer moves per weight.
    """

    rows: int = 32
    columns: int = 32
    dataflow: Dataflow = "ws"
    sram_kb: int = 1024
    bandwidth: float = 1.0
    period: float | None = None
    accumulator: str = "fp16"
    shared: int = SHARED
    overlapped: bool = False
    sram_bit: float = SRAM_BIT
    dram_bit: float = DRAM_BIT
    optimizer_bits: float = OPTIMIZER_BITS

    def __post_init__(self) -> None:
        if self.dataflow not in ("os", "ws", "is"):
            raise unknown("dataflow", self.dataflow, ("os", "ws", "is"))
        if self.accumulator not in ("fp16", "fixed"):
            raise unknown("accumulator", self.accumulator, ("fp16", "fixed"))
        for name in ("rows", "columns", "sram_kb", "bandwidth", "period"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {value}, but must be positive and finite.")

    def describe(self) -> str:
        """In words."""
        clock = "units at their densest clock" if self.period is None else f"a clock of {self.period / 1000:g} ns"
        sums = "FP16 sums" if self.accumulator == "fp16" else f"fixed-point sums, a converter for {self.shared} units"
        stays = {"os": "results", "ws": "weights", "is": "inputs"}[self.dataflow]
        return (
            f"{stays} stay in the array ({self.dataflow}), {self.sram_kb} KB on the chip, {self.bandwidth:g} bits per cycle "
            f"and FP16 unit from memory, {clock}, {sums}"
        )


def cycles_of(m: int, n: int, k: int, rows: int, columns: int, dataflow: Dataflow, overlapped: bool = False) -> int:
    """Of one product on a systolic array, with one multiply-accumulate per element and cycle."""
    mapped = {"os": (m, n, k), "ws": (k, n, m), "is": (k, m, n)}
    s_r, s_c, t = mapped[dataflow]
    folds = math.ceil(s_r / rows) * math.ceil(s_c / columns)
    fill = rows + columns - 2 + (0 if dataflow == "os" else rows)
    return folds * t + fill if overlapped else folds * (t + fill)


def dram_bits(p: Product, sram: float) -> float:
    """Both operands once and the results, where one operand fits into half of the memory on the chip. Else the best of three
    orders: a part of one operand stays, and the other passes once for each; or a block of sums stays in one half, and rows
    and columns of the operands pass once for each block."""
    a_bits, b_bits = number_bits(p)
    half = sram / 2
    a, b = p.a_numbers * a_bits / p.count, p.b_numbers * b_bits / (1 if p.shared else p.count)
    if p.shared and b <= half:
        return p.count * a + b + 16 * p.results
    orders = [a + b * math.ceil(a / half), b + a * math.ceil(b / half)]
    for power in range(p.n.bit_length() + 1):
        width = min(p.n, 2**power)
        height = max(1, int(half / (16 * width)))
        orders.append(a * math.ceil(p.n / width) + b * math.ceil(p.m / height))
    return p.count * min(orders) + 16 * p.results


def sram_bits(p: Product, k: int, machine: Machine, columns: int, ways: int, word: int = 16) -> float:
    """Operands that enter the array, and results or partial sums that leave and enter it in words of so many bits."""
    rows = machine.rows
    a_bits, b_bits = number_bits(p)
    deep = math.ceil(k / ways / rows)
    if machine.dataflow == "os":
        a, b, sums = p.m * k * math.ceil(p.n / columns), p.n * k * math.ceil(p.m / rows), p.m * p.n
    elif machine.dataflow == "ws":
        a, b, sums = p.m * k * math.ceil(p.n / columns), p.n * k, p.m * p.n * (2 * deep - 1)
    else:
        a, b, sums = p.m * k, p.n * k * math.ceil(p.m / columns), p.m * p.n * (2 * deep - 1)
    return p.count * (a * a_bits + b * b_bits + sums * word)
