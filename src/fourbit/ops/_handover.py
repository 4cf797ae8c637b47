"""Seams between fused neighbours: what one autograd node leaves for the next instead of a float tensor.

A layer's products and the normalization behind them are nodes of their own. Where `fourbit.nn` knows that nobody else
reads the tensor between two nodes, it is never made: a 0-d token stands for it in the graph of autograd, and a handover
carries the content, forward and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fourbit.formats import Format
from fourbit.ops._product import Layout, Raw
from fourbit.quantizers import Quantized


@dataclass
class GradientReturn:
    """The way back of an operand's gradient: scale * grad, not yet masked. Both nodes hold it; it refers to neither."""

    grad: Tensor | None = None
    scale: float = 1.0

    def take(self) -> tuple[Tensor, float]:
        """The gradient that was left."""
        assert self.grad is not None, "the layer behind a fused normalization was not differentiated"
        grad, self.grad = self.grad, None
        return grad, self.scale


@dataclass
class OperandHandover:
    """The operand of a layer, quantized by the node before it.

    Attributes:
        token: stands for the operand in autograd.
        layout: of the operand.
        quantized: codes, scale, packed codes and mask, as `LayerState.quantize` would have made them; until they are taken.
        back: the way back. The node that made the operand keeps this alone: if it held the token, which leads to the node
            itself, nothing of the graph would ever be freed.
    """

    token: Tensor
    layout: Layout
    quantized: Quantized | None
    back: GradientReturn

    def take(self) -> Quantized:
        """The operand, for the one layer that it is for."""
        assert self.quantized is not None, "an operand can be taken only once"
        quantized, self.quantized = self.quantized, None
        return quantized

    def give_back(self, grad: Tensor, scale: float) -> Tensor:
        """Leave the gradient; returns what stands for it in autograd."""
        self.back.grad, self.back.scale = grad, scale
        return torch.zeros_like(self.token)


@dataclass
class ResultHandover:
    """The result of a layer's fprop for the node behind it: round(scale * raw) to `output`, not yet carried out.

    Attributes:
        needs: whether the layer will need the gradient for dgrad and for wgrad.
        g: the way back: the gradient of the result, in full precision,
        quantized: or already quantized for dgrad and wgrad.
    """

    raw: Raw = field(default_factory=lambda: Raw(torch.empty(0)))
    scale: float = 1.0
    output: Format | None = None
    needs: tuple[bool, bool] = (True, True)
    g: Tensor | None = None
    quantized: tuple[Quantized | None, Quantized | None] | None = None
