"""`quantize`: one tensor, as a QuantSpec says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.quantizers._request import QTensor, request_for, require_numbers, run, run_pair
from fourbit.quantizers._spec import QuantSpec
from fourbit.quantizers._tiles import tile_of
from fourbit.quantizers._transform import Rotation


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    sums: int | Sequence[int] = -1,
    stored: Tensor | None = None,
    key: int | None = None,
    format: Format | None = None,
) -> QTensor:
    """Quantize `x` as `spec` says. Not differentiable: layers supply the straight-through gradient.

    Args:
        x: any shape, any floating dtype; the arithmetic is float32.
        sums: the axes that a matrix product sums over, along which blocks and rotations run; all others are rows. Of several,
            the last runs fastest. It does not matter where one scale belongs to the tensor.
        stored: what the scaling remembers: PACT's alpha, GradScale's exponent.
        key: stream key of the random words, for stochastic rounding.
        format: replaces `spec.format` (PACT's signed form).

    Returns:
        QTensor, its numbers in the order of axes of `x`; rotated, where there is a transform. NaN or infinity in `x` make the
        scale NaN (of the tensor, or of their tile), so that they reach whatever is computed from `dequantize()` and are never
        silently saturated.

    Raises:
        UserError: integer input, an axis that is not there, a transform that does not divide the axis, stochastic rounding
            without a key.

    >>> from fourbit.quantizers import Amax, BlockScale, Block
    >>> x = torch.tensor([[-3.0, 0.4, 1.0, 7.0]])
    >>> quantize(x, QuantSpec("int4_sym", Amax())).q
    tensor([[-3,  0,  1,  7]], dtype=torch.int8)
    >>> mxfp4 = QuantSpec("fp4_e2m1", BlockScale("e8m0"), Block(2))
    >>> quantize(x, mxfp4).dequantize()
    tensor([[-3.0000,  0.5000,  1.0000,  6.0000]])
    """
    if not spec.needs_orientation:
        return run(request_for(x, spec, stored=stored, key=key, format=format)).tensor
    require_numbers(x, "quantize")
    axes = [sums] if isinstance(sums, int) else list(sums)
    if x.dim() == 0 or any(not -x.dim() <= axis < x.dim() for axis in axes) or not axes:
        raise UserError(f"sums is {sums}, but the tensor has {x.dim()} axes")
    axes = [axis % x.dim() for axis in axes]
    rows = [d for d in range(x.dim()) if d not in axes]
    order = [*rows, *axes]
    t = x.detach().permute(order)
    num_sums = math.prod(x.shape[axis] for axis in axes)
    if spec.transform is not None:
        spec.transform.require_divides(num_sums, "lie along `sums`")
    m = t.reshape(1, math.prod(x.shape[d] for d in rows), 1, num_sums)
    rotation = None if spec.transform is None else Rotation(spec.transform, key)
    found = run(request_for(m, spec, tile_of(spec.granularity), stored, key, format, rotation=rotation)).tensor
    back = [order.index(d) for d in range(x.dim())]
    q = found.q.reshape(t.shape).permute(back)
    scale = found.scale
    if scale.numel() > 1 or (scale.dim() and found.each is not None and found.each[1].is_row):
        scale = scale.reshape([x.shape[d] for d in rows] + [1] * len(axes)).permute(back)
    return QTensor(q, scale, found.format)


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
    a, b = run_pair(request_for(x, first, stored=stored), request_for(x, second, stored=stored))
    return a.tensor, b.tensor, torch.as_tensor(a.amax)
