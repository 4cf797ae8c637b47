"""Floating-point formats of any radix: sign, exponent field e, mantissa field m.

    value = +-radix^(e - bias) * (1 + m (radix - 1) / 2^M)         normal numbers
    value = +-radix^(1 - bias) * m / 2^M                           e = 0, formats with subnormals
    value = +-0                                                    e = 0 and m = 0, always

Without subnormals, e = 0 with m > 0 is an ordinary binade (IBM's DLFloat16 works so), and with no mantissa bits the
whole binade e = 0 is zero: the radix-4 format [1,3,0] has the codes +-0 and +-4^(e-4), e = 1..7. All values may be
shifted by a power of two, `log2_shift`: the odd phase of two-phase rounding is the even one times 2^-1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from fourbit.errors import UserError
from fourbit.formats._base import Format


@dataclass(frozen=True)
class FloatFormat(Format):
    """A floating-point format in one line.

    Args:
        exponent_bits, mantissa_bits: field widths E and M; `sign_bits` (0 or 1) more for the sign.
        exponent_bias: b in radix^(e - b).
        radix: base of the exponent, 2 or more.
        subnormals: gradual underflow at e = 0 (needs mantissa bits).
        specials: "none": every code is a number; "nan": the all-ones pattern is NaN (OCP E4M3FN, DLFloat16);
            "ieee": the top exponent holds infinities and NaN.
        log2_shift: every value is multiplied by 2^log2_shift.
        has_zero: E8M0 has no zero: its e = 0 is an ordinary power.

    Raises:
        UserError: the fields do not make a format.

    >>> FloatFormat("mine", exponent_bits=2, mantissa_bits=1, exponent_bias=1).grid[-3:]
    (3.0, 4.0, 6.0)
    """

    __hash__ = Format.__hash__

    exponent_bits: int = 3
    mantissa_bits: int = 0
    exponent_bias: int = 4
    radix: int = 2
    sign_bits: int = 1
    subnormals: bool = True
    specials: Literal["none", "nan", "ieee"] = "none"
    log2_shift: int = 0
    has_zero: bool = True

    def __post_init__(self) -> None:
        if self.exponent_bits < 1 or self.mantissa_bits < 0 or self.radix < 2 or self.sign_bits not in (0, 1):
            raise UserError(
                f"format {self.name}: need exponent_bits >= 1, mantissa_bits >= 0, radix >= 2, sign_bits 0 or 1"
            )
        if not 1 < self.bits <= 16:
            raise UserError(f"format {self.name} has {self.bits} bits: formats have 2 to 16")
        if self.multiplier is not None and (self.mantissa_bits or not 1 <= self.multiplier <= self.radix):
            raise UserError(f"format {self.name}: a multiplier needs mantissa_bits=0 and lies between 1 and the radix")
        extreme = max(abs(e) for e in (-self.exponent_bias, 2**self.exponent_bits - self.exponent_bias))
        if extreme * math.log2(self.radix) > 900:
            raise UserError(f"format {self.name}: its range exceeds that of a double; choose another exponent_bias")

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return self.sign_bits + self.exponent_bits + self.mantissa_bits

    @property
    def is_binary(self) -> bool:
        """Radix 2 with mantissa bits, rounded at midpoints, and a sign: plain floating-point arithmetic applies."""
        return self.radix == 2 and self.mantissa_bits > 0 and self.sign_bits == 1 and self.log2_shift == 0

    def decode(self, code: int) -> float:
        """The number of a bit pattern: sign, exponent, mantissa from the most significant bit down."""
        M, E = self.mantissa_bits, self.exponent_bits
        m, e = code & ((1 << M) - 1), (code >> M) & ((1 << E) - 1)
        sign = -1.0 if self.sign_bits and code >> (M + E) else 1.0
        top = e == (1 << E) - 1
        if self.specials == "ieee" and top:
            return sign * math.inf if m == 0 else math.nan
        if self.specials == "nan" and top and m == (1 << M) - 1:
            return math.nan
        if e == 0 and self.has_zero and (self.subnormals or m == 0):
            return sign * self._power(1 - self.exponent_bias) * m / 2**M
        return sign * self._power(e - self.exponent_bias) * (1 + m * (self.radix - 1) / 2**M)

    def _power(self, n: int) -> float:
        log2_radix = math.log2(self.radix)
        if log2_radix.is_integer():
            return math.ldexp(1.0, n * int(log2_radix) + self.log2_shift)
        return float(Fraction(self.radix) ** n * Fraction(2) ** self.log2_shift)


def midpoint_multiplier(radix: int) -> Fraction:
    """m = 2 radix / (radix + 1): multiplying by m and truncating rounds to the nearer of radix^(n-1) and radix^n.

    The decision point (radix^n + radix^(n-1)) / 2 equals radix^n / m. Radix 4 gives the paper's 1.6 (Eq. 1).
    """
    return Fraction(2 * radix, radix + 1)
