"""Circuits of `InnerProduct`."""

from __future__ import annotations

from collections.abc import Callable

from amaranth.hdl import Cat, Const, Module, Mux, Value, signed, unsigned

from fourbit.formats import E8M0
from fourbit.hardware._converter import Converter
from fourbit.hardware._float import float_of
from fourbit.hardware._inner import InnerProduct
from fourbit.hardware.units._accumulate import add, align_addend
from fourbit.hardware.units._bits import Live, Stages, shift_right, total, wire
from fourbit.hardware.units._operand import read_fixed, read_float, read_magnitude
from fourbit.hardware.units._round import normalise_and_round

Inputs = dict[str, Value]


def _ways(unit: InnerProduct, inputs: Inputs) -> list[tuple[Value, Value]]:
    a, b = (f.bits for f in unit.operands)
    return [(inputs["a"][a * k : a * k + a], inputs["b"][b * k : b * k + b]) for k in range(unit.ways)]


def fixed_products(unit: InnerProduct, m: Module, inputs: Inputs) -> list[Value]:
    """Terms whose sum is that of the exact products, in units of 2^lsb: each product, inverted where it is negative, and a
    carry for each inversion."""
    assert unit.fixed is not None
    fixed_a, fixed_b = unit.fixed
    terms: list[Value] = []
    for a, b in _ways(unit, inputs):
        (sa, na, ha), (sb, nb, hb) = read_fixed(m, unit.operands[0], a), read_fixed(m, unit.operands[1], b)
        is_signed = fixed_a.signed or fixed_b.signed
        product = _times(sa, sb)
        width = unit.product_bits + is_signed
        largest = fixed_a.largest_shift * fixed_a.step + fixed_b.largest_shift * fixed_b.step
        if largest:
            dropped = sum(f.step for f in unit.fixed if f.shift_bits and f.significand_bits == 1)
            fill = product[-1] if is_signed else Const(0, 1)
            wide = Cat(product, fill.replicate(max(0, width + dropped - len(product))))
            for amount, f in ((ha, fixed_a), (hb, fixed_b)):
                if f.shift_bits:
                    wide = _shift(m, wide, amount, f.step)
            product = wide[dropped : dropped + width]
        else:
            product = product[:width]
        product = product.as_signed() if is_signed else product.as_unsigned()
        if fixed_a.signed + fixed_b.signed < 2 and (fixed_a.shift_bits or fixed_b.shift_bits):
            negative = na ^ nb
            inverted = product.as_unsigned() ^ negative.replicate(len(product))
            inverted = inverted if is_signed else Cat(inverted, negative)
            terms += [wire(m, inverted, signed(len(inverted)), "product"), negative]
        else:
            terms.append(product)
    return terms


def _shift(m: Module, x: Value, amount: Value, step: int) -> Value:
    """`x` times 2^(step amount); as many bits."""
    for k in reversed(range(len(amount))):
        places = min(step << k, len(x))
        x = wire(m, Mux(amount[k], Cat(Const(0, places), x)[: len(x)], x), unsigned(len(x)), "shifted")
    return x


def _times(a: Value, b: Value) -> Value:
    """A product; by a single bit it is a gate."""
    if len(a) == 1 and not a.shape().signed:
        a, b = b, a
    if len(b) == 1 and not b.shape().signed:
        return Mux(b, a, 0)[: len(a)].as_signed() if a.shape().signed else Mux(b, a, 0)[: len(a)]
    return a * b


def exact(unit: InnerProduct, m: Module, stages: Stages, inputs: Inputs) -> Value:
    """Products of short range; see `fourbit.hardware._inner`."""
    terms = fixed_products(unit, m, inputs)
    if isinstance(unit.accumulator, int):
        live = stages.cut("multiply", _sum_before_cut(unit, m, stages, terms))
        width = unit.accumulator
        return wire(m, total([inputs["c"].as_signed(), *live.values()]), unsigned(width), "y")
    out, width = unit.float, unit.magnitude_bits
    live = stages.cut("multiply", _sum_before_cut(unit, m, stages, terms))
    terms = list(live.values())
    live = Live({f"p{k}": t for k, t in enumerate(terms)}, c=inputs["c"])
    exponent = unit.lsb - out.lsb
    bits = max(out.exponent_bits, (abs(exponent) + width + out.precision + 4).bit_length()) + 2
    align_addend(m, live, out, width, 0, exponent, bits, drop=True)
    live.nan, live.infinite, live.sign = _only_addend(unit, live)
    live = stages.cut("align", live)
    add(m, live, [live.pop(f"p{k}") for k in range(len(terms))], 0, unit.anticipate)
    live.flip = Const(0, 1)
    live = stages.cut("add", live)
    return normalise_and_round(m, stages, live, out, bits)


