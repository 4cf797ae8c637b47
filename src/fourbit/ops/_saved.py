"""What a forward pass leaves for backward, and how autograd keeps it: a fixed number of tensors, and an outline without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit.ops._product import Layout, Operand
from fourbit.quantizers import Packed

NUM_TENSORS = 16
"""How many tensors a `Saved` has: numbers, scale and scales of blocks of four operands, two masks, and two slopes."""


@dataclass
class Saved:
    """What a forward pass leaves for backward.

    Attributes:
        x, w: the operands of wgrad and dgrad, [N, K] and [M, K] in a linear layer: codes, packed where a nibble holds them.
        x_codes, w_codes: the operands of fprop, where a clip value is learned.
        x_mask, w_mask: bits of the straight-through gradients; None where everything passes.
        x_layout, w_layout: of the gradients.
        w_slope, x_slope: what dw is multiplied by, where w has an estimator; what dw or dx is multiplied by in the gradient of
            a step size, where there is one.
    """

    x: Operand
    w: Operand
    x_codes: Operand | None
    w_codes: Operand | None
    x_mask: Tensor | None
    w_mask: Tensor | None
    x_layout: Layout
    w_layout: Layout
    w_slope: Tensor | None = None
    x_slope: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        """All of them, `NUM_TENSORS`."""
        kept = self.x, self.w, self.x_codes, self.w_codes
        return [
            *(t for operand in kept for t in _tensors(operand)),
            self.x_mask,
            self.w_mask,
            self.w_slope,
            self.x_slope,
        ]

    def outline(self) -> tuple[Any, ...]:
        """The rest."""
        kept = self.x, self.w, self.x_codes, self.w_codes
        return [_outline(operand) for operand in kept], self.x_layout, self.w_layout

    @staticmethod
    def of(outline: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Saved:
        """What `outline` and `tensors` took apart."""
        kept, x_layout, w_layout = outline
        *data, x_mask, w_mask, w_slope, x_slope = tensors
        x, w, x_codes, w_codes = (_rejoined(k, data[3 * i : 3 * i + 3]) for i, k in enumerate(kept))
        assert x is not None and w is not None
        return Saved(x, w, x_codes, w_codes, x_mask, w_mask, x_layout, w_layout, w_slope, x_slope)

    @staticmethod
    def of_several(outlines: Sequence[tuple[Any, ...]], tensors: Sequence[Tensor | None]) -> list[Saved]:
        """Likewise of several, whose tensors follow one another."""
        return [Saved.of(o, tensors[NUM_TENSORS * i : NUM_TENSORS * (i + 1)]) for i, o in enumerate(outlines)]


def _tensors(kept: Operand | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if kept is None:
        return None, None, None
    if not isinstance(kept.q, Packed):
        return kept.q, kept.scale, None
    return kept.q.data, kept.scale, None if kept.q.blocks is None else kept.q.blocks.data


def _outline(kept: Operand | None) -> Operand | None:
    if kept is None:
        return None
    q = kept.q
    bare: Packed | Tensor = _NOTHING
    if isinstance(q, Packed):
        blocks = None if q.blocks is None else q.blocks._replace(data=_NOTHING)
        bare = Packed(_NOTHING, q.shape, q.stride, q.signed, q.grid, blocks)
    return Operand(bare, None, kept.format, kept.on_grid, None, kept.orientation)


_NOTHING = torch.empty(0)


def _rejoined(outline: Operand | None, tensors: Sequence[Any]) -> Operand | None:
    if outline is None:
        return None
    q, (data, scale, block_data) = outline.q, tensors
    whole = data
    if isinstance(q, Packed):
        blocks = None if q.blocks is None else q.blocks._replace(data=block_data)
        whole = Packed(data, q.shape, q.stride, q.signed, q.grid, blocks)
    return Operand(whole, scale, outline.format, outline.on_grid, None, outline.orientation)
