"""`ibm2020` as one would write it for an experiment: float32 throughout, eager operations, straight-through by detach().

The same numbers as the product's recipe (tests/test_benchmarks.py compares the two), without its kernels, its carriers and
its packed memory: each operand is rounded to the 4-bit grid and stays float32, and autograd keeps float32 tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

import fourbit as fb
from benchmarks._peers import swap
from fourbit.quantizers import best_clip_value

_FP16_MAX = (2 - 2**-8) * 2.0**32  # the code above is NaN
_FP16_MIN = (1 + 2**-9) * 2.0**-31  # the code below is zero


def fp16_169(x: Tensor) -> Tensor:
    """Nearest number with 6 exponent and 9 fraction bits, without subnormals."""
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^exponent
    quantum = torch.where(x.abs() < _FP16_MIN, _FP16_MIN, power * 2.0**-9)
    return (torch.round(x / quantum) * quantum).clamp(-_FP16_MAX, _FP16_MAX)


def radix4(x: Tensor, shift: float = 1.0) -> Tensor:
    """Nearest of 0 and +-4^-3 .. 4^3, deciding at 4^n / 1.6, on a grid that is `shift` times as large."""
    power = torch.floor(torch.log2(1.6 * x.abs() / shift) / 2)
    return torch.where(power < -3, 0.0, torch.sign(x) * torch.pow(4.0, power.clamp(-3, 3)) * shift)


def pact(x: Tensor, alpha: Tensor, signed: bool) -> Tensor:
    """Clip to [0, alpha] or [-alpha, alpha], then 16 or 15 levels."""
    scale = (alpha / (7 if signed else 15)).detach()
    clipped = torch.minimum(torch.maximum(x, -alpha if signed else torch.zeros_like(alpha)), alpha)
    return clipped + (torch.round(clipped / scale) * scale - clipped).detach()


def sawb(w: Tensor) -> Tensor:
    """15 levels up to alpha = 12.035 sqrt(E[w^2]) - 12.03 E|w|."""
    alpha = (12.035 * w.square().mean().sqrt() - 12.03 * w.abs().mean()).detach()
    scale = torch.where(alpha > 0, alpha, w.abs().max()).detach() / 7
    return w + (torch.round((w / scale).clamp(-7, 7)) * scale - w).detach()


class Scale:
    """GradScale: a power of two that keeps the largest gradient in (32, 64]."""

    def __init__(self) -> None:
        self.exponent: int | None = None

    def value(self, g: Tensor) -> float:
        """The scale for this gradient; moves by one for the next."""
        largest = float(g.abs().max())
        if self.exponent is None:
            self.exponent = math.floor(math.log2(64 / largest)) if largest > 0 else 0
        scale = 2.0**self.exponent
        if largest > 0:
            self.exponent += (largest * scale <= 32) - (largest * scale > 64)
        return scale


class Product(torch.autograd.Function):
    """x * w, rounded to FP16; backward with rounded gradients, in two phases where `four_bit`."""

    @staticmethod
    def forward(ctx, x, w, layer, scale, four_bit):
        ctx.save_for_backward(x, w)
        ctx.layer, ctx.scale, ctx.four_bit = layer, scale, four_bit
        if isinstance(layer, nn.Linear):
            return fp16_169(F.linear(x, w))
        return fp16_169(F.conv2d(x, w, None, layer.stride, layer.padding, layer.dilation, layer.groups))

    @staticmethod
    def backward(ctx, g):
        (x, w), layer = ctx.saved_tensors, ctx.layer
        scale = ctx.scale.value(g)
        g = g * scale
        even, odd = (radix4(g), radix4(g, 0.5)) if ctx.four_bit else (fp16_169(g),) * 2
        dx = None
        if isinstance(layer, nn.Linear):
            if ctx.needs_input_grad[0]:
                dx = even @ w
            dw = odd.flatten(0, -2).T @ x.flatten(0, -2)
        else:
            geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
            if ctx.needs_input_grad[0]:
                dx = conv2d_input(x.shape, w, even, *geometry)
            dw = conv2d_weight(x, w.shape, odd, *geometry)
        return None if dx is None else fp16_169(dx) / scale, fp16_169(dw) / scale, None, None, None


class FakeQuantized(nn.Module):
    """A layer in 4 bits, or with FP16 operands where not `four_bit`."""

    def __init__(self, layer: nn.Module, four_bit: bool):
        super().__init__()
        self.layer: Any = layer
        self.four_bit, self.scale = four_bit, Scale()
        self.alpha = nn.Parameter(torch.tensor(0.0)) if four_bit else None
        self.signed: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        w: Tensor = self.layer.weight
        if self.alpha is None:
            x, w = (t + (fp16_169(t) - t).detach() for t in (x, w))
        else:
            if self.signed is None:  # the first batch decides
                self.signed = bool((x < 0).any())
                format = fb.formats.get("int4_sym" if self.signed else "uint4")
                self.alpha.data.fill_(best_clip_value(x, format))
            x, w = pact(x, self.alpha, self.signed), sawb(w)
        y = Product.apply(x, w, self.layer, self.scale, self.four_bit)
        if self.layer.bias is None:
            return y
        return y + (self.layer.bias if y.dim() != 4 else self.layer.bias.view(-1, 1, 1))


def convert(model: nn.Module, four_bit: Sequence[str]) -> nn.Module:
    """Every Linear and Conv2d: these in 4 bits, the others with FP16 operands."""
    names = [name for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    for name in names:
        swap(model, [name], functools.partial(FakeQuantized, four_bit=name in four_bit))
    return model
