"""Quantizers as circuits: from the numbers of the accumulator (FP16) to the operands of the next GEMM.

    integers        round(x s) within a range: PACT's activations (s = 15 / alpha), SAWB's weights (s = 7 / alpha)
    radix 4, FP4    both phases of the same gradient, and what GradScale's vote needs. Multiplying by 1.6 and truncating the
                    exponent comes down to one comparison: floor(log4(1.6 x)) is the half of floor(log2(x)), one more where
                    the significand of x is at least 2 / 1.6 = 1.25, which is an OR of its two highest fraction bits
    binary formats  nearest (ties to even) or stochastic, where x lies between two neighbours and goes up if a random number
                    is below the fraction of the way; with [1,3,0] that is LUQ's logarithmic rounding and underflow

NaN and infinity count as numbers beyond the range, so that the scale goes down.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from fourbit.errors import UserError
from fourbit.formats import FloatFormat, Format, IntFormat
from fourbit.hardware._float import Float, float_of
from fourbit.hardware._unit import RANDOM_BITS, Bits, Unit

Scale = Literal["power", "float"]
POWER_BITS = 6
"""Of the exponent of a scale that is a power of two, in two's complement."""


@dataclass(frozen=True)
class Quantizer(Unit):
    """One number per cycle, in one format or in several at once.

    Args:
        targets: formats; more than one only for radix 4 (the phases).
        scale: "power": x is multiplied by 2^s, which adds to its exponent; "float": by a number of the source's format.
        source: format of x.
        stochastic: round stochastically; else to the nearest.
    """

    targets: tuple[Format, ...] = ()
    scale: Scale = "power"
    source: str = "fp16_169"
    stochastic: bool = False

    def __post_init__(self) -> None:
        logarithmic = [isinstance(f, FloatFormat) and f.radix != 2 for f in self.targets]
        if not self.targets or (len(self.targets) > 1 and not all(logarithmic)):
            raise UserError(f"unit {self.name} needs one target, or several of radix 4.")
        if any(isinstance(f, FloatFormat) and f.radix not in (2, 4, 16) for f in self.targets):
            raise UserError(f"unit {self.name}: quantizers have a radix of 2, 4 or 16.")
        if any(logarithmic) and self.stochastic:
            raise UserError(f"unit {self.name}: only binary formats and integers are rounded stochastically.")
        if self.stochastic and any(
            isinstance(f, FloatFormat) and f.mantissa_bits and not f.subnormals for f in self.targets
        ):
            raise UserError(f"unit {self.name}: stochastic rounding needs a format with subnormals.")

    @property
    def float(self) -> Float:
        """Of x."""
        return float_of(self.source)

    @property
    def stages(self) -> tuple[str, ...]:
        """Behind the scaling."""
        return ("scale",)

    @property
    def late(self) -> dict[str, str]:
        """The random number is needed behind the scaling."""
        return {"random": "scale"} if self.stochastic else {}

    @property
    def inputs(self) -> dict[str, int]:
        """x, the scale s, and a random number."""
        scale = POWER_BITS if self.scale == "power" else self.float.bits
        return {"x": self.float.bits, "s": scale, **({"random": RANDOM_BITS} if self.stochastic else {})}

    @property
    def outputs(self) -> dict[str, int]:
        """A code per target; for several, whether |x s| is beyond the first one's range (`over`), or above half of it."""
        codes = {f.name: f.bits for f in self.targets}
        return codes | ({"over": 1, "high": 1} if len(self.targets) > 1 else {})

    def scaled(self, inputs: Bits) -> tuple[Fraction, bool]:
        """|x s| and whether it is negative; what is no number counts as one with the next larger significand."""
        f = self.float

        def read(code: int) -> tuple[Fraction, bool]:
            sign, field, fraction = f.split(code)
            if field == 0 and fraction == 0:
                return Fraction(0), bool(sign)
            return Fraction(fraction + (1 << f.mantissa_bits)) * Fraction(2) ** (field + f.lsb), bool(sign)

        x, negative = read(inputs["x"])
        if self.scale == "power":
            s = inputs["s"] - (inputs["s"] >> (POWER_BITS - 1) << POWER_BITS)
            return x * Fraction(2) ** s, negative
        factor, flip = read(inputs["s"])
        return x * factor, negative != flip

    def reference(self, inputs: Bits) -> dict[str, int]:
        """Of the exact product."""
        x, negative = self.scaled(inputs)
        found = {f.name: self._round(f, x, negative, inputs.get("random", 0)) for f in self.targets}
        if len(self.targets) > 1:
            largest = Fraction(self.targets[0].max)
            found |= {"over": int(x > largest), "high": int(x > largest / 2)}
        return found

    def _round(self, format: Format, x: Fraction, negative: bool, word: int) -> int:
        sign = -1 if negative else 1
        if isinstance(format, IntFormat):
            whole = round(x) if not self.stochastic else _up(x, Fraction(x // 1), Fraction(1), word)
            return int(min(max(sign * whole, format.low), format.high)) % (1 << format.bits)
        if self.stochastic:
            x = min(x, Fraction(format.max))
            below, above = (Fraction(v) for v in format.neighbors(float(x)))
            return format.encode(float(sign * (_up(x, below, above - below, word) if above > below else below)))
        return format.encode(sign * format.round(float(x)))

    def vectors(self, rng: random.Random, count: int) -> list[dict[str, int]]:
        """Numbers of all sizes around the range, and close to decision points."""
        f, found = self.float, []
        points = [p for t in self.targets for p in t.decision_points if p > 0]
        for _ in range(count):
            v = {name: rng.getrandbits(width) for name, width in self.inputs.items()}
            if rng.random() < 0.9:
                if self.scale == "power":
                    s = rng.randint(-8, 8)
                    v["s"], factor = s % (1 << POWER_BITS), Fraction(2) ** s
                else:
                    v["s"] = f.encode(Fraction(rng.randint(512, 1023), 512) * Fraction(2) ** rng.randint(-9, 9))
                    factor = f.value(v["s"])
                if rng.random() < 0.3:
                    near = Fraction(rng.choice(points)) / factor * (1 + Fraction(rng.randint(-2, 2), 1024))
                else:
                    near = Fraction(rng.randint(512, 1023), 512) * Fraction(2) ** rng.randint(-14, 9) / factor
                v["x"] = f.encode(near * rng.choice((-1, 1)))
            found.append(v)
        return found


def _up(x: Fraction, below: Fraction, step: Fraction, word: int) -> Fraction:
    """Stochastically to `below` or to the number above it."""
    return below + step * (word < (x - below) / step * (1 << RANDOM_BITS) // 1)


@dataclass(frozen=True)
class RandomSource(Unit):
    """One step of Marsaglia's xorshift with 32 bits (shifts 13, 17, 5): 32 random bits per cycle; the state's registers are
    not part of it."""

    @property
    def inputs(self) -> dict[str, int]:
        """The state."""
        return {"state": 32}

    @property
    def outputs(self) -> dict[str, int]:
        """The next one."""
        return {"next": 32}

    def reference(self, inputs: Bits) -> dict[str, int]:
        """The recurrence."""
        x = inputs["state"]
        x ^= x << 13 & 0xFFFFFFFF
        x ^= x >> 17
        return {"next": x ^ x << 5 & 0xFFFFFFFF}

    def vectors(self, rng: random.Random, count: int) -> list[dict[str, int]]:
        """Random states."""
        return [{"state": rng.getrandbits(32)} for _ in range(count)]


@dataclass(frozen=True)
class Hadamard(Unit):
    """y = H x of 16 numbers, H of +1 and -1: the rotation that NVFP4 recipes put before the quantizer of gradients.

    The numbers are aligned to the largest of their exponents; of each magnitude, what lies below `window` bits is dropped.
    The sums are exact and leave as integers y of 2^(exponent + lsb of the format), so that the quantizer behind it need not
    unpack floating point.
    """

    window: int = 11
    source: str = "fp16_169"

    @property
    def float(self) -> Float:
        """Of the numbers."""
        return float_of(self.source)

    @property
    def stages(self) -> tuple[str, ...]:
        """Behind the alignment."""
        return ("align",)

    @property
    def inputs(self) -> dict[str, int]:
        """16 codes, the first in the lowest bits."""
        return {"x": 16 * self.float.bits}

    @property
    def width(self) -> int:
        """Of a sum."""
        return self.window + 5

    @property
    def outputs(self) -> dict[str, int]:
        """16 sums in two's complement, and their exponent."""
        return {"y": 16 * self.width, "exponent": self.float.exponent_bits}

    def reference(self, inputs: Bits) -> dict[str, int]:
        """The matrix, entry by entry."""
        f, bits = self.float, self.float.bits
        parts = [f.split(inputs["x"] >> bits * k & (1 << bits) - 1) for k in range(16)]
        top = max(e for _, e, _ in parts)
        aligned = []
        for sign, e, fraction in parts:
            magnitude = 0 if e == fraction == 0 else fraction + (1 << f.mantissa_bits)
            shifted = magnitude << (self.window - f.precision) >> (top - e)
            aligned.append(-shifted if sign else shifted)
        rows = [sum((-1) ** (i & j).bit_count() * x for j, x in enumerate(aligned)) for i in range(16)]
        word = sum(y % (1 << self.width) << self.width * i for i, y in enumerate(rows))
        return {"y": word, "exponent": top}

    def vectors(self, rng: random.Random, count: int) -> list[dict[str, int]]:
        """Numbers of similar size, in part any code."""
        f, found = self.float, []
        for _ in range(count):
            middle, spread = rng.randint(8, f.top - 8), rng.choice((1, 3, 7, 40))
            x = 0
            for k in range(16):
                e = min(max(middle + rng.randint(-spread, spread), 0), f.top)
                code = (rng.getrandbits(1) << f.exponent_bits | e) << f.mantissa_bits | rng.getrandbits(f.mantissa_bits)
                x |= (0 if rng.random() < 0.05 else code) << f.bits * k
            found.append({"x": x})
        return found


@dataclass(frozen=True)
class Register(Unit):
    """Flip-flops alone, for what a unit leaves to its surroundings: the accumulator, the state of a random source."""

    width: int = 16

    @property
    def stages(self) -> tuple[str, ...]:
        """The only one."""
        return ("hold",)

    @property
    def inputs(self) -> dict[str, int]:
        """One word."""
        return {"x": self.width}

    @property
    def outputs(self) -> dict[str, int]:
        """The same, a cycle later where `cuts` is ("hold",)."""
        return {"y": self.width}

    def reference(self, inputs: Bits) -> dict[str, int]:
        """The same."""
        return {"y": inputs["x"]}

    def vectors(self, rng: random.Random, count: int) -> list[dict[str, int]]:
        """Random words."""
        return [{"x": rng.getrandbits(self.width)} for _ in range(count)]
