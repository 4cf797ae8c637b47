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


@dataclass(slots=True, eq=False)
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
        x_codes = None if self.x_codes is self.x else self.x_codes
        w_codes = None if self.w_codes is self.w else self.w_codes
        return [
            *(*_tensors(self.x), *_tensors(self.w), *_tensors(x_codes), *_tensors(w_codes)),
            *(self.x_mask, self.w_mask, self.w_slope, self.x_slope),
        ]

    def outline(self) -> tuple[Any, ...]:
        """The rest."""
        x_codes = _SAME if self.x_codes is self.x else _outline(self.x_codes)
        w_codes = _SAME if self.w_codes is self.w else _outline(self.w_codes)
        return _outline(self.x), _outline(self.w), x_codes, w_codes, self.x_layout, self.w_layout

    @staticmethod
    def of(outline: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Saved:
        """What `outline` and `tensors` took apart."""
        of_x, of_w, of_x_codes, of_w_codes, x_layout, w_layout = outline
        x, w = _rejoined(of_x, *tensors[0:3]), _rejoined(of_w, *tensors[3:6])
        assert x is not None and w is not None
        x_codes = x if of_x_codes is _SAME else _rejoined(of_x_codes, *tensors[6:9])
        w_codes = w if of_w_codes is _SAME else _rejoined(of_w_codes, *tensors[9:12])
        x_mask, w_mask, w_slope, x_slope = tensors[12:]
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


_SAME: Any = "same"
"""In the place of the operand of fprop where that of the backward product is the same."""


def _outline(kept: Operand | None) -> tuple[Any, ...] | None:
    """An operand without its tensors."""
    if kept is None:
        return None
    q, packed = kept.q, None
    if isinstance(q, Packed):
        blocks = None if q.blocks is None else q.blocks._replace(data=_NOTHING)
        packed = q.shape, q.stride, q.signed, q.grid, blocks
    return packed, kept.format, kept.on_grid, kept.orientation


_NOTHING = torch.empty(0)


def _rejoined(outline: tuple[Any, ...] | None, data: Any, scale: Any, block_data: Any) -> Operand | None:
    if outline is None:
        return None
    packed, format, on_grid, orientation = outline
    if packed is not None:
        shape, stride, signed, grid, blocks = packed
        data = Packed(data, shape, stride, signed, grid, None if blocks is None else blocks._replace(data=block_data))
    return Operand(data, scale, format, on_grid, None, orientation)
