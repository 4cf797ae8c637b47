"""`QuantSpec` describes how one operand is quantized; `quantize` does it; `QTensor` is the result.

    q = round_to_format(x * (1 / scale), format),        x ~ scale * q

The reciprocal of the scale is taken in float32 and multiplied, which is what fast kernels do too; for the power-of-two
scales of GradScale the difference to a division is nil.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format, get
from fourbit.quantizers._round import Rounding, nearest_number, round_to_format
from fourbit.quantizers._scaling import FixedScale, Granularity, Scaling
from fourbit.quantizers._words import random_words, stream_key


@dataclass(frozen=True)
class QuantSpec:
    """One operand: grid, scale, who shares it, and rounding rule.

    Args:
        format: a Format or the name of one.
        scaling: where the scale comes from.
        granularity: "tensor" or "channel".
        rounding: a `Rounding`.
        samples: average of this many independent stochastic roundings (LUQ's SMP); 1 for other rules.

    >>> str(QuantSpec("fp4_e2m1"))
    'fp4_e2m1, fixed 1'
    """

    format: Format
    scaling: Scaling = field(default_factory=FixedScale)
    granularity: Granularity = "tensor"
    rounding: Rounding = Rounding.NEAREST
    samples: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get(self.format))
        if self.granularity not in ("tensor", "channel"):
            raise UserError(f"granularity must be 'tensor' or 'channel', not {self.granularity!r}")
        if self.samples < 1 or (self.samples > 1 and self.rounding is not Rounding.STOCHASTIC):
            raise UserError("samples must be 1, or more with stochastic rounding")
        if self.scaling.stored_kind == "alpha" and self.granularity != "tensor":
            raise UserError("PACT has one clip value per layer: use granularity='tensor'")

    @property
    def stochastic(self) -> bool:
        """Whether it needs random words."""
        return self.rounding is Rounding.STOCHASTIC

    def __str__(self) -> str:
        parts = [self.format.name, str(self.scaling)]
        if self.granularity != "tensor":
            parts.append(f"per {self.granularity}")
        if self.rounding is not Rounding.NEAREST:
            parts.append(self.rounding.value)
        if self.samples > 1:
            parts.append(f"{self.samples} samples")
        return ", ".join(parts)


class QTensor(NamedTuple):
    """x ~ scale * q: `q` float32 on the grid of `format` (a mean of grid values after SMP), `scale` float32.

    Where the scale is NaN, because the data held NaN or infinity, q means nothing.
    `scale` is 0-d, or has the dimensions of q with size 1 where it is shared.
    """

    q: Tensor
    scale: Tensor
    format: Format

    def dequantize(self) -> Tensor:
        """scale * q, float32."""
        return self.q * self.scale


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
    tensor([[-3.,  0.,  1.,  7.]])
    """
    if not x.is_floating_point():
        raise UserError(f"cannot quantize a tensor of {x.dtype}: convert it to a floating-point dtype first")
    format = format or spec.format
    dims = None
    if spec.granularity == "channel":
        if channel_axis is None:
            raise UserError("granularity 'channel' needs channel_axis")
        dims = tuple(d for d in range(x.dim()) if d != channel_axis % x.dim())
    x = x.detach().to(torch.float32)
    scale = spec.scaling.scale(x, format, dims, stored)
    scaled = x * scale.reciprocal()
    if not spec.stochastic:
        nearest = spec.rounding is Rounding.NEAREST
        q = nearest_number(scaled, format) if nearest else round_to_format(scaled, format, spec.rounding)
        return QTensor(q, scale, format)
    if key is None:
        raise UserError("stochastic rounding needs a key: pass key=stream_key(seed, ...)")
    samples = [
        round_to_format(scaled, format, spec.rounding, random_words(stream_key(key, i), x.shape, x.device))
        for i in range(spec.samples)
    ]
    q = samples[0]
    for other in samples[1:]:
        q = q.add_(other)
    return QTensor(q.div_(spec.samples) if spec.samples > 1 else q, scale, format)
