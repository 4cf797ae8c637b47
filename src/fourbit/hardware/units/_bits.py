"""Small circuits that units are made of: counting leading zeros, shifting with a sticky bit, pipeline registers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, unsigned


def wire(m: Module, value: Any, shape: Any = None, name: str | None = None) -> Signal:
    """A named wire that carries `value`."""
    value = Value.cast(value)
    signal = Signal(value.shape() if shape is None else shape, name=name or "w", reset_less=True)
    m.d.comb += signal.eq(value)
    return signal


def leading_zeros(m: Module, x: Value) -> tuple[Value, Value]:
    """Number of zeros above the highest one of `x`, and whether `x` is zero (then the number means nothing).

    A tree: the count of two halves is that of the upper half, or that of the lower half plus its length.
    """
    size = 1 << max(1, (len(x) - 1).bit_length())
    bits = list(reversed([*x])) + [Const(1, 1)] * (size - len(x))  # from the highest down
    nodes = [(Const(0, 0), ~bit) for bit in bits]
    while len(nodes) > 1:
        merged = []
        for (high, high_zero), (low, low_zero) in zip(nodes[::2], nodes[1::2], strict=True):
            count = Cat(Mux(high_zero, low, high), high_zero)
            merged.append((wire(m, count, unsigned(len(high) + 1), "lz"), wire(m, high_zero & low_zero, 1, "none")))
        nodes = merged
    (count, _), zero = nodes[0], ~x.any()
    return count, zero


def shift_left(m: Module, x: Value, amount: Value, largest: int) -> Value:
    """`x` shifted to the left by `amount` <= `largest`, what leaves is lost; as many bits as `x`."""
    for k in reversed(range(largest.bit_length())):
        x = wire(m, Mux(amount[k], Cat(Const(0, min(1 << k, len(x))), x)[: len(x)], x), unsigned(len(x)), "shl")
    return x


def shift_right(m: Module, x: Value, amount: Value, largest: int, fill: Value | None = None) -> tuple[Value, Value]:
    """`x` shifted to the right by `amount` <= `largest`, and whether a one was lost."""
    lost: Value = Const(0, 1)
    top = Const(0, 1) if fill is None else fill
    for k in range(largest.bit_length()):
        step = min(1 << k, len(x))
        lost = wire(m, lost | (amount[k] & x[:step].any()), 1, "lost")
        x = wire(m, Mux(amount[k], Cat(x[step:], top.replicate(step)), x), unsigned(len(x)), "shr")
    return x, lost


def total(values: Iterable[Value]) -> Value:
    """The sum, written as one chain, which synthesis turns into one carry-save tree."""
    result: Value | None = None
    for value in values:
        result = value if result is None else result + value
    return Const(0, 1) if result is None else result


def two_rows(m: Module, values: Iterable[Value], width: int) -> tuple[Value, Value]:
    """Two numbers whose sum is that of `values`, modulo 2^width, by full adders, earliest bits first."""
    columns: list[list[tuple[int, Value]]] = [[] for _ in range(width)]
    for value in values:
        value = Value.cast(value)
        top = value[-1] if value.shape().signed else None
        for k in range(width):
            bit = value[k] if k < len(value) else top
            if bit is not None:
                columns[k].append((0, bit))
    for k in range(width):
        column = columns[k]
        while len(column) > 2:
            column.sort(key=lambda entry: entry[0])
            (_, a), (_, b), (time, c) = column[:3]
            half = wire(m, a ^ b, 1, "half")
            column[:3] = [(time + 2, wire(m, half ^ c, 1, "sum"))]
            if k + 1 < width:
                columns[k + 1].append((time + 2, wire(m, (a & b) | (half & c), 1, "carry")))
    pairs = [[bit for _, bit in column] + [Const(0, 1)] * (2 - len(column)) for column in columns]
    return Cat(*(p[0] for p in pairs)), Cat(*(p[1] for p in pairs))


def anticipated_zeros(m: Module, x: Value, y: Value) -> Value:
    """How many bits below its sign the sum x + y (two's complement) has that equal the sign, or one less: found while it is
    being added. The highest two bits of the sum must be equal.

    Schmookler and Nowka, Leading zero anticipation and detection (ARITH 2001), for sums of both signs.
    """
    n = len(x)
    t = [a ^ b for a, b in zip(x, y, strict=True)]
    g = [a & b for a, b in zip(x, y, strict=True)]
    z = [~a & ~b for a, b in zip(x, y, strict=True)]
    f = []
    for k in range(n - 1):
        g_below, z_below = (g[k - 1], z[k - 1]) if k else (Const(0, 1), Const(1, 1))
        f.append(
            (t[k + 1] & ((g[k] & ~z_below) | (z[k] & ~g_below))) | (~t[k + 1] & ((z[k] & ~z_below) | (g[k] & ~g_below)))
        )
    count, none = leading_zeros(m, wire(m, Cat(*f), unsigned(n - 1), "indicator"))
    return wire(m, Mux(none, n - 2, count), unsigned((n - 1).bit_length()), "anticipated")


class Live(dict):
    """The values that are alive between two stages, by name."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class Stages:
    """Pipeline registers where they are wanted: `cut` passes all values that are alive through a register, or does nothing."""

    def __init__(self, m: Module, cuts: Iterable[str]):
        self.m, self.cuts = m, frozenset(cuts)

    def cut(self, name: str, live: Live) -> Live:
        """The values behind the stage `name`."""
        if name not in self.cuts:
            return live
        out = Live()
        for key, value in live.items():
            if value is None or isinstance(value, int):
                out[key] = value
                continue
            register = Signal(Value.cast(value).shape(), name=f"{name}_{key}", reset_less=True)
            self.m.d.sync += register.eq(value)
            out[key] = register
        return out
