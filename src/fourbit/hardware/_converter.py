"""From the fixed-point register of an inner product to floating point: one such circuit can serve many units."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction

from fourbit.hardware._float import float_of
from fourbit.hardware._unit import Bits, Unit


@dataclass(frozen=True)
class Converter(Unit):
    """Rounds a number in two's complement to the nearest of a format, ties to even.

    Args:
        width: of the register.
        lsb: log2 of its last place.
        target: name of the floating-point format.
    """

    width: int = 28
    lsb: int = 0
    target: str = "fp16_169"

    @property
    def stages(self) -> tuple[str, ...]:
        """Where the pipeline can be cut."""
        return ("count", "normalise")

    @property
    def inputs(self) -> dict[str, int]:
        """The register."""
        return {"x": self.width}

    @property
    def outputs(self) -> dict[str, int]:
        """The code."""
        return {"y": float_of(self.target).bits}

    def reference(self, inputs: Bits) -> dict[str, int]:
        """Rounded exactly."""
        x = inputs["x"]
        x -= (x >> (self.width - 1)) << self.width
        return {"y": float_of(self.target).encode(x * Fraction(2) ** self.lsb)}

    def vectors(self, rng: random.Random, count: int) -> list[dict[str, int]]:
        """Numbers of all sizes, and close to the ties between two codes."""
        found = []
        for _ in range(count):
            size = rng.randint(1, self.width - 1)
            x = rng.getrandbits(size)
            if rng.random() < 0.5 and size > 12:  # a tie, or one beside it
                low = size - 11
                x = (x >> low << low) + (1 << (low - 1)) + rng.choice((-1, 0, 0, 1))
            found.append({"x": (x if rng.random() < 0.5 else -x) % (1 << self.width)})
        return found
