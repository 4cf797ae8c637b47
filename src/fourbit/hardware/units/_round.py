"""The end of every unit that makes floating-point numbers: normalise a sum, round it to nearest even, pack it.

The sum is in two's complement, S = -s 2^(W-1) + .... Its magnitude is needed, but no adder forms it: where S is negative its
bits are inverted, which leaves the magnitude one unit of the last place too small, and the rounding takes that into
account: what lies behind the guard bit is then all ones where it would be zero.
"""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Value, signed, unsigned

from fourbit.hardware._float import Float
from fourbit.hardware.units._bits import Live, Stages, leading_zeros, shift_left, wire


def normalise_and_round(m: Module, stages: Stages, live: Live, out: Float, signed_exponent: int) -> Value:
    """The code of (S + d) 2^(E + out.lsb), where 0 < d < 1 if `live.sticky`, else d = 0.

    Args:
        live: `total` S; `exponent` E, a Value or an int; `sticky`; `flip`, whether the result is negated; `nan`, `infinite`,
            None or a bit each; `sign`, of an infinite operand; `count`, the leading zeros of S or one less, if they are known.
        signed_exponent: bits that hold E and the exponents that follow from it.
    """
    p, mantissa = out.precision, out.mantissa_bits
    s = live.total
    if len(s) - 1 < p + 1:  # so that there is a guard bit
        pad = p + 2 - len(s)
        s = Cat(Const(0, pad), s)
        live.exponent = _minus(live.exponent, pad)
    width = len(s) - 1  # of the magnitude
    negative = s[-1]
    magnitude = wire(m, s[:-1] ^ negative.replicate(width), unsigned(width), "magnitude")
    anticipated = live.pop("count", None)
    if anticipated is None:
        count, none = leading_zeros(m, magnitude)
        count = wire(m, Mux(none, width - 1, count), unsigned(width.bit_length()), "count")  # -1 is all zeros inverted
    else:
        count, none = anticipated, ~magnitude.any()
    leading = wire(m, Value.cast(live.exponent) + (width - 1 - mantissa) - count, signed(signed_exponent), "leading")
    lowest = 1 if out.subnormals else 0
    shift = count
    subnormal = Const(0, 1)
    if out.subnormals:  # no further than to the lowest exponent
        subnormal = wire(m, leading < lowest, 1, "subnormal")
        room = wire(m, Value.cast(live.exponent) + (width - 1 - mantissa) - lowest, signed(signed_exponent), "room")
        shift = wire(m, Mux(subnormal, Mux(room < 0, 0, room), count), unsigned(width.bit_length()), "shift")
    live = Live(live, s=s[:-1], negative=negative, shift=shift, leading=leading, subnormal=subnormal)
    live.zero = wire(m, none & ~negative & ~Value.cast(live.sticky), 1, "zero")
    live.pop("total")
    live.pop("exponent")
    live = stages.cut("count", live)

    shifted = shift_left(m, live.s, live.shift, width - 1)
    shifted = wire(m, shifted ^ live.negative.replicate(width), unsigned(width), "normal")
    if anticipated is not None:
        again = ~shifted[-1]
        if out.subnormals:
            last = live.leading == lowest
            again, live.subnormal = again & ~live.subnormal & ~last, live.subnormal | (again & last)
        shifted = wire(m, Mux(again, Cat(live.negative, shifted[:-1]), shifted), unsigned(width), "normal")
        live.leading = wire(m, live.leading - again, signed(signed_exponent), "leading")
    live.significand, live.guard = shifted[-p:], shifted[-p - 1]
    rest = shifted[: width - p - 1]
    live.some = rest.any() if len(rest) else Const(0, 1)
    live.all = rest.all() if len(rest) else Const(1, 1)
    for name in ("s", "shift"):
        live.pop(name)
    live = stages.cut("normalise", live)

    significand, guard, negative, sticky = live.significand, live.guard, live.negative, Value.cast(live.sticky)
    odd = significand[0]
    up_positive = guard & (live.some | sticky | odd)
    up_negative = guard | (live.all & odd & ~sticky)
    up = wire(m, Mux(negative, up_negative, up_positive), 1, "up")
    field = live.leading - 1
    if out.subnormals:
        field = Mux(live.subnormal, lowest - 1, field)
    # The leading one adds one to the exponent; so does a carry out of the mantissa, and where inverting has moved the
    # leading one out of its place, all ones round up into it.
    code = wire(m, ((field << mantissa) + significand + up)[: out.bits + 1], signed(out.bits + 1), "code")
    tiny, huge = _range(m, out, live, code, signed_exponent)
    body = wire(m, code[: out.bits - 1], unsigned(out.bits - 1), "body")
    limit = out.largest if out.saturates else out.infinity
    body = Mux(huge, limit, body)
    if out.subnormals:
        pass  # zero and subnormals come out right by themselves
    elif out.flushes:  # all ones inverted are a power of two, one binade up
        power = negative & significand.all() & guard & live.all & ~sticky & (live.leading == 0)
        body = Mux(tiny & ~power, 0, body)
    else:
        above = significand[:mantissa]
        inexact = guard | live.some | sticky
        more = Mux(negative, above >= 1, (above > 1) | ((above == 1) & inexact))
        just_below = live.leading == -1
        body = Mux(tiny, just_below & more, Mux(code == 0, 1, body))
    body = Mux(live.zero, 0, body)
    sign = negative ^ live.flip
    if live.infinite is not None:
        body = Mux(live.infinite, out.infinity, body)
        sign = Mux(live.infinite, live.sign, sign)
    sign = sign & body.any()
    if live.nan is not None:
        assert out.nan is not None
        body, sign = Mux(live.nan, out.nan, body), Mux(live.nan, 0, sign)
    return Cat(body, sign)


def _range(m: Module, out: Float, live: Live, code: Value, signed_exponent: int) -> tuple[Value, Value]:
    """Whether the rounded number is below the binades that there are, or beyond the largest."""
    lowest = 1 if out.flushes else 0
    tiny = Const(0, 1) if out.subnormals else wire(m, live.leading < lowest, 1, "tiny")
    positive = ~live.leading[-1]
    over = positive & (live.leading > out.top)
    huge = wire(m, over | (positive & (code[: out.bits] > out.largest)), 1, "huge")
    return tiny, huge


def _minus(exponent: Value | int, amount: int) -> Value | int:
    return exponent - amount
