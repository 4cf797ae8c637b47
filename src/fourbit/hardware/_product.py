"""What a training step multiplies: the products of its layers, the units that they run on, and what makes their operands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fourbit.errors import UserError
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware._results import BASELINE
from fourbit.hardware._trace import BLOCK
from fourbit.hardware._unit import UNITS
from fourbit.hardware.catalog import CATALOG

Gemm = Literal["fprop", "dgrad", "wgrad"]
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
        learned: whether b of fprop are weights, which the optimizer moves, and not activations.
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
    learned: bool = True

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.count * self.m * self.n * self.k

    @property
    def results(self) -> int:
        """Numbers that it makes."""
        return self.y_numbers or self.count * self.m * self.n


def in_full_precision(products: Iterable[Product]) -> list[Product]:
    """The same products without quantization: what FP16 units multiply."""
    return [replace(p, a=FULL, b=FULL, block="", stochastic=False, power=False) for p in products]


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
    kinds = kind_of(pair[0]), kind_of(pair[1])
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
    found = ""
    for name, unit in UNITS.items():
        if name in CATALOG or not isinstance(unit, InnerProduct) or {f.name for f in unit.operands} != {p.a, p.b}:
            continue
        if isinstance(unit.accumulator, int) == (accumulator == "fixed"):
            return name
        found = found or ("" if isinstance(unit.accumulator, int) else name)
    return found


def kind_of(format: str) -> str:
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
    kind = kind_of(format)
    return order.index(kind) if kind in order else len(order) - 2


def number_bits(p: Product) -> tuple[float, float]:
    """Of a number of each operand, with its part of a block's scale."""
    scale = 8 / BLOCK[p.block] if p.block else 0.0
    return bits_of(p.a) + scale, bits_of(p.b) + scale


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
        phases = {kind_of(dgrad.a), kind_of(p.a)} if dgrad is not None and dgrad.a != p.a else set()
        if len(phases) == 1 and phases <= {"radix4", "radix8", "radix16"}:
            return [("quantize_fp4", p.a_numbers)]
        formats = [p.a] if dgrad is None or dgrad.a == p.a else [p.a, dgrad.a]
        operands = [(f, p.a_numbers) for f in formats]
    found = []
    for format, numbers in operands:
        kind = kind_of(format)
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
