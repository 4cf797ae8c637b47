"""Seams between fused neighbours: what one autograd node leaves for the next instead of a float tensor.

A layer's products and the normalization behind them are nodes of their own. Where nobody but the next of them uses the
tensor between two (`fourbit.chains` knows), it is never made: a `Pending` tensor stands for it in the graph of
autograd, and a handover carries the content, forward and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fourbit.backends import Operation
from fourbit.formats import Format
from fourbit.ops._product import Layout, Raw
from fourbit.quantizers import Packed, Quantized, pack_mask, unpack_mask

NORM_SUPPORTED: Operation[[Tensor, Format | None], bool] = Operation(
    "norm_supported", reference="(without it no chain begins, and torch's own modules compute)"
)
"""Whether there are kernels for the normalization of such a tensor, whose product is to be rounded to a format."""


class Visible(Protocol):
    """A result between two nodes."""

    def is_visible(self) -> bool:
        """Whether somebody else than the node behind may see the result or its gradient."""
        ...


class Mailbox:
    """Where a node leaves something for another node of the same backward pass; another pass does not find it."""

    __slots__ = ("_backward", "_content")

    def __init__(self) -> None:
        self._content: Any = None
        self._backward = -1

    def leave(self, content: Any) -> None:
        """For the node that comes for it."""
        self._content, self._backward = content, torch._C._current_graph_task_id()

    def take(self) -> Any:
        """What was left in this backward pass; None: nothing."""
        content, self._content = self._content, None
        return content if self._backward == torch._C._current_graph_task_id() else None


class GradientReturn:
    """The way back of an operand's gradient. Both nodes hold it; it refers to neither.

    Attributes:
        grad: (gradient, scale), not yet masked.
        clipped: the gradient of the clip value, where the layer behind masked the gradient itself.
    """

    def __init__(self) -> None:
        self.grad, self.clipped = Mailbox(), Mailbox()


@dataclass(slots=True, eq=False)
class OperandHandover:
    """The operand of a layer, quantized by the node before it.

    Attributes:
        layout: of the operand.
        quantized: codes, scale, packed codes and mask, as `LayerState.quantize` would have made them; until they are taken.
        link: the step of the chain whose result the operand is. It says at the time of the backward pass whether somebody
            else can see the gradient of that result, which must then be a tensor.
        back: the way back.
        is_bounded: whether nothing lies beyond the clip value, because an activation ends below it.
    """

    layout: Layout
    quantized: Quantized | None
    link: Visible
    back: GradientReturn
    is_bounded: bool = False

    def inside(self, mask: Tensor, codes: Packed) -> Tensor:
        """The mask of the straight-through gradient of the operand itself, as bits.

        `mask` is that of what the activation before it let pass. What it did not let pass became 0, or where it ends.
        """
        q = codes.unpack(torch.int8)
        return pack_mask(torch.ones_like(q, dtype=torch.bool) if self.is_bounded else unpack_mask(mask, q) | (q == 0))

    def take(self) -> Quantized:
        """The operand, for the one layer that it is for."""
        assert self.quantized is not None, "an operand can be taken only once"
        quantized, self.quantized = self.quantized, None
        return quantized


@dataclass(slots=True, eq=False)
class ResultHandover:
    """The result of a layer's fprop for the node behind it: round(scale * raw) to `output`, not yet carried out.

    Attributes:
        needs: whether the layer will need the gradient for dgrad and for wgrad.
        quantized: the way back: the gradient of the result, quantized for dgrad and wgrad.
        g: or as it is, with its largest magnitude.
    """

    raw: Raw = field(default_factory=lambda: Raw(torch.empty(0)))
    scale: float = 1.0
    output: Format | None = None
    needs: tuple[bool, bool] = (True, True)
    g: Mailbox = field(default_factory=Mailbox)
    quantized: Mailbox = field(default_factory=Mailbox)
