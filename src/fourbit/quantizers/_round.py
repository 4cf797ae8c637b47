"""Rounding tensors to a format: the eager reference, which defines the bits.

A rounding rule chooses between the two grid neighbours of a number, so every rule works with every format:

    NEAREST      the format's decision points and tie rule (mostly to the even code; 4^n/1.6 for radix-4 FP4)
    STOCHASTIC   up with probability (x - low) / (high - low), decided by a random word that the caller supplies
    TRUNCATE     the neighbour towards zero
    UNDERFLOW    STOCHASTIC below the smallest magnitude, where NEAREST would lose numbers for good, and NEAREST above it, where
                 that has a third of the error

The arithmetic is chosen by the structure of the grid, never by a format's name: integers are rounded by `round`, powers
of a radix by their exponent bits, binary floats by scaling to an integer, and any other grid by a search in a table.
All equal `Format.round` exactly, for every float32 input (tested over all bfloat16 inputs and every code).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import FloatFormat, Format

WORD_BITS = 24
"""Resolution of stochastic rounding: probabilities are multiples of 2^-24."""


class Rounding(Enum):
    """Which of the two neighbours a number becomes."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"
    TRUNCATE = "truncate"
    UNDERFLOW = "underflow"

    @property
    def draws(self) -> bool:
        """Whether it needs random words."""
        return self in (Rounding.STOCHASTIC, Rounding.UNDERFLOW)


def round_to_format(
    x: Tensor, format: Format, rounding: Rounding = Rounding.NEAREST, words: Tensor | None = None
) -> Tensor:
    """`x`, in grid units, rounded to the grid of `format`.

    Args:
        x: any shape; computed in float32.
        words: int32, one per element, for STOCHASTIC and UNDERFLOW: `u = (word >> 8) mod 2^24` rounds up where
            u < 2^24 (x - low) / (high - low).

    Returns:
        float32, same shape, never -0.0. NaN stays NaN. Infinity and numbers beyond the range become the largest
        magnitude (or infinity for NEAREST in a format whose `overflow` says so).

    Raises:
        UserError: a rule that draws without words, or words of another shape.

    >>> from fourbit.formats import FP4_R4_EVEN
    >>> round_to_format(torch.tensor([0.3, 2.5, 100.0]), FP4_R4_EVEN)
    tensor([ 0.2500,  4.0000, 64.0000])
    """
    x = x.detach().to(torch.float32)
    grid = grid_of(format)
    if rounding is Rounding.NEAREST:
        y = nearest_number(x, format)
        return (y if grid.keeps_nan else torch.where(x.isnan(), x, y)).add_(0.0)
    low, high = grid.neighbors(x)
    if rounding is Rounding.TRUNCATE:
        return torch.where(x.isnan(), x, torch.where(x >= 0, low, high)).add_(0.0)
    if words is None or words.shape != x.shape:
        raise UserError("stochastic rounding needs one random word per element: pass words of the shape of x")
    u = ((words >> 8) & 0xFFFFFF).to(torch.float32)
    threshold = (x.clamp(format.min, format.max) - low).div_(high - low).mul_(2.0**WORD_BITS)  # 0/0: low == high
    y = torch.where(u < threshold, high, low)
    if rounding is Rounding.UNDERFLOW:
        y = torch.where(x.abs() < format.smallest, y, nearest_number(x, format))
    return torch.where(x.isnan(), x, y).add_(0.0)


def nearest_number(x: Tensor, format: Format) -> Tensor:
    """`round_to_format(x, format)` for float32 numbers: -0.0 may come out, and NaN gives whatever comes cheapest.

    For callers that know from the scale whether there is a NaN, and that multiply: half the passes over memory.
    """
    grid = grid_of(format)
    y = grid.nearest(x)
    if format.overflow == "infinity" and not isinstance(grid, Cast):
        y = torch.where(x.abs() >= format.overflow_point, x.sign() * math.inf, y)
    return y