def _sum_before_cut(unit: InnerProduct, m: Module, stages: Stages, terms: list[Value]) -> Live:
    """One number in front of a register, all of them where there is none: a single carry-save tree takes in the addend."""
    if "multiply" in stages.cuts:
        return Live(sum=wire(m, total(terms), signed(unit.sum_bits), "sum"))
    return Live({f"t{k}": t for k, t in enumerate(terms)})


def _only_addend(unit: InnerProduct, live: Live) -> tuple[Value | None, Value | None, Value | None]:
    out = unit.float
    nan, infinite, sign = live.pop("c_nan"), live.pop("c_infinite"), live.pop("c_sign")
    return (nan if out.nan is not None else None, *((infinite, sign) if out.specials == "ieee" else (None, None)))


def fused(unit: InnerProduct, m: Module, stages: Stages, inputs: Inputs) -> Value:
    """A fused multiply-add."""
    out = unit.float
    fa, fb = (float_of(f.name) for f in unit.operands)
    sa, ea, ma, nan_a, inf_a = read_float(m, fa, inputs["a"])
    sb, eb, mb, nan_b, inf_b = read_float(m, fb, inputs["b"])
    width = fa.precision + fb.precision
    offset = fa.lsb + fb.lsb - out.lsb
    bits = max(fa.exponent_bits, fb.exponent_bits, out.exponent_bits, abs(offset).bit_length()) + 3
    zero_a, zero_b = ~ma.any(), ~mb.any()
    live = Live(
        product=wire(m, ma * mb, unsigned(width), "product"),
        exponent=wire(m, ea + eb + offset, signed(bits), "exponent"),
        nothing=zero_a | zero_b,
        flip=sa ^ sb,
        nan_ab=nan_a | nan_b | (inf_a & zero_b) | (inf_b & zero_a),
        inf_ab=inf_a | inf_b,
    )
    live = stages.cut("multiply", live)
    live.c = inputs["c"]
    # The smallest product that is not sticky to the addend has this many bits; below it, places for the rounding.
    least = width - 2 if not (fa.subnormals or fb.subnormals) else min(fa.precision, fb.precision) - 1
    low = max(0, out.precision + 1 - least)
    exponent, nothing, flip = live.pop("exponent"), live.pop("nothing"), live.flip
    align_addend(m, live, out, width, low, exponent, bits, nothing, flip)
    nan, infinite, c_sign = live.pop("c_nan"), live.pop("c_infinite"), live.pop("c_sign")
    nan_ab, inf_ab = live.pop("nan_ab"), live.pop("inf_ab")
    if out.specials == "ieee":
        live.nan = nan | nan_ab | (inf_ab & infinite & (c_sign ^ flip))
        live.infinite, live.sign = inf_ab | infinite, Mux(infinite, c_sign, flip)
    else:
        live.nan, live.infinite, live.sign = (nan | nan_ab | inf_ab), None, None
    live = stages.cut("align", live)
    add(m, live, [live.pop("product")], low, unit.anticipate)
    live = stages.cut("add", live)
    return normalise_and_round(m, stages, live, out, bits)


