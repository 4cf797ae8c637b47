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
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from fourbit.errors import UserError, unknown
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware._quantizer import RANDOM_BITS
from fourbit.hardware._results import BASELINE, SHARED, Cost, Results, stored
from fourbit.hardware._trace import BLOCK
from fourbit.hardware._unit import UNITS
from fourbit.hardware.catalog import CATALOG

Dataflow = Literal["os", "ws", "is"]
Gemm = Literal["fprop", "dgrad", "wgrad"]
SRAM_BIT = 0.10
"""Reading or writing one bit of 8 KB of on-chip memory, in FP16 multiply-adds: 10 pJ for 64 bits against 1.5 pJ for a
multiplication and an addition (45 nm; Horowitz, ISSCC 2014). It grows with the root of the size: there, 32 KB take 20 pJ and
1 MB 100 pJ."""
DRAM_BIT = 2.6
"""The same of stacked DRAM: 3.9 pJ per bit (HBM2; O'Connor et al., MICRO 2017)."""
ELEMENTWISE = 3
"""16-bit numbers per output that are read between the products: y forward, y and the gradient backward."""
OPTIMIZER_BITS = 144
"""Per weight: the gradient in 16 bits is read, weight and momentum in FP32 are read and written."""
FLOPS_PER_GRADIENT = 10
"""The paper's count of FP16 operations per element of a gradient: PACT's backward pass, conversion of radix, both phases,
scaling."""
FULL = "full"
"""The name of no quantization."""


@dataclass(frozen=True)
class Product:
    """One GEMM of one layer: `count` products of a matrix [m, k] by a matrix [k, n].

    Args:
        layer, gemm: where it belongs.
        count, m, n, k: its size.
        a, b: names of the operands' formats ("full": none).
        a_numbers, b_numbers: different numbers of each operand.
        y_numbers: different numbers of the result; 0: count m n. (A convolution's dgrad adds several into one.)
        block: name of the format of a scale per block of numbers, "" where there is none.
        stochastic: whether an operand that is quantized for this product is rounded stochastically.
        power: whether the gradient's scale is a power of two.
        shared: whether all `count` products have the same b, one after the other (the steps of a recurrent layer).
        depthwise: whether it is many products of vectors, which no systolic array is for: its elements work on their own
            then, all of them all the time.
    """

    layer: str
    gemm: Gemm
    count: int
    m: int
    n: int
    k: int
    a: str
    b: str
    a_numbers: int
    b_numbers: int
    y_numbers: int = 0
    block: str = ""
    stochastic: bool = False
    power: bool = False
    shared: bool = False
    depthwise: bool = False

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.count * self.m * self.n * self.k

    @property
    def results(self) -> int:
        """Numbers that it makes."""
        return self.y_numbers or self.count * self.m * self.n


SCHEMES: dict[str, tuple[str, dict[Gemm, tuple[str, str, str]]]] = {
    "hfp8": (
        "HFP8: FP8 1-4-3 forward, 1-5-2 gradients (Sun et al., NeurIPS 2019)",
        {
            "fprop": ("fp8_143", "fp8_143", ""),
            "dgrad": ("fp8_152", "fp8_143", ""),
            "wgrad": ("fp8_152", "fp8_143", ""),
        },
    ),
    "mxfp4": (
        "MXFP4: E2M1 with E8M0 scales of 32 numbers",
        dict.fromkeys(("fprop", "dgrad", "wgrad"), ("fp4_e2m1", "fp4_e2m1", "e8m0")),
    ),
    "nvfp4": (
        "NVFP4: E2M1 with E4M3 scales of 16 numbers, stochastic gradients behind a Hadamard transform",
        dict.fromkeys(("fprop", "dgrad", "wgrad"), ("fp4_e2m1", "fp4_e2m1", "fp8_e4m3fn")),
    ),
    "fp16": ("FP16 1-6-9 throughout", dict.fromkeys(("fprop", "dgrad", "wgrad"), (FULL, FULL, ""))),
}
"""Formats that no recipe of the library trains with, for comparison: what stands in place of a recipe's narrow products."""