def round_toward(x: Tensor, average: Tensor, format: Format) -> Tensor:
    """`Format.round_toward` for each element, float32; NaN where x is."""
    x, average = x.to(torch.float32), average.to(torch.float32)
    magnitudes = torch.tensor([v for v in format.grid if v >= 0], dtype=torch.float32, device=x.device)
    i = torch.bucketize(x.abs().contiguous(), magnitudes, right=True) - 1
    i = i.clamp_(max=len(magnitudes) - 1)
    low, high = magnitudes[i], magnitudes[(i + 1).clamp(max=len(magnitudes) - 1)]
    sign = x.sign()
    y = sign * torch.where(sign * average >= (low + high) / 2, high, low)
    return torch.where(x.isnan(), x, y).add_(0.0)


class Grid(Protocol):
    """Neighbours and nearest grid value of numbers; the sign of zero is the caller's business, and so is NaN, except
    that `nearest` passes it on where `keeps_nan`."""

    keeps_nan: ClassVar[bool]

    def nearest(self, x: Tensor) -> Tensor: ...

    def neighbors(self, x: Tensor) -> tuple[Tensor, Tensor]: ...


@lru_cache(maxsize=256)
def grid_of(format: Format) -> Grid:
    """The fastest exact arithmetic for a format, found from the shape of its grid."""
    consecutive = float(format.min).is_integer() and all(b - a == 1 for a, b in pairwise(format.grid))
    if consecutive and all(up == (high % 2 == 0) for up, high in zip(format.ties_up, format.grid[1:], strict=True)):
        return Integers(format.min, format.max)
    logarithmic = Logarithmic.of(format)
    if logarithmic is not None:
        return logarithmic
    if isinstance(format, FloatFormat) and format.is_binary and format.ties == "even":
        dtype = _same_dtype(format)
        if dtype is not None:
            return Cast(format, dtype)
        if format.smallest >= 2.0**-126:  # the quantum is a normal float32
            return Binary(format)
    return Table(format)


@dataclass(frozen=True)
class Integers:
    """All integers from low to high; `round` takes ties to the even integer, which has the even code."""

    keeps_nan: ClassVar[bool] = True
    low: float
    high: float

    def nearest(self, x: Tensor) -> Tensor:
        return x.clamp(self.low, self.high).round_()

    def neighbors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.floor().clamp_(self.low, self.high), x.ceil().clamp_(self.low, self.high)


def float_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


@dataclass(frozen=True)
class Logarithmic:
    """0 and +-smallest * 2^(k i), i < num, deciding at threshold * 2^(k i): exponent arithmetic on the bit pattern.

    bits(threshold * 2^(k i)) = bits(threshold) + i k 2^23, so a subtraction and a mask find the power (k a power of two):
    no logarithm, and exact for every float32, whatever the multiplier.
    """

    keeps_nan: ClassVar[bool] = False
    smallest: float
    largest: float
    ratio: float
    threshold: float

    @staticmethod
    def of(format: Format) -> Logarithmic | None:
        positive = [v for v in format.grid if v > 0]
        ratio = positive[1] / positive[0] if len(positive) > 1 else 0.0
        if (
            format.multiplier is None
            or ratio not in (2.0, 4.0, 16.0)
            or list(format.grid) != [-v for v in reversed(positive)] + [0.0] + positive
            or any(b != a * ratio for a, b in pairwise(positive))
            or math.frexp(positive[0])[0] != 0.5
        ):
            return None
        threshold = torch.tensor(float(positive[0] / format.multiplier), dtype=torch.float64)
        single = threshold.to(torch.float32)
        if single.double() < threshold:  # x >= t for a float32 x means x >= the next float32
            single = torch.nextafter(single, torch.tensor(math.inf, dtype=single.dtype))
        return Logarithmic(positive[0], positive[-1], ratio, float(single))

    def nearest(self, x: Tensor) -> Tensor:
        return self._power(x.abs(), self.threshold).copysign_(x)

    def neighbors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        magnitude = x.abs()
        near = self._power(magnitude.clone(), self.smallest)
        far = torch.where(near > 0, near * self.ratio, self.smallest).clamp_(max=self.largest)
        far = torch.where(near == magnitude, near, far).copysign_(x)
        near, negative = near.copysign_(x), x < 0
        return torch.where(negative, far, near), torch.where(negative, near, far)

    def _power(self, magnitude: Tensor, start: float) -> Tensor:
        """smallest * ratio^i for magnitudes in [start * ratio^i, start * ratio^(i+1)), 0 below; overwrites its input."""
        octaves = int(math.log2(self.ratio)) << 23
        lowest = self.smallest / self.ratio  # stands for zero until the last step
        bits = (
            magnitude.view(torch.int32).sub_(float_bits(start)).bitwise_and_(-octaves).add_(float_bits(self.smallest))
        )
        return torch.threshold_(
            bits.clamp_(float_bits(lowest), float_bits(self.largest)).view(torch.float32), lowest, 0.0
        )


