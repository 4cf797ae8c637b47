"""The sum of products and a floating-point addend, exactly, before it is rounded.

    word     | addend at its highest | 2 | products, W bits | low |
                                          ^ 2^exponent

The products stay where they are; the addend is shifted to the right from the highest place that can matter. Where it is
even larger, the products are less than a quarter of its last place and only decide the rounding, so the shift stops there
and the exponent follows the addend.
"""

from __future__ import annotations

from collections.abc import Sequence

from amaranth.hdl import Cat, Const, Module, Mux, Value, signed, unsigned

from fourbit.hardware._float import Float
from fourbit.hardware.units._bits import Live, anticipated_zeros, shift_right, total, two_rows, wire
from fourbit.hardware.units._operand import read_float


def align_addend(
    m: Module,
    live: Live,
    addend: Float,
    width: int,
    low: int,
    exponent: Value | int,
    signed_exponent: int,
    nothing: Value | None = None,
    flip: Value | None = None,
    drop: bool = False,
) -> None:
    """Read the addend `live.c` and put it into its place.

    Args:
        width, low: W, and the places below the products.
        exponent: of the products' last place, in units of the addend's exponent field.
        nothing: whether the products are zero, where that does not follow from their places.
        flip: the products' sign, which the sum then has from the beginning.
        drop: what lies below the lowest place is known to be zero.
    """
    sign, field, significand, live.c_nan, live.c_infinite = read_float(m, addend, live.c)
    live.pop("c")
    live.c_sign = sign
    p = addend.precision
    highest = low + width + 2
    size = highest + p
    start = Value.cast(exponent) + (width + 2)  # field of an addend that stands highest
    distance = wire(m, start - field, signed(signed_exponent), "distance")
    stop = distance[-1] if nothing is None else distance[-1] | nothing
    stop = wire(m, stop, 1, "stop")
    largest = size
    amount = Mux(stop, 0, Mux(distance > largest, largest, distance))
    amount = wire(m, amount, unsigned(largest.bit_length()), "amount")
    placed, lost = shift_right(m, Cat(Const(0, highest), significand), amount, largest)
    lost = Const(0, 1) if drop else lost
    effective = sign if flip is None else sign ^ flip
    live.addend = wire(m, placed ^ effective.replicate(size), unsigned(size), "addend")
    live.carry = wire(m, effective & ~lost, 1, "carry")
    live.effective, live.sticky = effective, lost
    live.exponent = wire(m, Mux(stop, field - highest, Value.cast(exponent) - low), signed(signed_exponent), "exponent")


def add(m: Module, live: Live, terms: Sequence[Value], low: int, anticipate: bool = False) -> None:
    """`live.total`: terms, shifted to their place, and the addend; `live.count`: its leading zeros, or one less, or None."""
    size = len(live.addend) + 1 + anticipate  # which needs a second sign bit
    aligned = Cat(live.addend, live.effective).as_signed()
    shifted = [Cat(Const(0, low), t).as_signed() if t.shape().signed else Cat(Const(0, low), t) for t in terms]
    addends = [aligned, *shifted, live.carry]
    live.count = None
    if anticipate:
        x, y = two_rows(m, addends, size)
        addends, live.count = [x, y], anticipated_zeros(m, x, y)
    live.total = wire(m, total(addends), unsigned(size), "total")
    for name in ("addend", "carry", "effective"):
        live.pop(name)
