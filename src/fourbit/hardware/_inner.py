"""Inner products: y = c + sum of a_i b_i over the ways of a unit, in floating point or in a wide fixed-point register.

exact   every product of short-range operands (integers, FP4) is a whole number of one unit. The sum with the addend is
        rounded once, exactly, provided the addend is itself a multiple of that unit, as every partial sum of such
        products is: what its magnitude has below that is dropped.
fused   one floating-point product and the addend, rounded once: a fused multiply-add.
window  floating-point products of several ways: all products and the addend are aligned to the largest of their
        exponents; of each magnitude, what lies below a window of `window` bits is dropped. The sum is rounded once.
block   E2M1 products times the scales of their blocks (E8M0 of MXFP4, E4M3 of NVFP4) and the addend, rounded once.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from fourbit.errors import UserError
from fourbit.formats import E8M0, FloatFormat, Format, IntFormat
from fourbit.hardware._fixed import FixedOperand, fixed_operand
from fourbit.hardware._float import FLOATS, Float, float_of
from fourbit.hardware._unit import Bits, Unit

Style = Literal["exact", "fused", "window", "block"]


@dataclass(frozen=True)
class InnerProduct(Unit):
    """A unit of `ways` products of a number of the format `a` with one of the format `b`.

    Args:
        a, b: formats of the operands; in floating point also "float32" and the other names of `fourbit.hardware.FLOATS`.
        ways: products per cycle.
        accumulator: a floating-point format, or the width of a fixed-point register.
        window: bits of the window of aligned sums.
        scale: format of a scale per operand that all ways share.
        anticipate: find the leading zeros of the sum while it is being added.
    """

    a: Format | None = None
    b: Format | None = None
    ways: int = 1
    accumulator: str | int = "fp16_169"
    window: int = 14
    scale: Format | None = None
    anticipate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.ways <= 64:
            raise UserError(f"unit {self.name} has {self.ways} ways: choose 1 to 64.")
        for format in self.operands if self.fixed is None else ():
            if isinstance(format, FloatFormat):
                float_of(format.name)
        if isinstance(self.accumulator, int) and (self.style != "exact" or self.accumulator < self.sum_bits):
            raise UserError(
                f"unit {self.name} cannot add into {self.accumulator} fixed-point bits: its sums need {self.sum_bits}, "
                "and its products a short range."
            )

    @property
    def operands(self) -> tuple[Format, Format]:
        """a and b."""
        assert self.a is not None and self.b is not None
        return self.a, self.b

    @property
    def fixed(self) -> tuple[FixedOperand, FixedOperand] | None:
        """The operands as short-range numbers, if both are."""
        a, b = (fixed_operand(f) for f in self.operands)
        return None if a is None or b is None else (a, b)

    @property
    def style(self) -> Style:
        """How it adds, see above."""
        if self.scale is not None:
            return "block"
        if self.fixed is not None:
            return "exact"
        return "fused" if self.ways == 1 else "window"

    @property
    def lsb(self) -> int:
        """log2 of the unit that all products are a multiple of (before the scales of blocks)."""
        assert self.fixed is not None
        return self.fixed[0].lsb + self.fixed[1].lsb

    @property
    def product_bits(self) -> int:
        """Bits of the largest magnitude of a product, in that unit."""
        assert self.fixed is not None
        return (self.fixed[0].magnitude * self.fixed[1].magnitude).bit_length()

    @property
    def magnitude_bits(self) -> int:
        """Bits of the largest magnitude of the sum of the products of one cycle."""
        assert self.fixed is not None
        return (self.ways * self.fixed[0].magnitude * self.fixed[1].magnitude).bit_length()

    @property
    def sum_bits(self) -> int:
        """Bits of that sum in two's complement."""
        return self.magnitude_bits + 1

    @property
    def float(self) -> Float:
        """The accumulator, where it is floating point."""
        assert isinstance(self.accumulator, str)
        return float_of(self.accumulator)

    @property
    def macs(self) -> int:
        """One per way."""
        return self.ways

    @property
    def stages(self) -> tuple[str, ...]:
        """Where the pipeline can be cut."""
        if isinstance(self.accumulator, int):
            return ("multiply",)
        return ("multiply", "align", "add", "count", "normalise")

    @property
    def inputs(self) -> dict[str, int]:
        """Codes of all ways side by side, the first in the lowest bits; the addend; the scales."""
        a, b = self.operands
        width = self.accumulator if isinstance(self.accumulator, int) else self.float.bits
        scales = {} if self.scale is None else dict.fromkeys(_SCALES, self.scale.bits - self.scale.signed)
        return {"a": a.bits * self.ways, "b": b.bits * self.ways, **scales, "c": width}

    @property
    def outputs(self) -> dict[str, int]:
        """The sum."""
        return {"y": self.inputs["c"]}

    @property
    def late(self) -> dict[str, str]:
        """The addend, which comes from the unit before in a chain, is needed only when there are products."""
        return {"c": "multiply"}

    # What it must compute

    def _codes(self, inputs: Bits) -> list[tuple[int, int]]:
        """The codes of both operands of each way."""
        a, b = (f.bits for f in self.operands)
        words = inputs["a"], inputs["b"]
        return [(words[0] >> a * k & (1 << a) - 1, words[1] >> b * k & (1 << b) - 1) for k in range(self.ways)]

    def reference(self, inputs: Bits) -> dict[str, int]:
        """The sum of exact products, rounded once; for "window", of what the window leaves of them."""
        (a, b), codes = self.operands, self._codes(inputs)
        if isinstance(self.accumulator, int):
            products = sum(int(a.values[i] * b.values[j] / 2.0**self.lsb) for i, j in codes)
            return {"y": (inputs["c"] + products) % (1 << self.accumulator)}
        out = self.float
        special = self._special(codes, inputs)
        if special is not None:
            return {"y": special}
        c = out.value(inputs["c"])
        products = [_value(a, i) * _value(b, j) for i, j in codes]
        if self.style == "window":
            return {"y": out.encode(self._windowed(products, codes, c))}
        scale = Fraction(1)
        if self.scale is not None:
            scale = Fraction(self.scale.values[inputs["a_scale"]]) * Fraction(self.scale.values[inputs["b_scale"]])
        if self.style == "exact":
            unit = Fraction(2) ** self.lsb
            c = int(c / unit) * unit
        return {"y": out.encode(c + scale * sum(products, Fraction(0)))}

    def _special(self, codes: list[tuple[int, int]], inputs: Bits) -> int | None:
        """The code of NaN or infinity, where operands are or make such."""
        out = self.float
        infinities: list[int] = []
        if self.scale is not None and any(
            self.scale.values[inputs[k]] != self.scale.values[inputs[k]] for k in _SCALES
        ):
            return out.nan
        if self.style == "fused":
            a, b = (float_of(f.name) for f in self.operands)
            (i, j), *_ = codes
            for f, code in ((a, i), (b, j)):
                if (not f.is_finite(code) and (code & ~(1 << (f.bits - 1))) != f.infinity) or f.is_nan(code):
                    return out.nan
            if not a.is_finite(i) or not b.is_finite(j):
                other = (b, j) if not a.is_finite(i) else (a, i)
                if other[0].is_finite(other[1]) and other[0].value(other[1]) == 0:
                    return out.nan
                infinities.append((i >> (a.bits - 1)) ^ (j >> (b.bits - 1)))
        if not out.is_finite(inputs["c"]):
            if out.is_nan(inputs["c"]):
                return out.nan
            infinities.append(inputs["c"] >> (out.bits - 1))
        if not infinities:
            return None
        if len(set(infinities)) > 1:
            return out.nan
        return out.infinity | infinities[0] << (out.bits - 1)

    def _windowed(self, products: list[Fraction], codes: list[tuple[int, int]], c: Fraction) -> Fraction:
        out, (a, b) = self.float, self.operands
        tops = [
            _field(a, i) + _field(b, j) + self._offset + self._product_width - 1 if p else 0
            for p, (i, j) in zip(products, codes, strict=True)
        ]
        tops.append(out.field(out.encode(c)) + out.precision - 1)
        unit = Fraction(2) ** (max(tops) - (self.window - 1) + out.lsb)
        kept = [abs(x) // unit * (1 if x >= 0 else -1) for x in (*products, c)]
        return sum(kept) * unit

    @property
    def _product_width(self) -> int:
        return sum(significand_bits(f) for f in self.operands)

    @property
    def _offset(self) -> int:
        """Exponent field of the accumulator at which its last place is that of a product with both fields 0."""
        return sum(last_place(f) for f in self.operands) - self.float.lsb

    def vectors(self, rng: random.Random, count: int) -> list[dict[str, int]]:
        """Random codes; addends near the negative sum, of all sizes, and, in part, any code at all."""
        found = []
        widths = self.inputs
        for _ in range(count):
            v = {name: rng.getrandbits(width) for name, width in widths.items()}
            a, b = self.operands
            for name, format in (("a", a), ("b", b)):
                codes = [self._code(rng, format) for _ in range(self.ways)]
                v[name] = sum(code << (format.bits * k) for k, code in enumerate(codes))
            if self.scale is not None and rng.random() < 0.9:
                v["a_scale"], v["b_scale"] = (self._scale_code(rng) for _ in range(2))
            v["c"] = self._addend(rng, v)
            if self.style == "fused" and rng.random() < 0.2:
                v = self._tie(rng) if rng.random() < 0.5 else self._tiny(rng)
            found.append(v)
        return found

    def _tie(self, rng: random.Random) -> dict[str, int]:
        """A product with as many places as the sum has and half a place more, and an addend far below it or none: what rounds
        up, down, or to even."""
        (f, g), out = (float_of(format.name) for format in self.operands), self.float
        a = Fraction(rng.getrandbits(f.mantissa_bits) | 1 << f.mantissa_bits, 1 << f.mantissa_bits)
        low = out.precision + 2
        c = Fraction(rng.choice((-1, 0, 1))) * Fraction(2) ** -rng.randint(low, max(low, out.bias - 2))
        sign = rng.choice((-1, 1))
        return {"a": f.encode(sign * a), "b": g.encode(Fraction(3, 2)), "c": out.encode(c)}

    def _tiny(self, rng: random.Random) -> dict[str, int]:
        """A product about the smallest number of the sum, and an addend of its size or none."""
        (f, g), out = (float_of(format.name) for format in self.operands), self.float

        def significand(format: Float) -> Fraction:
            bits = rng.getrandbits(format.mantissa_bits) if rng.random() < 0.7 else 0
            return 1 + Fraction(bits, 1 << format.mantissa_bits)

        room = f.bias - 2
        x = rng.randint(-room, 0)
        y = min(max(-out.bias + rng.randint(-3, 2) - x, -room), room)
        sign = rng.choice((-1, 1))
        c = rng.choice((0, 0, 1, 2, 3, 1 << out.mantissa_bits, (1 << out.mantissa_bits) + 1))
        c |= rng.getrandbits(1) << (out.bits - 1)
        a, b = sign * significand(f) * Fraction(2) ** x, significand(g) * Fraction(2) ** y
        return {"a": f.encode(a), "b": g.encode(b), "c": c}

    def _code(self, rng: random.Random, format: Format) -> int:
        while True:
            code = rng.getrandbits(format.bits)
            if self.style == "fused" or format.values[code] == format.values[code]:
                return 0 if rng.random() < 0.05 else code

    def _scale_code(self, rng: random.Random) -> int:
        return rng.randint(120, 134) if self.scale == E8M0 else rng.randint(8, 126)

    def _addend(self, rng: random.Random, v: dict[str, int]) -> int:
        if isinstance(self.accumulator, int):
            half = 1 << (self.accumulator - 1)
            room = half - (1 << self.magnitude_bits)
            return rng.randint(-room, room) % (1 << self.accumulator) if room > 0 else 0
        out = self.float
        kind = rng.random()
        y = Fraction(0)
        if self._special(self._codes(v), {**v, "c": 0}) is None:
            code = self.reference({**v, "c": 0})["y"]
            y = out.value(code) if out.is_finite(code) else y
        if kind < 0.05:  # what is left is about the smallest number
            left = Fraction(2) ** (rng.randint(-2, 3) - out.bias)
            return out.encode(self._multiple(-y + rng.choice((-1, 1)) * left))
        if kind < 0.35 and y:  # cancellation
            near = -y * (1 + Fraction(rng.randint(-3, 3), 1 << rng.randint(1, out.precision + 2)))
            return out.encode(self._multiple(near))
        if kind < 0.9 or self.style == "exact":
            near = Fraction(rng.randint(-(1 << out.precision), 1 << out.precision), 1 << rng.randint(0, out.precision))
            reach = 2 * out.precision + 6
            size = abs(y) if y else Fraction(2) ** (self.lsb if self.fixed else 0)
            return out.encode(self._multiple(near * size * Fraction(2) ** rng.randint(-reach, reach)))
        return rng.getrandbits(out.bits)

    def _multiple(self, x: Fraction) -> Fraction:
        if self.style != "exact":
            return x
        unit = Fraction(2) ** self.lsb
        return round(x / unit) * unit


_SCALES = ("a_scale", "b_scale")


def significand_bits(format: Format) -> int:
    """Width of the magnitude of a significand in an aligned sum."""
    if isinstance(format, IntFormat):
        return format.bits - (format.signed and format.low > -(1 << (format.bits - 1)))
    assert isinstance(format, FloatFormat)
    return format.mantissa_bits + 1


def last_place(format: Format) -> int:
    """log2 of the last place at exponent field 0."""
    return 0 if isinstance(format, IntFormat) else float_of(format.name).lsb


def _field(format: Format, code: int) -> int:
    """The exponent field as an aligned sum reads it."""
    if isinstance(format, IntFormat):
        return 0
    return float_of(format.name).field(code)


def _value(format: Format, code: int) -> Fraction:
    if format.name in FLOATS:
        return FLOATS[format.name].value(code)
    return Fraction(format.values[code])
