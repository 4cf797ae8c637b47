"""What a unit sees in the code of an operand: a significand, a sign, and by how many places it is shifted."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Value, unsigned

from fourbit.errors import UserError
from fourbit.formats import FloatFormat, Format, IntFormat
from fourbit.hardware._fixed import fixed_operand
from fourbit.hardware._float import Float, float_of
from fourbit.hardware.units._bits import wire


def read_fixed(m: Module, format: Format, code: Value) -> tuple[Value, Value, Value]:
    """Significand, sign and shift of a code, as `fixed_operand` describes them; without a mantissa the shift is one step more,
    as the significand of zero is zero anyway."""
    operand = fixed_operand(format)
    assert operand is not None
    if isinstance(format, IntFormat):
        significand = code.as_signed() if operand.signed else code.as_unsigned()
        return significand, Const(0, 1), Const(0, 1)
    assert isinstance(format, FloatFormat)
    mantissa, exponents = format.mantissa_bits, format.exponent_bits
    field = code[mantissa : mantissa + exponents]
    if mantissa and not format.subnormals:  # exponent field 0 is a binade like others, but for zero
        return Cat(code[:mantissa], code[:-1].any()), code[-1], field
    hidden = field.any()
    shift = field if not mantissa else wire(m, Mux(hidden, field - 1, 0), unsigned(exponents), "shift")
    return Cat(code[:mantissa], hidden), code[-1], shift


def read_float(m: Module, f: Float, code: Value) -> tuple[Value, Value, Value, Value, Value]:
    """Sign, exponent field (1 for subnormals), significand, NaN, infinity."""
    mantissa = f.mantissa_bits
    field, fraction, sign = code[mantissa:-1], code[:mantissa], code[-1]
    if f.subnormals:
        hidden = field.any()
        exponent = Cat(field[0] | ~hidden, field[1:])
    elif f.flushes:
        hidden, exponent = field.any(), field
        fraction = fraction & hidden.replicate(mantissa)
    else:
        hidden, exponent = field.any() | fraction.any(), field
    nan = infinite = Const(0, 1)
    if f.specials == "ieee":
        nan, infinite = field.all() & code[:mantissa].any(), field.all() & ~code[:mantissa].any()
    elif f.specials == "nan":
        nan = field.all() & fraction.all()
    return sign, exponent, Cat(fraction, hidden), nan, infinite


def read_magnitude(m: Module, format: Format, code: Value) -> tuple[Value, Value, Value]:
    """Sign, exponent field and magnitude of the significand: for aligned sums."""
    if isinstance(format, IntFormat):
        if not format.signed:
            return Const(0, 1), Const(0, 1), code
        width = format.bits if format.low == -(1 << (format.bits - 1)) else format.bits - 1
        negative = code[-1]
        magnitude = (code[:-1] ^ negative.replicate(format.bits - 1)) + negative
        return negative, Const(0, 1), wire(m, magnitude, unsigned(width), "magnitude")
    if not isinstance(format, FloatFormat):
        raise UserError(f"no unit multiplies numbers of the format {format.name}: it is neither integer nor float.")
    f = float_of(format.name)
    if f.specials != "none":
        raise UserError(f"units with several ways do not take {format.name}, which has codes that are no numbers.")
    sign, exponent, significand, *_ = read_float(m, f, code)
    return sign, exponent, significand
