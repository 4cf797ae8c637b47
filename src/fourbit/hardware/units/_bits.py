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
