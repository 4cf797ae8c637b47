"""Operands in the orientation of their products, rotated where their spec says so; and gradients turned back.

    y = Q(x R) Q(w R)^T                      R the rotation of fprop, along the features
    dx = R^T (mask * (g Q(w R)))             where dgrad has w as fprop had it; its result lies in fprop's rotated space
    dx = R^T (mask * (R (g Q(w))))           where it has not, and a clip mask of fprop's is to be applied in that space

and likewise dw. Rotations of dgrad and of wgrad, along the axes that these sum over, are on both operands and cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.ops._contraction import Contraction, Which
from fourbit.ops._orientation import Orientation
from fourbit.ops._product import Layout
from fourbit.ops._spec import OPERANDS, LayerSpec
from fourbit.quantizers import Packed, unpack_mask

WHICH: dict[str, Which] = {slot: which for which, slots in OPERANDS.items() for slot in slots}  # type: ignore[misc]
"""The product that a slot enters."""


def oriented(slot: str, t: Tensor, contraction: Contraction, spec: LayerSpec) -> tuple[Tensor, Orientation]:
    """An operand as [groups, rows, spots, sums] of its product.

    Raises:
        UserError: the rotation does not divide the features that it runs along.
    """
    which = WHICH[slot]
    orientation = contraction.orientation(which, slot[0], t.shape)
    transform = spec.transform(slot)
    if transform is not None and not orientation.is_open:
        transform.require_divides(orientation.shape[3], f"{which} of a layer sums over")
    return orientation.of(t), orientation


def turned(spec: LayerSpec, which: Which, mask: Tensor | None) -> bool:
    """Whether the result of dgrad or wgrad lies, or is to be masked, in fprop's rotated space, or in the order of its tiles."""
    fprop = spec.x_fprop if which == "dgrad" else spec.w_fprop
    if fprop is None or not fprop.needs_orientation:
        return False
    return mask is not None or spec.rotated_result(which) is not None


def unrotated(
    which: Which,
    y: Tensor,
    mask: Tensor | None,
    codes: Packed | Tensor | None,
    contraction: Contraction,
    spec: LayerSpec,
    key: int | None,
    layout: Layout,
    dtype: torch.dtype,
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """dx or dw, and the sum over what was clipped of sign(code) * result, if `codes` are given; with a `slope`, the sum over
    all of slope * result.

    Args:
        y: result of the product.
        mask: bits of the straight-through gradient, in fprop's order and space.
        key: of the signs of fprop's rotation.
        layout: of the result.
    """
    operand = "x" if which == "dgrad" else "w"
    transform = spec.transform(f"{operand}_fprop")
    orientation = contraction.orientation("fprop", operand, layout.shape)
    m, clipped = orientation.of(y), None
    if transform is not None and spec.rotated_result(which) is None:
        m = transform.apply(m, key)
    if slope is not None:
        clipped, codes = (m * slope).sum(dtype=torch.float32), None
    if mask is not None:
        outside = unpack_mask(mask, m.contiguous()).logical_not_()
        if codes is not None:
            q = codes.unpack(torch.float32) if isinstance(codes, Packed) else codes
            clipped = (m * outside * q.sign()).sum(dtype=torch.float32)
        m = m.masked_fill(outside, 0.0)
    if transform is not None:
        m = transform.undo(m, key)
    return layout.match(orientation.back(m).to(dtype)), clipped
