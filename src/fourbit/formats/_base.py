"""A number format is a value: a frozen dataclass that knows what each of its codes means.

Everything follows from `decode(code)`: the sorted *grid* of representable numbers, the *decision points* at which
nearest rounding changes from one grid value to the next, the range, and the codec. This module needs no tensor library.
It is written for clarity and exactness, with Python's own numbers, and serves as the oracle that the fast
implementations in `fourbit.quantizers` are tested against, code by code.

Conventions: a code is the bit pattern as an unsigned integer. The grid has one zero even where two codes mean zero, and
rounding never returns -0.0. NaN stays NaN. Infinities and values beyond the range saturate at the largest magnitude,
unless the format's `overflow` is "infinity".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Literal

from fourbit.errors import UserError


@dataclass(frozen=True)
class Format(ABC):
    """A set of at most 2^16 numbers with a code each.

    Args:
        name: identifier, unique in a catalogue.
        summary: definition in one line.
        source: where the definition comes from.
        multiplier: m of the multiply-and-truncate rule: magnitude v is chosen from v/m on. None: arithmetic midpoints.
        ties: where a number on a midpoint goes: to the "even" code, or "away" from zero.
        overflow: what nearest rounding does beyond the range.
    """

    name: str
    summary: str = ""
    source: str = ""
    multiplier: Fraction | None = field(default=None, kw_only=True)
    ties: Literal["even", "away"] = field(default="even", kw_only=True)
    overflow: Literal["saturate", "infinity"] = field(default="saturate", kw_only=True)

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of a code in bits."""

    @abstractmethod
    def decode(self, code: int) -> float:
        """The number that `code` stands for; NaN for NaN and for codes that the format leaves unused."""

    def __hash__(self) -> int:
        return hash(self.name)  # of every field would be slow, and formats are looked up at every operation

    def __str__(self) -> str:
        return self.name

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The number of each code, in code order; length 2^bits."""
        return tuple(self.decode(code) for code in range(2**self.bits))

    @cached_property
    def _code_by_value(self) -> dict[float, int]:
        codes: dict[float, int] = {}
        for code, value in enumerate(self.values):
            if math.isfinite(value):
                codes.setdefault(value + 0.0, code)  # -0.0 + 0.0 is +0.0
        return codes

    @cached_property
    def grid(self) -> tuple[float, ...]:
        """The representable finite numbers, ascending, zero once."""
        return tuple(sorted(self._code_by_value))

    @property
    def max(self) -> float:
        """The largest finite number."""
        return self.grid[-1]

    @property
    def min(self) -> float:
        """The smallest (most negative) finite number."""
        return self.grid[0]

    @cached_property
    def smallest(self) -> float:
        """The smallest positive number."""
        return next(v for v in self.grid if v > 0)

    @property
    def signed(self) -> bool:
        """Whether there are negative numbers."""
        return self.min < 0

    @cached_property
    def decision_points(self) -> tuple[float, ...]:
        """Where nearest rounding moves to the next grid value: entry i lies between grid[i] and grid[i + 1].

        (grid[i] + grid[i+1]) / 2, or, where the format has a `multiplier`, the larger magnitude / multiplier (radix-4
        FP4: 4^n / 1.6, the threshold of zero included).
        """
        points = []
        for low, high in pairwise(self.grid):
            if self.multiplier is None:
                point = (Fraction(low) + Fraction(high)) / 2
            else:
                point = (Fraction(high) if high > 0 else Fraction(low)) / self.multiplier
            points.append(float(point))
        return tuple(points)

    @cached_property
    def ties_up(self) -> tuple[bool, ...]:
        """For each decision point, whether a number exactly on it goes to the upper neighbour.

        As `ties` says; with a `multiplier`, away from zero (x * m = v truncates to v).
        """
        if self.multiplier is not None or self.ties == "away":
            return tuple(point > 0 for point in self.decision_points)
        return tuple(self._code_by_value[high] % 2 == 0 for high in self.grid[1:])

    @cached_property
    def overflow_point(self) -> float:
        """Magnitude from which rounding gives infinity (infinity itself where the format saturates)."""
        return math.inf if self.overflow == "saturate" else self.max + (self.max - self.grid[-2]) / 2

    def round(self, x: float) -> float:
        """The grid value nearest to `x`, as `decision_points` and `ties_up` define it.

        >>> from fourbit.formats import FP4_R4_EVEN
        >>> [FP4_R4_EVEN.round(x) for x in (0.009, 0.5, 0.625, -3.0, 1e9)]
        [0.0, 0.25, 1.0, -4.0, 64.0]
        """
        if math.isnan(x):
            return math.nan
        if self.overflow == "infinity" and abs(x) >= self.overflow_point:
            return math.copysign(math.inf, x)
        i = bisect_left(self.decision_points, x)
        if i < len(self.decision_points) and self.decision_points[i] == x and self.ties_up[i]:
            i += 1
        return self.grid[i]

    def neighbors(self, x: float) -> tuple[float, float]:
        """The grid values below and above `x` (equal where `x` is on the grid or beyond its ends)."""
        i = bisect_left(self.grid, x)
        if i == len(self.grid):
            return self.grid[-1], self.grid[-1]
        if i == 0 or self.grid[i] == x:
            return self.grid[i], self.grid[i]
        return self.grid[i - 1], self.grid[i]

    def truncate(self, x: float) -> float:
        """The grid value next to `x` towards zero (the smallest magnitude where the format has no zero)."""
        if math.isnan(x):
            return math.nan
        low, high = self.neighbors(x)
        return low if x >= 0 else high

    def round_toward(self, x: float, average: float) -> float:
        """Of the neighbours l <= |x| < h among the magnitudes of the grid, h where the average, seen along x, has come to their
        middle: sign(x) average >= (l + h) / 2; else l. For grids that are symmetric.

        Source: Q-EMA, Chen et al., TetraJet, arXiv 2502.20853, and their code.

        >>> from fourbit.formats import FP4_E2M1
        >>> [FP4_E2M1.round_toward(2.6, average) for average in (2.4, 2.5, -7.0)]
        [2.0, 3.0, 2.0]
        """
        if x == 0 or math.isnan(x):
            return x + 0.0
        magnitudes = [v for v in self.grid if v >= 0]
        i = bisect_right(magnitudes, abs(x)) - 1
        low, high = magnitudes[i], magnitudes[min(i + 1, len(magnitudes) - 1)]
        sign = math.copysign(1.0, x)
        return sign * (high if sign * average >= (low + high) / 2 else low) + 0.0

    def slope(self, x: float, k: float = 5.0, most: float = 3.0) -> float:
        """The derivative of the power curve that DGE takes rounding for: 1/k |2 (x - l) / (h - l) - 1|^(1/k - 1), at most
        `most`, for l <= x < h neighbours of the grid.

        Source: Wang et al., Optimizing Large Language Model Training Using FP4 Quantization, arXiv 2501.17116.

        >>> from fourbit.formats import FP4_E2M1
        >>> FP4_E2M1.slope(0.0), FP4_E2M1.slope(2.5), round(FP4_E2M1.slope(-4.5), 4)
        (0.2, 3.0, 0.3482)
        """
        x = min(max(x, self.min), self.max)
        i = min(bisect_right(self.grid, x), len(self.grid) - 1) - 1
        u = abs(2 * (x - self.grid[i]) / (self.grid[i + 1] - self.grid[i]) - 1)
        return min(u ** (1 / k - 1) / k, most) if u else most

    def encode(self, x: float) -> int:
        """The code of `round(x)`; NaN and infinity need a code of their own.

        Raises:
            UserError: `x` is NaN, or rounds to infinity, and the format has no such code.
        """
        value = self.round(x)
        if math.isfinite(value):
            return self._code_by_value[value]
        for code, candidate in enumerate(self.values):
            if candidate == value or (math.isnan(value) and math.isnan(candidate)):
                return code
        raise UserError(
            f"format {self.name} has no code for {value}: use a format with NaN or infinity, or clean the data"
        )


@dataclass(frozen=True)
class IntFormat(Format):
    """Evenly spaced numbers: code -> low + code position.

    Args:
        width: bits of the code.
        low, high: smallest and largest number, `high - low + 1 <= 2^width` of them, spaced by 1. Half-integers make a
            grid without zero (mid-rise). Integers are coded in two's complement, other grids by position.
    """

    __hash__ = Format.__hash__

    width: int = 4
    low: float = -7
    high: float = 7

    def __post_init__(self) -> None:
        levels = self.high - self.low + 1
        fits = 1 <= self.width <= 16 and 2 <= levels <= 2**self.width and levels == int(levels)
        if fits and float(self.low).is_integer():
            half = 2 ** (self.width - 1)
            fits = self.low >= -half and self.high < (half if self.low < 0 else 2 * half)
        if not fits:
            raise UserError(
                f"format {self.name}: {self.low} .. {self.high} does not fit {self.width} bits: "
                "need 2 to 2^width levels spaced by 1"
            )

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return self.width

    def decode(self, code: int) -> float:
        """Two's complement for integers, position on the grid otherwise."""
        if float(self.low).is_integer():
            value = float(code - 2**self.width if self.low < 0 and code >= 2 ** (self.width - 1) else code)
            return value if self.low <= value <= self.high else math.nan
        value = self.low + code
        return value if value <= self.high else math.nan


@dataclass(frozen=True)
class Codebook(Format):
    """Any list of numbers: code i means `table[i]`.

    >>> Codebook("mine", table=(-1.0, -0.25, 0.0, 0.25, 1.0)).round(0.7)
    1.0
    """

    __hash__ = Format.__hash__

    table: Sequence[float] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", tuple(float(v) for v in self.table))
        if len({v + 0.0 for v in self.table if math.isfinite(v)}) < 2 or len(self.table) > 2**16:
            raise UserError(f"codebook {self.name} needs 2 to 65536 numbers, at least two of them finite and different")

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return max(1, math.ceil(math.log2(len(self.table))))

    def decode(self, code: int) -> float:
        """The entry of the table; NaN past its end."""
        return self.table[code] if code < len(self.table) else math.nan
