"""A binary floating-point number as an arithmetic unit sees it, and its rounding in exact arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from fourbit.errors import UserError
from fourbit.formats import BINARY16, FP8_143, FP8_152, FP8_E4M3FN, FP8_E5M2, FP16_169, FloatFormat, Format

Special = Literal["none", "nan", "ieee"]


@dataclass(frozen=True)
class Float:
    """Sign, exponent field and mantissa field of a code.

    Args:
        name: of the format.
        exponent_bits, mantissa_bits: widths of the fields.
        bias: value = 2^(e - bias) (1 + m / 2^mantissa_bits).
        subnormals: gradual underflow at e = 0. Without it, e = 0 with m > 0 is an ordinary binade, as in `fourbit.formats`.
        specials: as in `fourbit.formats.FloatFormat`.
        saturates: numbers beyond the range become the largest one, not infinity.
        flushes: the whole binade e = 0 counts as zero when read, and is written as zero.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    subnormals: bool
    specials: Special
    saturates: bool = True
    flushes: bool = False

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def precision(self) -> int:
        """Bits of the significand, the leading one included."""
        return self.mantissa_bits + 1

    @property
    def top(self) -> int:
        """The largest exponent field."""
        return (1 << self.exponent_bits) - 1

    @property
    def lsb(self) -> int:
        """log2 of the last place at exponent field 0: a number is its significand times 2^(field + lsb)."""
        return -self.bias - self.mantissa_bits

    @property
    def nan(self) -> int | None:
        """The code of NaN, sign aside; None where there is none."""
        if self.specials == "none":
            return None
        return (1 << (self.bits - 1)) - 1

    @property
    def largest(self) -> int:
        """The code of the largest number."""
        if self.specials == "ieee":
            return (self.top << self.mantissa_bits) - 1
        return (1 << (self.bits - 1)) - (2 if self.specials == "nan" else 1)

    @property
    def infinity(self) -> int:
        """The code of infinity, or of what stands for it."""
        return self.top << self.mantissa_bits if self.specials == "ieee" else self.largest

    def split(self, code: int) -> tuple[int, int, int]:
        """Sign, exponent field, mantissa field."""
        m = code & ((1 << self.mantissa_bits) - 1)
        return code >> (self.bits - 1), (code >> self.mantissa_bits) & self.top, m

    def is_finite(self, code: int) -> bool:
        """Neither NaN nor infinity."""
        _, e, m = self.split(code)
        if self.specials == "ieee":
            return e != self.top
        return not (self.specials == "nan" and e == self.top and m == (1 << self.mantissa_bits) - 1)

    def is_nan(self, code: int) -> bool:
        """Not a number."""
        return not self.is_finite(code) and (self.specials == "nan" or bool(self.split(code)[2]))

    def field(self, code: int) -> int:
        """The exponent field that counts: subnormals have that of the lowest binade."""
        _, e, _ = self.split(code)
        return max(e, 1) if self.subnormals else e

    def value(self, code: int) -> Fraction:
        """The number of a finite code."""
        sign, e, m = self.split(code)
        if e == 0 and (self.flushes or (m == 0 and not self.subnormals)):
            return Fraction(0)
        hidden = int(e > 0 or not self.subnormals)
        significand = (hidden << self.mantissa_bits) + m
        return (-1) ** sign * significand * Fraction(2) ** (self.field(code) + self.lsb)

    def encode(self, x: Fraction) -> int:
        """The code of the number nearest to `x`, ties to the even code; zero is +0."""
        magnitude, sign = abs(x), int(x < 0) << (self.bits - 1)
        if not magnitude:
            return 0
        exponent = _floor_log2(magnitude)
        field = exponent + self.bias
        lowest = 1 if self.subnormals else 0
        if self.flushes and field < 1:
            return 0
        if field < lowest and not self.subnormals:
            smallest = self.value(1)
            return sign | 1 if magnitude > smallest / 2 else 0
        field = max(field, lowest)
        code = round(magnitude * Fraction(2) ** (-field - self.lsb))
        code += (field - 1) << self.mantissa_bits  # the leading one adds one to the field
        if not self.subnormals and code == 0:
            code = 1  # 2^-bias is not there: its code means zero
        if code == 0:
            return 0
        return sign | (code if code <= self.largest else self.largest if self.saturates else self.infinity)


def _floor_log2(x: Fraction) -> int:
    n = x.numerator.bit_length() - x.denominator.bit_length()
    return n if x >= Fraction(2) ** n else n - 1


def _of(format: Format, saturates: bool = True) -> Float:
    assert isinstance(format, FloatFormat)
    return Float(
        format.name,
        format.exponent_bits,
        format.mantissa_bits,
        format.exponent_bias,
        format.subnormals,
        format.specials,
        saturates,
    )


FLOAT32 = Float("float32", 8, 23, 127, False, "ieee", saturates=False, flushes=True)
"""IEEE single precision, subnormals flushed to zero as matrix units do."""

FLOATS = {
    f.name: f
    for f in (
        _of(FP16_169),
        _of(BINARY16, saturates=False),
        Float("bfloat16", 8, 7, 127, False, "ieee", saturates=False, flushes=True),
        FLOAT32,
        _of(FP8_143),
        _of(FP8_152),
        _of(FP8_E4M3FN),
        _of(FP8_E5M2),
    )
}
"""Those that units know. bfloat16 flushes subnormals, too."""


def float_of(name: str) -> Float:
    """UserError for a format that no unit knows."""
    if name not in FLOATS:
        raise UserError(f"no arithmetic unit knows the floating-point format {name}: choose from {', '.join(FLOATS)}.")
    return FLOATS[name]
