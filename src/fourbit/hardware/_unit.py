"""What every unit is to simulation, synthesis and report: bits in, bits out, and the arithmetic that they stand for.

A unit is a value. `reference` says in exact arithmetic what its circuit must do; `vectors` makes inputs that reach its corners.
The circuit itself, which needs Amaranth, is `units.build`'s.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

from fourbit._registry import Registry

Bits = Mapping[str, int]

RANDOM_BITS = 12
"""Of a random number: probabilities are multiples of 2^-12, rounded down."""


@dataclass(frozen=True)
class Unit(ABC):
    """One arithmetic unit.

    Args:
        name: what commands call it.
        title: one line for tables.
        cuts: stages behind which it has pipeline registers, of `stages`.
    """

    name: str
    title: str = ""
    cuts: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def macs(self) -> int:
        """Multiplications and additions that a unit starts in each cycle; 0 where that is not what it does."""
        return 0

    @property
    def stages(self) -> tuple[str, ...]:
        """Stages behind which there may be registers, from the inputs to the outputs."""
        return ()

    @property
    @abstractmethod
    def inputs(self) -> dict[str, int]:
        """Width of each input."""

    @property
    @abstractmethod
    def outputs(self) -> dict[str, int]:
        """Width of each output."""

    @property
    def late(self) -> dict[str, str]:
        """Inputs that enter behind a stage: they come as many cycles later as there are registers before it."""
        return {}

    @abstractmethod
    def reference(self, inputs: Bits) -> dict[str, int]:
        """The outputs in exact arithmetic."""

    @abstractmethod
    def vectors(self, rng: random.Random, count: int) -> list[dict[str, int]]:
        """Inputs, random and near corners."""


UNITS: Registry[Unit] = Registry("unit")
"""Every unit by name."""