def window(unit: InnerProduct, m: Module, stages: Stages, inputs: Inputs) -> Value:
    """Aligned to the largest exponent."""
    out, size = unit.float, unit.window
    live = Live()
    width, offset = unit._product_width, unit._offset
    bits = max(6, (out.top + out.precision).bit_length(), (2 * 31 + abs(offset) + width).bit_length()) + 2
    for k, (a, b) in enumerate(_ways(unit, inputs)):
        (sa, ea, ma), (sb, eb, mb) = (read_magnitude(m, f, x) for f, x in zip(unit.operands, (a, b), strict=True))
        live[f"m{k}"] = wire(m, ma * mb, unsigned(width), "product")
        live[f"s{k}"] = sa ^ sb
        nothing = ~ma.any() | ~mb.any()
        live[f"t{k}"] = wire(m, Mux(nothing, 0, ea + eb + (offset + width - 1)), signed(bits), "top")
    live.highest = _largest(m, [live[f"t{k}"] for k in range(unit.ways)])
    live = stages.cut("multiply", live)
    c_sign, c_field, c_significand, nan, infinite = read_float(m, out, inputs["c"])
    c_top = wire(m, c_field + (out.precision - 1), signed(bits), "top")
    highest = _largest(m, [live.pop("highest"), c_top])
    terms: list[tuple[Value, Value, Value]] = [(c_significand, c_top, c_sign)]
    terms += [(live.pop(f"m{k}"), live.pop(f"t{k}"), live.pop(f"s{k}")) for k in range(unit.ways)]
    for k, (magnitude, place, sign) in enumerate(terms):
        distance = wire(m, highest - place, unsigned(bits), "distance")
        amount = wire(m, Mux(distance > size, size, distance), unsigned(size.bit_length()), "amount")
        wide = Cat(Const(0, size - len(magnitude)), magnitude) if size >= len(magnitude) else magnitude[-size:]
        shifted, _ = shift_right(m, wide, amount, size)
        live[f"a{k}"] = wire(m, Cat(shifted ^ sign.replicate(size), sign), signed(size + 1), "aligned")
        live[f"s{k}"] = sign
    live.exponent = wire(m, highest - (size - 1), signed(bits), "exponent")
    live.nan = nan if out.nan is not None else None
    live.infinite, live.sign = (infinite, c_sign) if out.specials == "ieee" else (None, None)
    live = stages.cut("align", live)
    total_bits = size + len(terms).bit_length() + 1
    parts = [live.pop(f"{name}{k}") for name in "as" for k in range(len(terms))]
    live.total = wire(m, total(parts), unsigned(total_bits), "total")
    live.sticky, live.flip = Const(0, 1), Const(0, 1)
    live = stages.cut("add", live)
    return normalise_and_round(m, stages, live, out, bits)


def _largest(m: Module, values: list[Value]) -> Value:
    while len(values) > 1:
        pairs = [
            wire(m, Mux(a > b, a, b), a.shape(), "largest") for a, b in zip(values[::2], values[1::2], strict=False)
        ]
        values = pairs + ([values[-1]] if len(values) % 2 else [])
    return values[0]


def block(unit: InnerProduct, m: Module, stages: Stages, inputs: Inputs) -> Value:
    """Products of a block, times both scales."""
    out, scale = unit.float, unit.scale
    assert scale is not None
    p = wire(m, total(fixed_products(unit, m, inputs)), signed(unit.sum_bits), "sum")
    x, y = inputs["a_scale"], inputs["b_scale"]
    if scale == E8M0:
        exponent, offset = x + y, 2 * -E8M0.exponent_bias + unit.lsb - out.lsb
        nan, width, product = x.all() | y.all(), unit.magnitude_bits, p
    else:
        f = float_of(scale.name)
        (_, ex, mx, nan_x, _), (_, ey, my, nan_y, _) = (read_float(m, f, Cat(s, Const(0, 1))) for s in (x, y))
        exponent, offset, nan = ex + ey, 2 * f.lsb + unit.lsb - out.lsb, nan_x | nan_y
        width = unit.magnitude_bits + 2 * f.precision
        product = wire(m, p * wire(m, mx * my, unsigned(2 * f.precision), "scales"), signed(width + 1), "product")
    bits = max(out.exponent_bits, len(exponent), (abs(offset) + width + out.precision + 4).bit_length()) + 2
    live = Live(product=product, exponent=wire(m, exponent + offset, signed(bits), "exponent"), scale_nan=nan)
    live.nothing = ~product.any()
    live = stages.cut("multiply", live)
    live.c = inputs["c"]
    low = out.precision + 1
    align_addend(m, live, out, width, low, live.pop("exponent"), bits, live.pop("nothing"))
    nan, infinite, sign = _only_addend(unit, live)
    assert nan is not None
    live.nan, live.infinite, live.sign = nan | live.pop("scale_nan"), infinite, sign
    live = stages.cut("align", live)
    add(m, live, [live.pop("product")], low, unit.anticipate)
    live.flip = Const(0, 1)
    live = stages.cut("add", live)
    return normalise_and_round(m, stages, live, out, bits)


BUILD: dict[str, Callable[[InnerProduct, Module, Stages, Inputs], Value]] = {
    "exact": exact,
    "fused": fused,
    "window": window,
    "block": block,
}


def convert(unit: Converter, m: Module, stages: Stages, inputs: Inputs) -> Value:
    """A number in two's complement as floating point."""
    out = float_of(unit.target)
    live = Live(total=inputs["x"], exponent=unit.lsb - out.lsb, sticky=Const(0, 1), flip=Const(0, 1))
    live.nan = live.infinite = live.sign = None
    bits = max(out.exponent_bits, (abs(unit.lsb - out.lsb) + unit.width + out.precision).bit_length()) + 2
    return normalise_and_round(m, stages, live, out, bits)
