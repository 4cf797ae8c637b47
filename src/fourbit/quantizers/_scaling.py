"""Where the scale of a tensor comes from. `x = scale * q`: scale is the dequantization multiplier, always.

Each class is a frozen description. One that remembers something has a `state_class` (`fourbit.quantizers.ScalingState`),
whose tensors a layer owns; what it needs of them is passed in as `stored`. NaN or infinity in the data make the scale NaN,
so that they reach the output instead of being saturated away.

    FixedScale    a constant
    Amax          max|x| / largest magnitude of the format
    Sawb          clip value from the first two moments of the weights
    ClipValue     PACT's learned clip value (`_clip_value.py`)
    GradScale     a power of two per layer that votes keep in place (`_grad_scale.py`)
    LossScaled    1: the loss carries one scale for all layers (`_grad_scale.py`)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from ctypes import c_float
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.quantizers._scaling_state import ScalingState
from fourbit.quantizers._statistics import Statistics
from fourbit.quantizers._tiles import Granularity

TINY = 2.0**-126
"""Smallest normal float32: scales never go below it, so that an all-zero tensor has a finite reciprocal scale."""


class Bound(NamedTuple):
    """A clip range: "unsigned" 0 <= x < value, "symmetric" |x| < value, "inclusive" |x| <= value."""

    rule: Literal["unsigned", "symmetric", "inclusive"]
    value: Tensor | float

    def inside(self, x: Tensor) -> Tensor:
        """True where x lies in the range."""
        if self.rule == "inclusive":
            return x.abs() <= self.value
        return (x < self.value) & (x >= 0 if self.rule == "unsigned" else x > -self.value)


@dataclass(frozen=True)
class Scaling(ABC):
    """How the scale of an operand is found."""

    state_class: ClassVar[type[ScalingState] | None] = None
    """What a layer remembers for it; None: nothing."""
    operands: ClassVar[str] = "xwg"
    """Of which operands it is made for."""
    keeps_scale: ClassVar[bool] = False
    """Whether all products of a forward and a backward pass see one scale."""
    is_power_of_two: ClassVar[bool] = False
    """Whether multiplying by it is an addition to the exponent."""
    reads_data: ClassVar[bool] = False
    """Whether it is found anew from the numbers of every operand."""
    needs_loss_scale: ClassVar[bool] = False
    """Whether it relies on a `LossScaler`."""

    @property
    def clips(self) -> bool:
        """Whether the straight-through gradient passes in a range only (`bound` is not None)."""
        return False

    @property
    def has_tensor_scale(self) -> bool:
        """Whether tiles have scales over one of the whole tensor."""
        return False

    def objection(self, granularity: Granularity) -> str:
        """Why it has no scale for a granularity, and what to write; "" where it has one."""
        return ""

    def starting_at(self, bound: float, format: Format) -> tuple[Scaling, Format]:
        """The scaling and format for data that `bound` limits, if the first batch were to decide them otherwise."""
        return self, format

    @abstractmethod
    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """The scale for finite data: float32, 0-d, or broadcastable where channels have their own."""

    def bound(self, scale: Tensor, format: Format, stored: Tensor | None) -> Bound | None:
        """Inside which range the straight-through gradient passes; None: everywhere."""
        return None

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True)
class FixedScale(Scaling):
    """scale = value. The default suits formats with a wide range (FP16, FP8)."""

    value: float = 1.0

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """A constant."""
        return torch.full((), self.value, dtype=torch.float32, device=statistics.x.device)

    def __str__(self) -> str:
        return f"fixed {self.value:g}"


@dataclass(frozen=True)
class Amax(Scaling):
    """scale = max|x| / format.max, of the tensor or of each channel: nothing saturates."""

    reads_data: ClassVar[bool] = True

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """max|x| / format.max, at least 2^-126."""
        return (statistics.amax / format.max).clamp_min(TINY)

    def __str__(self) -> str:
        return "amax"


_SAWB_COEFFICIENTS: dict[tuple[int, bool], tuple[float, float]] = {
    # (levels, has zero): c1, c2, as in IBM's fms-model-optimizer (Apache-2.0), `sawb_params` and `sawb_params_code`.
    (16, False): (12.68, 12.80),
    (15, True): (12.035, 12.03),
    (4, False): (3.12, 2.064),
    (3, True): (2.6, 1.71),
    (8, False): (7.509, 6.892),
    (127, True): (28.24, 30.81),
    (255, True): (31.76, 35.04),
}

_SPARSE = 4.0
"""The ratio sqrt(E[w^2]) / E|w| above which `Sawb` takes the excess for zeros."""


@dataclass(frozen=True)
class Sawb(Scaling):
    """Statistics-aware weight binning: alpha = c1 sqrt(E[w^2]) - c2 E|w|, scale = alpha / format.max.

    c1 and c2 were fitted by its authors to the clip value of least squared error over six weight distributions, whose ratios
    r = sqrt(E[w^2]) / E|w| go from 1.155 (uniform) to 1.414 (Laplace). The line through them falls to nothing where all
    weights have nearly one magnitude (r towards 1), and behind where most weights are zero (r large). So alpha is at least

        min(max|w|, t E|w|)              t = max(1, 0.65 of the formula's alpha / E|w| for uniform weights)
        min(max|w|, k E[w^2] / E|w|)     where r > 4, with the k that meets the line at r = 4

    E[w^2] / E|w|, a mean of |w| that zeros do not enter, is what the best clip value is proportional to when zeros are added.
    For int4_sym t = 1.21, which takes effect below r = 1.10, and k = 2.26. Recomputed at every forward pass.

    Args:
        c1, c2: coefficients; None takes the published pair for the number of levels of the format.
        clipped: zero the gradient of weights beyond +-alpha (True), or pass it straight through (False, "SAWB+").

    Source: Choi et al., MLSys 2019; coefficients from fms-model-optimizer.
    """

    reads_data: ClassVar[bool] = True
    c1: float | None = None
    c2: float | None = None
    clipped: bool = False

    @property
    def clips(self) -> bool:
        """As `clipped`."""
        return self.clipped

    def coefficients(self, format: Format) -> tuple[float, float]:
        """(c1, c2) for a format.

        Raises:
            UserError: nothing is published for this number of levels.
        """
        if self.c1 is not None and self.c2 is not None:
            return self.c1, self.c2
        key = (len(format.grid), 0.0 in format.grid)
        evenly_spaced = len({b - a for a, b in pairwise(format.grid)}) == 1
        if key not in _SAWB_COEFFICIENTS or not evenly_spaced:
            raise UserError(
                f"SAWB has no published coefficients for format {format.name} ({key[0]} levels "
                f"{'with' if key[1] else 'without'} zero): pass Sawb(c1=..., c2=...) or choose int4_sym or int4_midrise"
            )
        return _SAWB_COEFFICIENTS[key]

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """alpha / format.max, at least 2^-126."""
        c1, c2, flat, sparse = _constants(self, format)
        mean_square, mean_abs, amax = statistics.moments
        if isinstance(mean_square, float) and isinstance(mean_abs, float) and isinstance(amax, float):
            is_sparse = mean_square > _SPARSE**2 * mean_abs**2 > 0
            least = min(amax, sparse * mean_square / mean_abs if is_sparse else flat * mean_abs)
            number = to_float32(max(c1 * math.sqrt(mean_square) - c2 * mean_abs, least))
            return at_least_tiny(to_float32((number if number > 0 else amax) / format.max))
        assert isinstance(mean_square, Tensor) and isinstance(mean_abs, Tensor) and isinstance(amax, Tensor)
        is_sparse = mean_square > _SPARSE**2 * mean_abs.square()
        least = torch.where(is_sparse, sparse * mean_square / mean_abs, flat * mean_abs).minimum(amax.double())
        alpha = torch.maximum(c1 * mean_square.sqrt() - c2 * mean_abs, least).to(torch.float32)
        return (torch.where(alpha > 0, alpha, amax) / format.max).clamp_min(TINY)

    def bound(self, scale: Tensor, format: Format, stored: Tensor | None) -> Bound | None:
        """|x| <= alpha, if `clipped`."""
        return Bound("inclusive", scale * format.max) if self.clipped else None

    def __str__(self) -> str:
        return "SAWB"


@lru_cache(maxsize=256)
def _constants(sawb: Sawb, format: Format) -> tuple[float, float, float, float]:
    """c1, c2, and the factors t and k of a format."""
    c1, c2 = sawb.coefficients(format)
    flat = max(1.0, 0.65 * (2.0 / math.sqrt(3.0) * c1 - c2))
    return c1, c2, flat, (_SPARSE * c1 - c2) / _SPARSE**2


def to_float32(value: float) -> float:
    """The nearest float32. A sum, product, quotient or root of float32 numbers comes out as if computed in float32."""
    return c_float(value).value


def at_least_tiny(scale: float) -> Tensor:
    """A scale that the host knows, at least 2^-126."""
    return torch.scalar_tensor(max(scale, TINY), dtype=torch.float32)