def with_scheme(products: Iterable[Product], scheme: str) -> list[Product]:
    """The products of a 4-bit recipe, those with narrow operands in the formats of one of `SCHEMES`.

    Raises:
        UserError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    found = []
    for p in products:
        if min(bits_of(p.a), bits_of(p.b)) < 16:
            a, b, block = SCHEMES[scheme][1][p.gemm]
            drawn, power = scheme == "nvfp4" and p.gemm != "fprop", scheme != "nvfp4"
            p = replace(p, a=a, b=b, block=block, stochastic=drawn, power=power)
        found.append(p)
    return found


def bits_of(format: str) -> int:
    """Bits that a number takes in memory; 16 without quantization."""
    from fourbit import formats

    return 16 if format == FULL else formats.get(format).bits


def unit_of(p: Product, accumulator: str) -> str:
    """Name of the unit that a product runs on.

    Args:
        accumulator: "fp16", or "fixed" where the unit's sums allow a fixed-point register.

    Raises:
        UserError: no unit multiplies such a pair.
    """
    pair = sorted((p.a, p.b), key=_kind_order)
    kinds = _kind(pair[0]), _kind(pair[1])
    fixed = "_fixed" if accumulator == "fixed" else ""
    narrow = {
        ("integer", "integer"): "uint4_int4" if "uint4" in pair else "int4_int4",
        ("integer", "radix4"): "uint4_fp4" if "uint4" in pair else "int4_fp4",
        ("integer", "radix2"): "int4_fp4r2",
        ("integer", "radix8"): "int4_fp4r8",
        ("integer", "radix16"): "int4_fp4r16",
        ("integer", "fp4_121"): "int4_fp4_121",
        ("integer", "fp5_r2"): "int4_fp5r2",
    }
    own = _own_unit(p, accumulator)
    if own:
        return own
    if kinds in narrow and bits_of(pair[0]) <= 4:
        return narrow[kinds] + fixed
    if kinds == ("e2m1", "e2m1"):
        return "nvfp4" if p.block == "fp8_e4m3fn" else "mxfp4"
    if kinds == ("integer", "float8") and bits_of(pair[0]) <= 4:
        return "uint4_fp8" if "uint4" in pair else "int4_fp8"
    if kinds == ("float8", "float8"):
        return "fp8"
    if kinds[-1] == "wide":
        return BASELINE
    raise UserError(
        f"no arithmetic unit multiplies {p.a} by {p.b}, which layer {p.layer} asks for ({p.gemm}): enter one, as "
        "docs/hardware.md shows."
    )


def _own_unit(p: Product, accumulator: str) -> str:
    """A unit that was entered for just these formats, beside those of the catalogue."""
    for name, unit in UNITS.items():
        if not isinstance(unit, InnerProduct) or {f.name for f in unit.operands} != {p.a, p.b}:
            continue
        if name not in CATALOG and isinstance(unit.accumulator, int) == (accumulator == "fixed"):
            return name
    return ""


def _kind(format: str) -> str:
    from fourbit import formats
    from fourbit.formats import FloatFormat, IntFormat

    if bits_of(format) >= 16:
        return "wide"
    f = formats.get(format)
    if isinstance(f, IntFormat):
        return "integer"
    if format == "fp4_e2m1":
        return "e2m1"
    if isinstance(f, FloatFormat) and f.mantissa_bits == 0 and f.bits == 4:
        return {2: "radix2", 4: "radix4"}.get(f.radix, f"radix{f.radix}")
    return "float8" if f.bits == 8 else f.name


def _kind_order(format: str) -> int:
    order = ("integer", "e2m1", "radix2", "radix4", "float8", "wide")
    kind = _kind(format)
    return order.index(kind) if kind in order else len(order) - 2


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


QUANTIZERS = {
    "radix2": "quantize_fp4r2",
    "fp5_r2": "quantize_fp4r2",
    "float8": "quantize_fp8_152",
    "e2m1": "quantize_e2m1",
}
"""By what an operand's kind is quantized; one phase of other radices like radix 4, other formats like E2M1."""
DRAWN = {
    ("quantize_fp4r2", True): "quantize_fp4r2_sr",
    ("quantize_fp4r2", False): "quantize_luq",
    ("quantize_e2m1", False): "quantize_e2m1_sr",
}
"""Stochastically, by the nearest one and whether the scale is a power of two."""
RANDOM_SHARE = RANDOM_BITS / 32
"""Of a step of the random source that a number takes."""


