"""Operands of a short range, whose products are whole numbers of one unit."""

from __future__ import annotations

from dataclasses import dataclass

from fourbit.formats import FloatFormat, Format, IntFormat


@dataclass(frozen=True)
class FixedOperand:
    """How an operand of a short range enters an exact sum: value = +-significand 2^(step shift + lsb).

    Args:
        bits: width of the code.
        significand_bits: of the significand; `signed`: in two's complement, and there is no sign bit of its own.
        shift_bits, largest_shift, step: the shift, 0 where there is none.
        lsb: log2 of the unit.
        magnitude: the largest |value| / 2^lsb.
    """

    bits: int
    significand_bits: int
    signed: bool
    shift_bits: int
    largest_shift: int
    step: int
    lsb: int
    magnitude: int


def fixed_operand(format: Format) -> FixedOperand | None:
    """None where the range is too wide for exact sums (more than 26 places) or the format is of no such kind."""
    if isinstance(format, IntFormat):
        if not float(format.low).is_integer():
            return None
        magnitude = int(max(abs(format.low), format.high))
        return FixedOperand(format.bits, format.bits, format.signed, 0, 0, 1, 0, magnitude)
    if not isinstance(format, FloatFormat) or format.specials != "none" or format.sign_bits != 1:
        return None
    step = format.radix.bit_length() - 1
    if format.radix != 1 << step or (format.mantissa_bits and step != 1):
        return None
    lowest = 0 if format.mantissa_bits and not format.subnormals else 1  # the exponent field that is not shifted
    largest = (1 << format.exponent_bits) - 1 - lowest
    lsb = (lowest - format.exponent_bias) * step + format.log2_shift - format.mantissa_bits
    magnitude = round(format.max / 2.0**lsb)
    if magnitude.bit_length() > 26:
        return None
    bits = format.exponent_bits
    return FixedOperand(format.bits, format.mantissa_bits + 1, False, bits, largest, step, lsb, magnitude)
