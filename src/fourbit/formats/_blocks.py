"""Block-scaled formats: numbers that share a scale in a format of its own, block by block, in pure Python.

    x ~ q * s * d        q on the grid of the elements, s of the block on the grid of the scales, d float32 of the tensor

The definition that everything faster is compared with, bit for bit, written for clarity. Where published code computes in
float32, every operation is rounded to float32 here, in the same order: near a decision point the order decides. For block
maximum a, tensor maximum A, R = largest block scale * largest element (NVFP4: 448 * 6) and a target t (6):

    order              d                s = round(...)         x is multiplied by         published by
    "encode_folded"    1 / e, e = R/A   a * (e * (1 / t))      1 / (s * d)                TransformerEngine, NVFP4
    "encode"           1 / e, e = R/A   (a / t) * e            1 / (s * d)                four over six, in both libraries
    "decode"           A / R            (a / t) / d            (1 / d) / s                torchao

Without a tensor scale e = d = 1. Scales that are powers of two are exact in any order.

HiFloat4 has two more levels: parts of a block whose numbers are large have a bit that doubles them (`micro`),

    x ~ q * 2^(m1 + m2) * s         s = round(bf16(a * bf16(1 / t))),   x is multiplied by bf16(1 / s) / 2^(m1 + m2)

with bf16 the rounding to bfloat16, as its authors' code has it.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple

from fourbit.errors import UserError
from fourbit.formats._base import Format

Order = Literal["encode_folded", "encode", "decode"]
ORDERS: tuple[Order, ...] = ("encode_folded", "encode", "decode")
FLOAT32_MAX = float(2**128 - 2**104)


def float32(x: float) -> float:
    """`x` rounded to float32, ties to even; infinity beyond its range.

    >>> float32(1 / 6)
    0.1666666716337204
    """
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def bfloat16(x: float) -> float:
    """A float32 number rounded to bfloat16, ties to even.

    >>> bfloat16(float32(1 / 7))
    0.142578125
    """
    if not math.isfinite(x):
        return x
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


class Blocks(NamedTuple):
    """A quantized row: a code per element, a code per block, the tensor's scale (1 where the format has none), and per level
    of micro-exponents a bit per part."""

    codes: tuple[int, ...]
    scales: tuple[int, ...]
    tensor_scale: float
    micro: tuple[tuple[int, ...], ...] = ()


class Choice(NamedTuple):
    """A block quantized for one target: its scale's code, its elements' codes, and the error that selects among targets."""

    scale: int
    codes: tuple[int, ...]
    error: float
    micro: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class BlockFormat:
    """Elements, blocks, and how the scale of a block comes about.

    Args:
        name, summary, source: as for a `Format`.
        element: format of the elements.
        block: how many neighbours share a scale; the last block of a row may be shorter.
        scale: format of the block scales.
        rule: "floor": 2^(floor(log2 a) - floor(log2 t)), what the OCP specification describes, so that elements may saturate;
            "ceil": the smallest scale with a / scale <= t, so that none does; "nearest": a / t rounded to the scale format.
        tensor_bound: the largest block scale that the tensor's scale leaves room for (NVFP4: 448); 0: no tensor scale.
        targets: magnitudes t that a block's maximum may be mapped to; the one with the smallest error is taken, the first
            of equals. Empty: the largest element.
        error: what selects among targets: sum of "squared" or "absolute" differences, float32, element by element.
        order: order of the float32 operations, see the module.
        least_scale: smaller block scales become this (torchao's NVFP4: 2^-6, the smallest normal number of E4M3).
        micro: sizes of the parts of a block that have a bit each, a factor of 2, larger parts first (HiFloat4: 8, 4). A part's
            bit is set if its largest magnitude, scaled, reaches the power of two that the levels below it cannot.

    Raises:
        UserError: the fields do not make a format.
    """

    name: str
    element: Format
    block: int
    scale: Format
    summary: str = ""
    source: str = ""
    rule: Literal["floor", "ceil", "nearest"] = "floor"
    tensor_bound: float = 0.0
    targets: tuple[float, ...] = ()
    error: Literal["squared", "absolute"] = "squared"
    order: Order = "encode_folded"
    least_scale: float = 0.0
    micro: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.block < 1:
            raise UserError(f"block format {self.name}: a block has {self.block} elements, but must have at least 1")
        if self.rule != "nearest" and (self.tensor_bound or len(self.targets) > 1):
            raise UserError(f"block format {self.name}: a tensor scale and a choice of targets need rule='nearest'")
        object.__setattr__(self, "micro", tuple(self.micro))
        nested = zip((self.block, *self.micro), self.micro, strict=False)
        if self.micro and (self.rule != "nearest" or self.tensor_bound or any(size % part for size, part in nested)):
            raise UserError(
                f"block format {self.name}: micro-exponents need rule='nearest', no tensor scale, and parts that divide the "
                "block and each other"
            )
        object.__setattr__(self, "targets", tuple(self.targets) or (self.element.max * 2.0 ** len(self.micro),))

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> float:
        """Bits per element, with its share of the block's scale and micro-exponents."""
        return self.element.bits + self.scale.bits / self.block + sum(1 / size for size in self.micro)

    def tensor_scales(self, amax: float) -> tuple[float, float]:
        """(e, d): what the block scales of a tensor with largest magnitude `amax` are encoded and decoded with, float32.

        NaN where `amax` is NaN or infinite; 1 for a tensor of zeros, and without a tensor scale.
        """
        if not self.tensor_bound or amax == 0:
            return 1.0, 1.0
        if not math.isfinite(amax):
            return math.nan, math.nan
        largest = float32(self.tensor_bound * max(self.targets))
        if self.order == "decode":
            decode = float32(amax / largest)
            return (float32(1 / decode) if decode else math.inf), decode
        encode = min(float32(largest / amax), FLOAT32_MAX)
        return encode, float32(1 / encode)

    def quantize(self, row: Sequence[float], amax: float | None = None) -> Blocks:
        """A row as codes.

        Args:
            row: numbers; float32 ones are taken exactly, others are rounded to it.
            amax: largest magnitude of the tensor that the row belongs to, for its scale. None: that of the row.

        Returns:
            Blocks. NaN or infinity make the scale of their block NaN; in a format with a tensor scale, the tensor's.
            A block of zeros, and one whose scale rounds to zero, has codes of zero.

        >>> from fourbit.formats import MXFP4
        >>> MXFP4.quantize([7.0, 2.6, -0.2])
        Blocks(codes=(7, 5, 0), scales=(127,), tensor_scale=1.0, micro=())
        """
        x = [float32(value) for value in row]
        amax = float32(_largest(x) if amax is None else amax)
        if self.tensor_bound and not math.isfinite(amax):
            return Blocks((0,) * len(x), (self.scale.encode(1.0),) * math.ceil(len(x) / self.block), math.nan)
        codes, scales = [], []
        micro: list[list[int]] = [[] for _ in self.micro]
        for block in self.split(x):
            best = self.choose(block, amax)
            codes.extend(best.codes)
            scales.append(best.scale)
            for level, bits in zip(micro, best.micro, strict=True):
                level.extend(bits)
        return Blocks(tuple(codes), tuple(scales), self.tensor_scales(amax)[1], tuple(map(tuple, micro)))

    def dequantize(self, blocks: Blocks) -> list[float]:
        """q * (s * d), both products rounded to float32; the factors of micro-exponents are exact."""
        numbers = []
        for i, q in enumerate(blocks.codes):
            scale = float32(self.scale_at(i, blocks.scales[i // self.block], blocks.micro) * blocks.tensor_scale)
            numbers.append(float32(self.element.values[q] * scale) + 0.0)
        return numbers

    def scale_at(self, position: int, scale: int, micro: Sequence[Sequence[int]]) -> float:
        """The scale of a block, given by its code, times the factors of the parts that a position of the row lies in."""
        exponent = sum(bits[position // size] for size, bits in zip(self.micro, micro, strict=True))
        return math.ldexp(self.scale.values[scale], exponent)

    def round(self, rows: Sequence[Sequence[float]]) -> list[list[float]]:
        """All rows of a tensor quantized and dequantized."""
        amax = _largest([float32(value) for row in rows for value in row])
        return [self.dequantize(self.quantize(row, amax)) for row in rows]

    def split(self, row: Sequence[float]) -> Iterator[Sequence[float]]:
        """The blocks of a row."""
        for start in range(0, len(row), self.block):
            yield row[start : start + self.block]

    def choose(self, block: Sequence[float], amax: float) -> Choice:
        """The best of the targets for one block of a tensor whose largest magnitude is `amax`."""
        best, *others = self.choices(block, amax)
        for choice in others:
            if choice.error < best.error:
                best = choice
        return best

    def choices(self, block: Sequence[float], amax: float) -> list[Choice]:
        """One block for each of the targets."""
        encode, decode = self.tensor_scales(amax)
        return [
            self._choice(block, self._scale(_largest(block), t, encode, decode), amax, decode) for t in self.targets
        ]

    def _scale(self, amax: float, target: float, encode: float, decode: float) -> int:
        """The code of a block's scale."""
        if not math.isfinite(amax):
            return self.scale.encode(math.nan)
        return self.scale.encode(max(self._wanted_scale(amax, target, encode, decode), self.least_scale))

    def _wanted_scale(self, amax: float, target: float, encode: float, decode: float) -> float:
        if self.micro:
            return bfloat16(float32(amax * bfloat16(float32(1 / target))))
        if self.rule == "floor":
            return math.ldexp(1.0, _exponent(amax) - _exponent(target)) if amax else 0.0
        if self.rule == "ceil":
            grid = self.scale.grid
            return grid[min(bisect_left(grid, Fraction(amax) / Fraction(target)), len(grid) - 1)]
        if self.order == "decode":
            return float32(float32(amax / target) / decode) if decode else math.inf
        if self.order == "encode":
            top = max(self.targets)
            return float32(float32(float32(amax / top) * encode) * float32(top / target))
        return float32(amax * float32(encode * float32(1 / target)))

    def _choice(self, block: Sequence[float], scale: int, amax: float, decode: float) -> Choice:
        """The elements for a given scale."""
        s = self.scale.values[scale]
        if not s or math.isnan(s):
            nothing = tuple((0,) * math.ceil(len(block) / size) for size in self.micro)
            return Choice(scale, (0,) * len(block), self._error(block, [0.0] * len(block)), nothing)
        if self.micro:
            return self._choice_of_parts(block, scale, bfloat16(float32(1 / s)))
        if self.order == "decode":
            factor = float32(float32(1 / decode) / s) if decode else math.inf
        else:
            product = float32(s * decode)
            factor = float32(1 / product) if product else math.inf
        factor = min(factor, FLOAT32_MAX)
        codes = tuple(self.element.encode(float32(x * factor)) for x in block)
        if len(self.targets) == 1:
            return Choice(scale, codes, 0.0)
        largest = self.tensor_bound * max(self.targets)
        values = [float32(self.element.values[q] * s) for q in codes]
        if largest:
            values = [float32(float32(v * amax) / largest) for v in values]
        return Choice(scale, codes, self._error(block, values))

    def _choice_of_parts(self, block: Sequence[float], scale: int, factor: float) -> Choice:
        """Micro-exponents from the largest part down, then the elements."""
        reach = 2.0 ** (_exponent(self.element.max) + len(self.micro))
        exponents, micro = [0] * len(block), []
        for size in self.micro:
            bits = []
            for start in range(0, len(block), size):
                part = range(start, min(start + size, len(block)))
                largest = float32(_largest([block[i] for i in part]) * factor)
                bits.append(int(math.ldexp(largest, -exponents[start]) >= reach))
                for i in part:
                    exponents[i] += bits[-1]
            micro.append(tuple(bits))
            reach /= 2
        scaled = (math.ldexp(float32(x * factor), -e) for x, e in zip(block, exponents, strict=True))
        return Choice(scale, tuple(map(self.element.encode, scaled)), 0.0, tuple(micro))

    def _error(self, block: Sequence[float], values: Sequence[float]) -> float:
        total = 0.0
        for x, value in zip(block, values, strict=True):
            difference = float32(value - x)
            total = float32(total + (float32(difference**2) if self.error == "squared" else abs(difference)))
        return total


def _largest(x: Sequence[float]) -> float:
    """The largest magnitude; NaN if there is one, 0 of nothing."""
    return math.nan if any(map(math.isnan, x)) else max(map(abs, x), default=0.0)


def _exponent(x: float) -> int:
    """floor(log2(x)) for x > 0, exactly."""
    return math.frexp(x)[1] - 1
