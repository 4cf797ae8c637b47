"""Circuits of `Quantizer` and `Hadamard`."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Value, signed, unsigned

from fourbit.formats import FloatFormat, Format, IntFormat
from fourbit.hardware._float import Float
from fourbit.hardware._quantizer import Hadamard, Quantizer
from fourbit.hardware._unit import RANDOM_BITS
from fourbit.hardware.units._bits import Live, Stages, shift_right, wire


def _read(f: Float, code: Value) -> tuple[Value, Value, Value]:
    """Sign, exponent field and significand; every code but zero is a number."""
    fraction, field = code[: f.mantissa_bits], code[f.mantissa_bits : -1]
    return code[-1], field, Cat(fraction, field.any() | fraction.any())


def quantize(unit: Quantizer, m: Module, stages: Stages, inputs: dict[str, Value]) -> dict[str, Value]:
    """Scale, then round to every target."""
    f = unit.float
    sign, field, significand = _read(f, inputs["x"])
    bits = f.exponent_bits + 2
    if unit.scale == "power":
        exponent = wire(m, field - f.bias + inputs["s"].as_signed(), signed(bits), "exponent")
    else:
        flip, other, factor = _read(f, inputs["s"])
        sign = sign ^ flip
        product = wire(m, significand * factor, unsigned(2 * f.precision), "product")
        carry = product[-1]
        significand = wire(m, Mux(carry, product, product << 1)[: len(product)], unsigned(len(product)), "significand")
        exponent = wire(m, field + other - 2 * f.bias + carry, signed(bits), "exponent")
    live = stages.cut("scale", Live(sign=sign, exponent=exponent, significand=significand))
    word = inputs["random"] if unit.stochastic else None
    outputs = {}
    for format in unit.targets:
        if isinstance(format, IntFormat):
            outputs[format.name] = _integer(m, format, live, word)
        elif format.radix != 2 or (format.mantissa_bits == 0 and word is None):
            outputs[format.name] = _logarithmic(m, format, live)
        elif format.mantissa_bits and not format.subnormals:
            outputs[format.name] = _binade_zero(m, format, live)
        else:
            outputs[format.name] = _binary(m, format, live, word)
    if len(unit.targets) > 1:
        top = round(unit.targets[0].max).bit_length() - 1
        beyond = live.significand[:-1].any()
        over = (live.exponent > top) | ((live.exponent == top) & beyond)
        high = (live.exponent > top - 1) | ((live.exponent == top - 1) & beyond)
        some = live.significand[-1]
        outputs |= {"over": over & some, "high": high & some}
    return outputs


def _rounds_up(whole: Value, rest: Value, lost: Value, word: Value | None) -> Value:
    """Whether `whole` goes up, with `rest` behind it (`lost`: whether ones follow)."""
    if word is None:
        return rest[-1] & (rest[:-1].any() | lost | whole[0])
    fraction = rest[-RANDOM_BITS:] if len(rest) >= RANDOM_BITS else Cat(Const(0, RANDOM_BITS - len(rest)), rest)
    return word < fraction


def _integer(m: Module, format: IntFormat, live: Live, word: Value | None) -> Value:
    """Round the magnitude in fixed point, then give it its sign within the range."""
    whole = format.bits
    x = live.significand
    wide = Cat(Const(0, max(0, whole + RANDOM_BITS - len(x))), x)
    distance = wire(m, (whole - 1) - live.exponent, signed(len(live.exponent) + 1), "distance")
    beyond = distance[-1]
    largest = whole + RANDOM_BITS
    amount = wire(m, Mux(distance > largest, largest, distance), unsigned(largest.bit_length()), "amount")
    placed, lost = shift_right(m, wide, amount, largest)
    magnitude, rest = placed[-whole:], placed[:-whole]
    up = _rounds_up(magnitude, rest, lost, word)
    rounded = wire(m, magnitude + up, unsigned(whole + 1), "rounded")
    high, low = int(format.high), int(-format.low)
    positive = Mux(rounded > high, high, rounded)
    positive = Mux(beyond & x[-1], high, positive)
    if low == 0:
        return Mux(live.sign, 0, positive)[: format.bits]
    negative = positive if low == high else Mux(beyond | (rounded > low), low, rounded)
    negative = wire(m, negative, unsigned(format.bits), "negative")
    return Mux(live.sign, -negative, positive)[: format.bits]


def _logarithmic(m: Module, format: FloatFormat, live: Live) -> Value:
    """floor(log_r(mu |x|)), from the exponent and one comparison of the significand."""
    step = format.radix.bit_length() - 1
    fraction = live.significand[:-1]
    mu = format.multiplier
    assert mu is not None and 1 <= mu < 2
    threshold = -(-(2 / mu - 1) * (1 << len(fraction)) // 1)
    place = live.exponent - format.log2_shift + (fraction >= int(threshold))
    n = wire(m, place, signed(len(live.exponent) + 2), "place") >> (step.bit_length() - 1)
    field = wire(m, n + format.exponent_bias, signed(len(live.exponent) + 3), "field")
    top = (1 << format.exponent_bits) - 1
    none = ~live.significand[-1] | (field < 1)
    magnitude = Mux(none, 0, Mux(field > top, top, field))
    magnitude = wire(m, magnitude, unsigned(format.exponent_bits), "magnitude")
    return Cat(magnitude, live.sign & magnitude.any())


def _binary(m: Module, format: FloatFormat, live: Live, word: Value | None) -> Value:
    """Exponent field and mantissa as one integer, which rounding increases by one; it saturates."""
    mantissa, bias = format.mantissa_bits, format.exponent_bias
    x, keep = live.significand, format.mantissa_bits + 1
    field = wire(m, live.exponent + bias, signed(len(live.exponent) + 2), "field")
    small = field < 1
    distance = wire(m, Mux(small, 1 - field, 0), unsigned(len(field)), "distance")
    wide = Cat(Const(0, max(0, keep + RANDOM_BITS - len(x))), x)
    largest = keep + RANDOM_BITS
    amount = wire(m, Mux(distance > largest, largest, distance), unsigned(largest.bit_length()), "amount")
    placed, lost = shift_right(m, wide, amount, largest)
    kept, rest = placed[-keep:], placed[:-keep]
    up = _rounds_up(kept, rest, lost, word)
    base = wire(m, Mux(small, 0, field - 1), unsigned(len(field)), "base")
    code = wire(m, (base << mantissa) + kept + up, unsigned(len(field) + mantissa + 1), "code")
    width = format.exponent_bits + mantissa
    limit = _largest_code(format)
    magnitude = wire(m, Mux(code > limit, limit, code), unsigned(width), "magnitude")
    return Cat(magnitude, live.sign & magnitude.any())


def _binade_zero(m: Module, format: FloatFormat, live: Live) -> Value:
    """To the nearest of a format without subnormals, whose exponent field 0 is an ordinary binade but for zero."""
    mantissa, fraction = format.mantissa_bits, live.significand[:-1]
    field = wire(m, live.exponent + format.exponent_bias, signed(len(live.exponent) + 2), "field")
    kept, rest = fraction[-mantissa:], fraction[:-mantissa]
    up = _rounds_up(kept, rest, Const(0, 1), None)
    code = wire(m, (field << mantissa) + kept + up, signed(len(field) + mantissa + 1), "code")
    limit = _largest_code(format)
    body = Mux(code > limit, limit, Mux(code == 0, 1, code))
    next_below = (field == -1) & (fraction > 1 << len(rest))  # more than half of the smallest number
    magnitude = wire(m, Mux(field < 0, next_below, body), unsigned(format.exponent_bits + mantissa), "magnitude")
    magnitude = Mux(live.significand[-1], magnitude, 0)
    return Cat(magnitude, live.sign & magnitude.any())


def _largest_code(format: Format) -> int:
    return format.encode(format.max)


def xorshift(x: Value) -> Value:
    """The next state."""
    for shift in (13, -17, 5):
        x = (x ^ (x << shift if shift > 0 else x >> -shift))[:32]
    return x


def hadamard(unit: Hadamard, m: Module, stages: Stages, inputs: dict[str, Value]) -> dict[str, Value]:
    """Align, then four levels of butterflies."""
    f, bits = unit.float, unit.float.bits
    parts = [_read(f, inputs["x"][bits * k : bits * (k + 1)]) for k in range(16)]
    tops = [field for _, field, _ in parts]
    while len(tops) > 1:
        tops = [
            wire(m, Mux(a > b, a, b), unsigned(f.exponent_bits), "top")
            for a, b in zip(tops[::2], tops[1::2], strict=True)
        ]
    live = Live(exponent=tops[0])
    for k, (sign, field, significand) in enumerate(parts):
        distance = wire(m, tops[0] - field, unsigned(f.exponent_bits), "distance")
        amount = wire(
            m, Mux(distance > unit.window, unit.window, distance), unsigned(unit.window.bit_length()), "amount"
        )
        wide = Cat(Const(0, unit.window - f.precision), significand)
        shifted, _ = shift_right(m, wide, amount, unit.window)
        live[f"x{k}"] = wire(m, Mux(sign, -shifted, shifted), signed(unit.window + 1), "aligned")
    live = stages.cut("align", live)
    values = [live[f"x{k}"] for k in range(16)]
    for level in range(4):
        width, half = unit.window + 2 + level, 1 << level
        mixed = list(values)
        for k in range(16):
            a, b = values[k & ~half], values[k | half]
            mixed[k] = wire(m, a - b if k & half else a + b, signed(width), "sum")
        values = mixed
    return {"y": Cat(*values), "exponent": live.exponent}
