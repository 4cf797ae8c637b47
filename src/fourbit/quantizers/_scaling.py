"""Where the scale of a tensor comes from. `x = scale * q`: scale is the dequantization multiplier, always.

Each class is a frozen description; what it has to remember (a learned clip value, GradScale's exponent) is a plain
tensor that the layer owns and passes in as `stored`. NaN or infinity in the data make the scale NaN, so that they reach
the output instead of being saturated away.

    FixedScale    a constant
    Amax          max|x| / largest magnitude of the format
    Sawb          clip value from the first two moments of the weights
    ClipValue     PACT's learned clip value
    GradScale     a power of two per layer that votes keep in place
    LossScaled    1: the loss carries one scale for all layers
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from ctypes import c_float
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import INT4_SYM, Format
from fourbit.quantizers._round import round_to_format
from fourbit.quantizers._statistics import Statistics, amax_of
from fourbit.quantizers._words import random_words, stream_key

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

    stored_kind = ""
    """What the layer keeps for this scaling: "" nothing, "alpha" a clip value, "exponent" a power of two."""

    @property
    def clips(self) -> bool:
        """Whether the straight-through gradient passes in a range only (`bound` is not None)."""
        return False

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
        c1, c2 = self.coefficients(format)
        mean_square, mean_abs, amax = statistics.moments
        flat = max(1.0, 0.65 * (2.0 / math.sqrt(3.0) * c1 - c2))
        sparse = (_SPARSE * c1 - c2) / _SPARSE**2
        if isinstance(mean_square, float) and isinstance(mean_abs, float) and isinstance(amax, float):
            is_sparse = mean_square > _SPARSE**2 * mean_abs**2 > 0
            least = min(amax, sparse * mean_square / mean_abs if is_sparse else flat * mean_abs)
            number = to_float32(max(c1 * math.sqrt(mean_square) - c2 * mean_abs, least))
            return _at_least_tiny(to_float32((number if number > 0 else amax) / format.max))
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


@dataclass(frozen=True)
class ClipValue(Scaling):
    """PACT: y = clip(x, 0, alpha), scale = alpha / format.max; signed formats clip to [-alpha, alpha].

    Gradients (straight-through): dx passes where 0 <= x < alpha (|x| < alpha), dalpha = sum of dx over x >= alpha, minus
    the sum over x <= -alpha in the signed form.

    Args:
        init: first alpha; None takes the alpha of least squared error on the first training batch.
        signed_format: the format used instead where the first training batch has negative inputs; None keeps the
            unsigned format always.
        learned: whether alpha is trained.

    Source: Choi et al., PACT, arXiv 1805.06085.
    """

    stored_kind = "alpha"
    init: float | None = None
    signed_format: Format | None = INT4_SYM
    learned: bool = True

    @property
    def clips(self) -> bool:
        """Always."""
        return True

    def __post_init__(self) -> None:
        if self.init is not None and not self.init > 0:
            raise UserError(f"PACT's initial alpha must be positive, not {self.init}")

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """alpha / format.max."""
        value = _clip_value(stored)
        return (value / format.max).clamp_min(TINY) if isinstance(value, Tensor) else _at_least_tiny(value / format.max)

    def bound(self, scale: Tensor, format: Format, stored: Tensor | None) -> Bound | None:
        """0 <= x < alpha, or |x| < alpha in the signed form."""
        return Bound("symmetric" if format.signed else "unsigned", _clip_value(stored))

    def __str__(self) -> str:
        text = "PACT" if self.learned else f"clip {self.init:g}" if self.init else "clip"
        return f"{text} ({self.signed_format.name} where inputs go negative)" if self.signed_format else text


def to_float32(value: float) -> float:
    """The nearest float32. A sum, product, quotient or root of float32 numbers comes out as if computed in float32."""
    return c_float(value).value


def _at_least_tiny(scale: float) -> Tensor:
    return torch.scalar_tensor(max(scale, TINY), dtype=torch.float32)


def _clip_value(stored: Tensor | None) -> Tensor | float:
    """One number, 0-d; on the host, which is faster than torch with it, a float."""
    if stored is None:
        raise UserError("PACT needs a clip value: use it in a layer, or pass stored=alpha")
    if stored.numel() != 1:
        raise UserError(f"PACT's clip value must be one number, but has shape {tuple(stored.shape)}")
    if stored.is_cpu:
        return max(to_float32(float(stored)), TINY)
    return stored.detach().to(torch.float32).view(()).clamp_min(TINY)


def best_clip_value(x: Tensor, format: Format, num_candidates: int = 64, num_samples: int = 1 << 16) -> float:
    """The clip value that minimises sum (x - Q(x))^2 on (a random sample of) `x`, among fractions of max|x|.

    The sample is the same for every call with as many elements: positions come from `random_words`. (A regular one would
    meet the same column of every image.)

    Returns 1.0 for an empty, all-zero or non-finite tensor.
    """
    x = x.detach().flatten().to(torch.float32)
    amax = float(amax_of(x))
    if not 0 < amax < float("inf"):
        return 1.0
    if x.numel() > num_samples:
        words = random_words(stream_key(num_samples), (num_samples,), x.device).to(torch.int64)
        x = x[(words & 0xFFFFFFFF) % x.numel()]
    best = (float("inf"), amax)
    for i in range(1, num_candidates + 1):
        alpha = amax * i / num_candidates
        scale = alpha / format.max
        error = float((round_to_format(x / scale, format) * scale - x).double().square().sum())
        best = min(best, (error, alpha))
    return best[1]


UNSET = -(2**31)
"""Exponent of a GradScale that has not seen a gradient."""

_EXPONENT_LIMIT = 100
"""Exponents stay in [-100, 100]: 2^100 lifts the smallest normal float32 gradients, and its reciprocal is still normal."""


def is_exponent(exponent: Tensor) -> Tensor:
    """Where it is a number that a GradScale can have: an integer in [-100, 100]."""
    return (exponent.abs() <= _EXPONENT_LIMIT) & (exponent == exponent.round())


def exponent_scale(exponent: Tensor) -> Tensor:
    """2^exponent in float32, an average of exponents rounded to an integer; 1 where UNSET."""
    if exponent.is_cpu and exponent.dim() == 0:  # the host is faster than torch with one number
        k = round(exponent.item())
        return torch.scalar_tensor(1.0 if k == UNSET else math.ldexp(1.0, k), dtype=torch.float32)
    return torch.exp2(torch.where(exponent == UNSET, 0, exponent).to(torch.float32).round())


@dataclass(frozen=True)
class GradScale(Scaling):
    """One power of two per layer: g is multiplied by 2^exponent before both backward GEMMs, their results divided by it.

    Each backward pass casts a vote from amax = max|2^exponent g|:

        0 for amax in (max/2, max],   +1 in (0, max/2],   -1 above max

    and the exponent moves by the vote. The first gradient sets the exponent outright. Departures from the paper, where it
    is silent: an all-zero gradient votes 0 (the paper's rule would double the scale for ever), a non-finite one votes 0,
    exponents are clamped to [-100, 100].

    Args:
        max: MAX of the paper, 64: the largest magnitude of the even grid. A power of two.
        init: first exponent; None takes it from the first gradient.

    Source: Sun et al., NeurIPS 2020, Fig. 3a.
    """

    stored_kind = "exponent"
    max: float = 64.0
    init: int | None = None

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """2^-exponent."""
        if stored is None:
            raise UserError("GradScale needs its exponent: use it in a layer, or pass stored=exponent")
        return exponent_scale(stored).reciprocal()

    def first_exponent(self, amax: Tensor) -> Tensor:
        """The exponent k with 2^k amax in (max/2, max]; UNSET where amax is 0 or not finite. int32, shape of amax."""
        ratio = self.max / amax.double()
        exponent = torch.frexp(ratio).exponent - 1
        known = (amax > 0) & amax.isfinite()
        limited = exponent.clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT)
        return torch.where(known, limited, UNSET).to(torch.int32)

    @overload
    def vote(self, amax: float) -> int: ...

    @overload
    def vote(self, amax: Tensor) -> Tensor: ...

    def vote(self, amax: Tensor | float) -> Tensor | int:
        """The vote of a scaled amax: in {-1, 0, 1}, int32 in the shape of amax. NaN, infinity and 0 vote 0."""
        up = (amax > 0) & (amax <= self.max / 2)
        down = (amax > self.max) & (amax < math.inf)
        if isinstance(up, Tensor) and isinstance(down, Tensor):
            return up.to(torch.int32) - down.to(torch.int32)
        return int(up) - int(down)

    @overload
    def step(self, exponent: int, votes: int) -> int: ...

    @overload
    def step(self, exponent: Tensor, votes: Tensor) -> Tensor: ...

    def step(self, exponent: Tensor | int, votes: Tensor | int) -> Tensor | int:
        """exponent + sign(votes), clamped; UNSET stays. `votes` may be a sum over workers."""
        if isinstance(exponent, Tensor) and isinstance(votes, Tensor):
            moved = (exponent.round() + votes.sign()).clamp(-_EXPONENT_LIMIT, _EXPONENT_LIMIT)
            return torch.where(exponent == UNSET, exponent, moved).to(torch.int32)
        if exponent == UNSET:
            return UNSET
        return int(min(max(exponent + (votes > 0) - (votes < 0), -_EXPONENT_LIMIT), _EXPONENT_LIMIT))

    def __str__(self) -> str:
        return f"GradScale {self.max:g}"


@dataclass(frozen=True)
class LossScaled(Scaling):
    """scale = 1: one scale for all layers, multiplied into the loss (`LossScaler`). The baseline of the paper's Fig. 3.

    Args:
        max: gradients above it count as overflow and make `LossScaler` halve the loss scale.
    """

    stored_kind = "overflow"
    max: float = 64.0

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """1."""
        return torch.ones((), dtype=torch.float32, device=statistics.x.device)

    def __str__(self) -> str:
        return "loss scale"