def quantizers_of(p: Product, dgrad: Product | None) -> list[tuple[str, int]]:
    """Units that make a product's operands, and how many numbers each makes.

    Both operands of fprop are made there, and the gradient in wgrad, for both products at once. Where blocks share a scale,
    dgrad and wgrad make all of theirs, which have their blocks along another axis.

    Args:
        dgrad: of the same layer, for its wgrad.
    """
    operands = [(p.a, p.a_numbers), (p.b, p.b_numbers)]
    if p.gemm == "dgrad" and not p.block:
        return []
    if p.gemm == "wgrad" and not p.block:
        phases = {_kind(dgrad.a), _kind(p.a)} if dgrad is not None and dgrad.a != p.a else set()
        if len(phases) == 1 and phases <= {"radix4", "radix8", "radix16"}:
            return [("quantize_fp4", p.a_numbers)]
        formats = [p.a] if dgrad is None or dgrad.a == p.a else [p.a, dgrad.a]
        operands = [(f, p.a_numbers) for f in formats]
    found = []
    for format, numbers in operands:
        kind = _kind(format)
        if kind == "integer":
            name = "quantize_uint4" if format == "uint4" else "quantize_int4"
        elif kind == "wide":
            continue
        else:
            name = QUANTIZERS.get(kind, "quantize_fp4_even" if kind.startswith("radix") else "quantize_e2m1")
        if format == "fp8_143":
            name = "quantize_fp8_143"
        if kind == "e2m1" and p.block == "e8m0":
            name = "quantize_mxfp4"
        if p.stochastic:
            name = DRAWN.get((name, p.power), name)
        found.append((name, numbers))
    return found


def _operand_bits(p: Product, dgrad: Product | None) -> float:
    """Of the operands that are written for a product between the products."""
    a, b = _bits(p)
    if p.gemm == "fprop":
        return p.a_numbers * a
    if p.gemm == "dgrad":
        return 0.0
    twice = dgrad is not None and (dgrad.a != p.a or bool(p.block))
    again = p.b_numbers * b if p.block else 0.0
    return p.a_numbers * (a + (_bits(dgrad)[0] if dgrad and twice else 0.0)) + again


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
    weights = sum(p.b_numbers for p in products if p.gemm == "fprop")
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
    dram = _dram_bits(p, machine.sram_kb * 8192)
    memory = dram / _bandwidth(machine, base)
    sram_bit, dram_bit = _bit_energies(machine, results)
    arithmetic = p.macs * cost.energy_per_mac * 1e-15
    if fixed:
        arithmetic += p.count * p.m * p.n * _smallest_energy(results, "converter")
    word = 32 if fixed and machine.dataflow != "os" else 16  # partial sums return; results are converted
    energy = {
        "arithmetic": arithmetic,
        "quantizers": sum(n * _quantizer_energy(name, p, results) for name, n in made),
        "sram": _sram_bits(p, steps * cost.macs, machine, columns, cost.macs, word) * sram_bit,
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


def _bits(p: Product) -> tuple[float, float]:
    """Of a number of each operand, with its part of a block's scale."""
    scale = 8 / BLOCK[p.block] if p.block else 0.0
    return bits_of(p.a) + scale, bits_of(p.b) + scale


def _dram_bits(p: Product, sram: float) -> float:
    """Both operands once and the results, where one operand fits into half of the memory on the chip. Else the best of three
    orders: a part of one operand stays, and the other passes once for each; or a block of sums stays in one half, and rows
    and columns of the operands pass once for each block."""
    a_bits, b_bits = _bits(p)
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


def _sram_bits(p: Product, k: int, machine: Machine, columns: int, ways: int, word: int = 16) -> float:
    """Operands that enter the array, and results or partial sums that leave and enter it in words of so many bits."""
    rows = machine.rows
    a_bits, b_bits = _bits(p)
    deep = math.ceil(k / ways / rows)
    if machine.dataflow == "os":
        a, b, sums = p.m * k * math.ceil(p.n / columns), p.n * k * math.ceil(p.m / rows), p.m * p.n
    elif machine.dataflow == "ws":
        a, b, sums = p.m * k * math.ceil(p.n / columns), p.n * k, p.m * p.n * (2 * deep - 1)
    else:
        a, b, sums = p.m * k, p.n * k * math.ceil(p.m / columns), p.m * p.n * (2 * deep - 1)
    return p.count * (a * a_bits + b * b_bits + sums * word)


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
