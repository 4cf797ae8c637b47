"""Operands of a real training run, as units meet them, for the energy of their switching.

The stored trace (`data/trace.json`, made by `benchmarks/operand_trace.py`) holds dot products of the three GEMMs of one
layer: x and w of fprop, w and g of dgrad, x and g of wgrad, as FP16 1-6-9, in the order in which a dot product is summed, and
the scales that the layer had. Each format gets the numbers that its recipe would give it.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources

from fourbit.formats import E8M0, FloatFormat, Format, IntFormat
from fourbit.hardware._converter import Converter
from fourbit.hardware._float import FLOATS, float_of
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware._quantizer import POWER_BITS, Quantizer
from fourbit.hardware._unit import Unit

BLOCK = {"e8m0": 32, "fp8_e4m3fn": 16}
"""Numbers that share a scale, by its format."""
TENSOR_SCALE = 64.0
"""Of NVFP4, which brings the blocks' scales into the range of E4M3."""
LEVELS = {"x": 15, "w": 7}
"""The largest integers that the trace's scales are for."""


@dataclass(frozen=True)
class Trace:
    """Dot products by GEMM: [(kind of a, numbers, kind of b, numbers)], where a kind is "x", "w" or "g".

    Args:
        source: where it comes from, in words.
        scales: of "x" (15 / alpha), "w" (7 / alpha) and "g" (1: GradScale is in the numbers).
    """

    source: str
    scales: dict[str, float]
    products: dict[str, list[tuple[str, list[Fraction], str, list[Fraction]]]]


@cache
def stored_trace() -> Trace:
    """The trace that comes with the package."""
    data = json.loads(resources.files("fourbit.hardware").joinpath("data/trace.json").read_text())
    fp16 = FLOATS["fp16_169"]

    def numbers(text: str) -> list[Fraction]:
        raw = base64.b64decode(text)
        return [fp16.value(int.from_bytes(raw[k : k + 2], "little")) for k in range(0, len(raw), 2)]

    products = {
        gemm: [(kinds[0], numbers(a), kinds[1], numbers(b)) for a, b in pairs]
        for gemm, (kinds, pairs) in data["products"].items()
    }
    return Trace(data["source"], data["scales"], products)


def _gemms(unit: InnerProduct) -> tuple[str, ...]:
    """Those that a unit is made for."""
    a, b = unit.operands
    if unit.scale is not None or a == b:
        return ("fprop", "dgrad", "wgrad") if not isinstance(a, IntFormat) else ("fprop",)
    if isinstance(b, IntFormat):
        return ("fprop",)
    return ("wgrad",) if isinstance(a, IntFormat) and not a.signed else ("dgrad",)


def operand_vectors(unit: Unit, trace: Trace, cycles: int = 1024) -> list[dict[str, int]]:
    """At most so many cycles of a unit's inputs; sums run on from cycle to cycle, each dot product from zero."""
    if isinstance(unit, InnerProduct):
        gemms = _gemms(unit)
        found: list[dict[str, int]] = []
        for gemm in gemms:
            found += _products(unit, trace, gemm, cycles // len(gemms))
        return found
    if isinstance(unit, Quantizer):
        kind = "g" if isinstance(unit.targets[0], FloatFormat) else "x" if not unit.targets[0].signed else "w"
        numbers = [x for entry in trace.products["wgrad" if kind == "x" else "dgrad"] for x in _side(entry, kind)]
        scale = Fraction(trace.scales[kind])
        fp16 = unit.float
        code = fp16.encode(scale) if unit.scale == "float" else (scale.numerator.bit_length() - 1) % (1 << POWER_BITS)
        state, vectors = 1, []
        for x in numbers[:cycles]:
            state = _xorshift(state)
            v = {"x": fp16.encode(x), "s": code}
            vectors.append(v | ({"random": state & (1 << unit.inputs["random"]) - 1} if unit.stochastic else {}))
        return vectors
    if isinstance(unit, Converter):
        from fourbit.hardware._unit import UNITS

        source = UNITS["int4_fp4_fixed"]
        assert isinstance(source, InnerProduct)
        return [{"x": source.reference(v)["y"] % (1 << unit.width)} for v in operand_vectors(source, trace, cycles)]
    return _others(unit, trace, cycles)


def _others(unit: Unit, trace: Trace, cycles: int) -> list[dict[str, int]]:
    """Gradients as they come, or the states of a random source."""
    (name, width), *_ = unit.inputs.items()
    state, found = 1, []
    if name == "state":
        for _ in range(cycles):
            found.append({name: state})
            state = _xorshift(state)
        return found
    fp16 = FLOATS["fp16_169"]
    codes = [fp16.encode(x) for entry in trace.products["dgrad"] for x in _side(entry, "g")]
    n = width // fp16.bits
    for k in range(0, min(len(codes) // n, cycles) * n, n):
        found.append({name: sum(code << fp16.bits * j for j, code in enumerate(codes[k : k + n]))})
    return found


def _side(entry: tuple[str, list[Fraction], str, list[Fraction]], kind: str) -> list[Fraction]:
    return entry[1] if entry[0] == kind else entry[3] if entry[2] == kind else []


def _xorshift(x: int) -> int:
    x ^= x << 13 & 0xFFFFFFFF
    x ^= x >> 17
    return x ^ x << 5 & 0xFFFFFFFF


def _products(unit: InnerProduct, trace: Trace, gemm: str, cycles: int) -> list[dict[str, int]]:
    found: list[dict[str, int]] = []
    (a, b), n = unit.operands, unit.ways
    for kind_a, numbers_a, kind_b, numbers_b in trace.products[gemm]:
        codes_a, scales_a = _encode(unit, a, numbers_a, kind_a, trace)
        codes_b, scales_b = _encode(unit, b, numbers_b, kind_b, trace)
        c = 0
        for k in range(0, len(codes_a) - n + 1, n):
            if len(found) == cycles:
                return found
            v = {"a": _word(codes_a[k : k + n], a.bits), "b": _word(codes_b[k : k + n], b.bits), "c": c}
            if unit.scale is not None:
                v |= {"a_scale": scales_a[k], "b_scale": scales_b[k]}
            found.append(v)
            c = unit.reference(v)["y"]
    return found


def _word(codes: Sequence[int], bits: int) -> int:
    return sum(code << bits * k for k, code in enumerate(codes))


def _encode(
    unit: InnerProduct, format: Format, numbers: Sequence[Fraction], kind: str, trace: Trace
) -> tuple[list[int], list[int]]:
    """Codes, and the code of the scale of each one's block."""
    if format.name in FLOATS and format.bits > 8:
        f = float_of(format.name)
        return [f.encode(x) for x in numbers], []
    if unit.scale is None:
        factor = trace.scales[kind]
        if isinstance(format, IntFormat):
            factor *= min(1.0, format.high / LEVELS[kind])
        return [format.encode(format.round(float(x) * factor)) for x in numbers], []
    codes, scales = [], []
    size = BLOCK[unit.scale.name]
    for k in range(0, len(numbers), size):
        block = numbers[k : k + size]
        wanted = max(float(abs(x)) for x in block) / format.max or 1.0
        if unit.scale == E8M0:
            s = 2.0 ** math.ceil(math.log2(wanted))
            code = unit.scale.encode(s)
        else:
            s = unit.scale.round(wanted * TENSOR_SCALE)
            code, s = unit.scale.encode(s), s / TENSOR_SCALE
        codes += [format.encode(format.round(float(x) / s) if s else 0.0) for x in block]
        scales += [code] * len(block)
    return codes, scales
