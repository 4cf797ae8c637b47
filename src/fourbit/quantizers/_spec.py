"""`QuantSpec` describes how one operand is quantized; `quantize` does it; `QTensor` is the result.

    q = round_to_format(x * (1 / scale), format),        x ~ scale * q

The reciprocal of the scale is taken in float32 and multiplied, which is what fast kernels do too; for the power-of-two
scales of GradScale the difference to a division is nil.

q is kept in a carrier: the smallest of int8, uint8, bfloat16 and float32 that holds every number of the format exactly, so
that hardware can multiply it fast without changing a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fourbit import backends
from fourbit.errors import UserError
from fourbit.formats import Format, get
from fourbit.quantizers._packed import Packed, is_packable, pack, pack_mask
from fourbit.quantizers._round import Rounding, nearest_number, round_to_format
from fourbit.quantizers._scaling import FixedScale, Granularity, Scaling
from fourbit.quantizers._statistics import Statistics, is_dense, memory_flat
from fourbit.quantizers._words import random_words, stream_key

Restore = Literal["", "magnitude", "sum"]


@dataclass(frozen=True)
class QuantSpec:
    """One operand: grid, scale, who shares it, and rounding rule.

    Args:
        format: a Format or the name of one.
        scaling: where the scale comes from.
        granularity: "tensor" or "channel".
        rounding: a `Rounding`.
        samples: average of this many independent stochastic roundings (LUQ's SMP); 1 for other rules.
        restore: for gradients, what of the exact tensor x the products get back, which its rounding x^ has lost:
            "magnitude" multiplies their results by sum(x^2) / sum(x x^), so that the projection of x^ on x is x again, one
            number per tensor and GEMM; "sum" adds to each channel of x^ the same number, so that its sum is that of x (an
            experiment: the operand is no longer on the grid).

    >>> str(QuantSpec("fp4_e2m1"))
    'fp4_e2m1, fixed 1'
    """

    format: Format
    scaling: Scaling = field(default_factory=FixedScale)
    granularity: Granularity = "tensor"
    rounding: Rounding = Rounding.NEAREST
    samples: int = 1
    restore: Restore = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get(self.format))
        if self.restore not in ("", "magnitude", "sum"):
            raise UserError(f"restore must be '', 'magnitude' or 'sum', not {self.restore!r}")
        if self.granularity not in ("tensor", "channel"):
            raise UserError(f"granularity must be 'tensor' or 'channel', not {self.granularity!r}")
        if self.samples < 1 or (self.samples > 1 and not self.rounding.draws):
            raise UserError("samples must be 1, or more with stochastic rounding")
        if self.scaling.stored_kind == "alpha" and self.granularity != "tensor":
            raise UserError("PACT has one clip value per layer: use granularity='tensor'")

    @property
    def stochastic(self) -> bool:
        """Whether it needs random words."""
        return self.rounding.draws

    def __str__(self) -> str:
        parts = [self.format.name, str(self.scaling)]
        if self.granularity != "tensor":
            parts.append(f"per {self.granularity}")
        if self.rounding is not Rounding.NEAREST:
            parts.append(self.rounding.value)
        if self.samples > 1:
            parts.append(f"{self.samples} samples")
        if self.restore:
            parts.append(f"{self.restore} restored")
        return ", ".join(parts)


@lru_cache(maxsize=256)
def carrier_dtype(format: Format) -> torch.dtype:
    """The smallest dtype that holds every number of a format exactly, and that hardware multiplies.

    >>> from fourbit.formats import FP4_R4_EVEN, FP16_169, INT4_SYM
    >>> carrier_dtype(INT4_SYM), carrier_dtype(FP4_R4_EVEN), carrier_dtype(FP16_169)
    (torch.int8, torch.bfloat16, torch.float32)
    """
    if format.bits > 8:
        return torch.float32
    if all(float(v).is_integer() for v in format.grid):
        if format.min >= -128 and format.max <= 127:
            return torch.int8 if format.min < 0 else torch.uint8
        if format.min >= 0 and format.max <= 255:
            return torch.uint8
    exact = torch.tensor(format.grid, dtype=torch.float64)
    normal = format.smallest >= torch.finfo(torch.bfloat16).smallest_normal
    return torch.bfloat16 if normal and bool((exact.to(torch.bfloat16).double() == exact).all()) else torch.float32


class QTensor(NamedTuple):
    """x ~ scale * q: `q` on the grid of `format`, in its carrier dtype; `scale` float32.

    Where the scale is NaN, because the data held NaN or infinity, q means nothing. After SMP, q is a mean of grid values in
    float32. `scale` is 0-d, or has the dimensions of q with size 1 where it is shared.
    """

    q: Tensor
    scale: Tensor
    format: Format

    def dequantize(self) -> Tensor:
        """scale * q, float32."""
        return self.q.to(torch.float32) * self.scale


@dataclass(frozen=True)
class Request:
    """One operand to be rounded, and what is wanted besides its numbers.

    Args:
        x: dense, any floating dtype.
        spec, format: `format` replaces that of the spec.
        dims: the axes that share a scale; None for all.
        stored: what the scaling keeps: PACT's alpha, GradScale's exponent.
        key: stream key of the random words.
        save: also return the mask of the straight-through gradient, and packed codes where a nibble holds them.
        carrier: also return q itself.
    """

    x: Tensor
    spec: QuantSpec
    format: Format
    dims: tuple[int, ...] | None = None
    stored: Tensor | None = None
    key: int | None = None
    save: bool = False
    carrier: bool = True


class Rounded(NamedTuple):
    """The numbers, max|x| (of those that share a scale), and what is saved for backward.

    `amax` is a float where it is known to the host: no tensor needs to be made and read to see that all is finite.
    `packed` may be None: who asked for it packs then. `mask` has one bit per element (see `pack_mask`), None where everything
    passes.
    """

    q: Tensor | None
    amax: Tensor | float
    packed: Packed | None = None
    mask: Tensor | None = None


class Quantized(NamedTuple):
    """A quantized operand, with max|x| and what is saved for backward."""

    tensor: QTensor
    amax: Tensor | float
    packed: Packed | None = None
    mask: Tensor | None = None


def require_numbers(x: Tensor, who: str) -> None:
    """Reject what has no arithmetic: integers, 8-bit floats, sparse tensors.

    Raises:
        UserError: with `who` met it, and what to do.
    """
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise UserError(
            f"{who} got a tensor of {x.dtype}: convert it to a floating-point dtype of 16 bits or more first"
        )
    if x.layout is not torch.strided:
        raise UserError(f"{who} got a tensor of layout {x.layout}: make it dense first, with x.to_dense()")


def prepare(x: Tensor) -> Tensor:
    """`x` detached and dense."""
    require_numbers(x, "quantize")
    x = x.detach()
    return x if is_dense(x) else x.contiguous()


def scale_of(request: Request) -> Tensor:
    """The scale that `run` would use, 0-d or with one number per channel."""
    return request.spec.scaling.of(Statistics(request.x, request.dims), request.format, request.stored)


def run(request: Request) -> Quantized:
    """Quantize one operand."""
    statistics = Statistics(request.x, request.dims)
    scale = request.spec.scaling.of(statistics, request.format, request.stored)
    rounded = backends.dispatch("round", request, scale)
    return _finish(request, scale, rounded or _round(request, scale, statistics))


def run_pair(first: Request, second: Request) -> tuple[Quantized, Quantized]:
    """Quantize one tensor to two formats with the same scale, reading it once where a kernel can."""
    statistics = Statistics(first.x, first.dims)
    scale = first.spec.scaling.of(statistics, first.format, first.stored)
    both: Sequence[Rounded] | None = backends.dispatch("round_pair", first, second, scale)
    if both is None:
        both = [backends.dispatch("round", r, scale) or _round(r, scale, statistics) for r in (first, second)]
    return _finish(first, scale, both[0]), _finish(second, scale, both[1])


def _finish(request: Request, scale: Tensor, rounded: Rounded) -> Quantized:
    amax, q = rounded.amax, rounded.q if rounded.q is not None else request.x.new_empty(0)
    if not isinstance(amax, float) or not math.isfinite(amax):
        scale = scale + amax * 0  # NaN for data with NaN or infinity
    packed = rounded.packed
    if packed is None and request.save and request.spec.samples == 1 and is_packable(request.format):
        packed = pack(q, request.format)
    return Quantized(QTensor(q, scale, request.format), amax, packed, rounded.mask)


def _round(request: Request, scale: Tensor, statistics: Statistics) -> Rounded:
    """The reference."""
    x, spec, format = request.x.to(torch.float32), request.spec, request.format
    scaled = x * scale.reciprocal()
    if not spec.stochastic:
        nearest = spec.rounding is Rounding.NEAREST
        q = nearest_number(scaled, format) if nearest else round_to_format(scaled, format, spec.rounding)
    else:
        if request.key is None:
            raise UserError("stochastic rounding needs a key: pass key=stream_key(seed, ...)")
        q = _draw(scaled, format, spec, request.key, 0)
        for i in range(1, spec.samples):
            q = q.add_(_draw(scaled, format, spec, request.key, i))
    q = q.to(carrier_dtype(format)) if spec.samples == 1 else q.div_(spec.samples)
    bound = spec.scaling.bound(scale, format, request.stored) if request.save else None
    return Rounded(q, statistics.amax, mask=None if bound is None else pack_mask(bound.inside(x)))


def _draw(scaled: Tensor, format: Format, spec: QuantSpec, key: int, sample: int) -> Tensor:
    """One stochastic rounding; words go to elements in the order in which these lie in memory."""
    words = torch.empty_like(scaled, dtype=torch.int32)
    memory_flat(words).copy_(random_words(stream_key(key, sample), (scaled.numel(),), scaled.device))
    return round_to_format(scaled, format, spec.rounding, words)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    channel_axis: int | None = None,
    stored: Tensor | None = None,
    key: int | None = None,
    format: Format | None = None,
) -> QTensor:
    """Quantize `x` as `spec` says. Not differentiable: layers supply the straight-through gradient.

    Args:
        x: any shape, any floating dtype; the arithmetic is float32.
        channel_axis: the axis with scales of its own, for granularity "channel".
        stored: what the scaling keeps: PACT's alpha, GradScale's exponent.
        key: stream key of the random words, for stochastic rounding.
        format: replaces `spec.format` (PACT's signed form).

    Returns:
        QTensor. NaN or infinity in `x` make the scale NaN (of the tensor, or of their channel), so that they reach
        whatever is computed from `dequantize()` and are never silently saturated.

    Raises:
        UserError: integer input, channel granularity without an axis, stochastic rounding without a key.

    >>> from fourbit.quantizers import Amax
    >>> x = torch.tensor([[-3.0, 0.4, 1.0, 7.0]])
    >>> quantize(x, QuantSpec("int4_sym", Amax())).q
    tensor([[-3,  0,  1,  7]], dtype=torch.int8)
    """
    return run(request_for(x, spec, channel_axis, stored, key, format)).tensor


def quantize_pair(
    x: Tensor, first: QuantSpec, second: QuantSpec, *, stored: Tensor | None = None
) -> tuple[QTensor, QTensor, Tensor]:
    """Quantize `x` to two formats with one scale, as two-phase rounding does: one pass over memory.

    Args:
        x: any shape, any floating dtype.
        first, second: nearest rounding, the same scaling, one scale per tensor.
        stored: what the scaling keeps: GradScale's exponent.

    Returns:
        Both results, and max|x| (0-d float32).

    Raises:
        UserError: the two differ in scaling or granularity.

    >>> from fourbit.quantizers import GradScale
    >>> even, odd = QuantSpec("fp4_r4_even", GradScale()), QuantSpec("fp4_r4_odd", GradScale())
    >>> a, b, amax = quantize_pair(torch.tensor([3.0, -40.0]), even, odd, stored=torch.tensor(0))
    >>> a.q.tolist(), b.q.tolist(), float(amax)
    ([4.0, -64.0], [2.0, -32.0], 40.0)
    """
    if (first.scaling, first.granularity) != (second.scaling, "tensor"):
        raise UserError(f"two formats that share a scale need the same scaling, per tensor: got {first} and {second}")
    a, b = run_pair(request_for(x, first, None, stored), request_for(x, second, None, stored))
    return a.tensor, b.tensor, torch.as_tensor(a.amax)


def request_for(
    x: Tensor,
    spec: QuantSpec,
    channel_axis: int | None = None,
    stored: Tensor | None = None,
    key: int | None = None,
    format: Format | None = None,
    save: bool = False,
) -> Request:
    """The request that `quantize` would run."""
    dims = None
    if spec.granularity == "channel":
        if channel_axis is None:
            raise UserError("granularity 'channel' needs channel_axis")
        if x.dim() and not -x.dim() <= channel_axis < x.dim():
            raise UserError(f"channel_axis is {channel_axis}, but the tensor has {x.dim()} axes")
        dims = tuple(d for d in range(x.dim()) if d != channel_axis % x.dim())
    return Request(prepare(x), spec, format or spec.format, dims, stored, key, save)