@dataclass(frozen=True)
class Binary:
    """sign, exponent, mantissa in radix 2: x / quantum rounded to an integer, quantum = 2^(exponent - M)."""

    keeps_nan: ClassVar[bool] = True
    format: FloatFormat

    def _quantum(self, x: Tensor) -> Tensor:
        f = self.format
        lowest = (1 if f.subnormals else 0) - f.exponent_bias + 127
        exponent = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=lowest << 23)
        return exponent.sub_(f.mantissa_bits << 23).view(torch.float32)

    def nearest(self, x: Tensor) -> Tensor:
        f = self.format
        quantum = self._quantum(x)
        if not f.subnormals:  # between 0 and the smallest magnitude there is nothing
            quantum.masked_fill_(x.abs() < f.smallest, f.smallest)
        return (x / quantum).round_().mul_(quantum).clamp_(f.min, f.max)

    def neighbors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = self.format
        x = x.clamp(f.min, f.max)
        quantum = self._quantum(x)
        steps = x / quantum
        low, high = steps.floor().mul_(quantum), steps.ceil_().mul_(quantum)
        if not f.subnormals:
            tiny = x.abs() < f.smallest
            low = torch.where(tiny, torch.where(x < 0, -f.smallest, 0.0), low)
            high = torch.where(tiny, torch.where(x > 0, f.smallest, 0.0), high)
        return low.clamp_(f.min, f.max), high.clamp_(f.min, f.max)


def _same_dtype(format: FloatFormat) -> torch.dtype | None:
    """The torch dtype with the very same numbers, if there is one."""
    if format.specials != "ieee" or format.overflow != "infinity" or not format.subnormals:
        return None
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        if info.max == format.max and info.smallest_normal * info.eps == format.smallest:
            return dtype
    return None


@dataclass(frozen=True)
class Cast:
    """A format that torch has as a dtype: a cast there and back."""

    keeps_nan: ClassVar[bool] = True
    format: FloatFormat
    dtype: torch.dtype

    def nearest(self, x: Tensor) -> Tensor:
        return x.to(self.dtype).to(torch.float32)

    def neighbors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clamp(self.format.min, self.format.max)
        near = x.to(self.dtype)
        up = torch.nextafter(near, torch.full_like(near, math.inf)).to(torch.float32)
        down = torch.nextafter(near, torch.full_like(near, -math.inf)).to(torch.float32)
        near = near.to(torch.float32)
        return torch.where(near > x, down, near), torch.where(near < x, up, near)


class Table:
    """Any grid: binary search among the decision points, then a look-up. Ties are folded into the points."""

    keeps_nan: ClassVar[bool] = False

    def __init__(self, format: Format):
        points = torch.tensor(format.decision_points, dtype=torch.float64)
        single = points.to(torch.float32)
        # A float32 x belongs above point p when x > p (or x == p, where ties go up). bucketize(right=False) counts the
        # boundaries b < x, so b is the largest float32 that still belongs below.
        exact = single.double() == points
        below = torch.where(single.double() > points, _down(single), single)
        self.boundaries = torch.where(exact & torch.tensor(format.ties_up), _down(single), below)
        self.levels = torch.tensor(format.grid, dtype=torch.float32)

    def nearest(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        return self._look_up(torch.bucketize(x, self.boundaries.to(x.device), out_int32=True), x)

    def neighbors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels, x = self.levels.to(x.device), x.contiguous()
        low = torch.bucketize(x, levels, out_int32=True, right=True).sub_(1).clamp_(min=0)
        high = torch.bucketize(x, levels, out_int32=True, right=False).clamp_(max=len(levels) - 1)
        return self._look_up(low, x), self._look_up(high, x)

    def _look_up(self, index: Tensor, x: Tensor) -> Tensor:
        return self.levels.to(x.device).index_select(0, index.flatten()).view(x.shape)


def _down(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -math.inf))
