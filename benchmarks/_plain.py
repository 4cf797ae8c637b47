"""The reference's arithmetic as plain functions of tensors, for torch.compile.

The reference itself asks for backends and derives its constants in Python, which torch.compile would trace again and again;
here the constants are taken beforehand. tests/test_benchmarks.py checks that these functions give the reference's numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import formats
from fourbit.quantizers import float_bits, grid_of, pack

Function = Callable[[Tensor], Any]


def _amax(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x)
    return torch.maximum(high, -low)


def _bits(mask: Tensor) -> Tensor:
    """`pack_mask` without a sum over eight, of which the compiler makes a slow loop."""
    flat = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 64)).view(-1, 8)
    out = flat[:, 0]
    for i in range(1, 8):
        out = out | (flat[:, i] << i)
    return out


def pact(alpha: float) -> Function:
    """Numbers, packed codes, mask, largest magnitude."""
    inverse = float(torch.tensor(alpha / 15).reciprocal())

    def function(x: Tensor) -> Any:
        q = (x * inverse).clamp(0, 15).round().to(torch.uint8)
        return q, pack(q, formats.UINT4).data, _bits((x >= 0) & (x < alpha)), _amax(x)

    return function


def sawb(x: Tensor) -> Any:
    """Numbers, packed codes, scale."""
    wide = x.to(torch.float64)
    alpha = (12.035 * wide.square().mean().sqrt() - 12.03 * wide.abs().mean()).to(torch.float32)
    scale = torch.where(alpha > 0, alpha, _amax(x)) / 7
    q = (x * scale.reciprocal()).clamp(-7, 7).round().to(torch.int8)
    return q, pack(q, formats.INT4_SYM).data, scale


def powers(format: formats.Format) -> Function:
    """Nearest power of a radix in bfloat16."""
    grid: Any = grid_of(format)
    start, smallest, largest = (float_bits(v) for v in (grid.threshold, grid.smallest, grid.largest))
    octaves = (float_bits(grid.ratio) - float_bits(1.0)) & -(1 << 23)

    def function(x: Tensor) -> Tensor:
        magnitude = x.abs().view(torch.int32)
        y = (((magnitude - start) & -octaves) + smallest).clamp(max=largest).view(torch.float32)
        return torch.where(magnitude >= start, y, 0.0).copysign(x).to(torch.bfloat16)

    return function


def pair(scale: float) -> Function:
    """Both phases and the largest magnitude."""
    even, odd = powers(formats.FP4_R4_EVEN), powers(formats.FP4_R4_ODD)

    def function(g: Tensor) -> Any:
        y = g * scale
        return even(y), odd(y), _amax(g)

    return function


def binary(format: formats.Format, scale: float, dtype: torch.dtype) -> Function:
    """Nearest number of a binary float format, and the largest magnitude."""
    assert isinstance(format, formats.FloatFormat)
    lowest = ((1 if format.subnormals else 0) - format.exponent_bias + 127) << 23
    fraction, low, high = format.mantissa_bits << 23, float(format.min), float(format.max)
    smallest = 0.0 if format.subnormals else float(format.smallest)

    def function(x: Tensor) -> Any:
        y = x * scale
        quantum = (y.view(torch.int32) & 0x7F800000).clamp(min=lowest).sub(fraction).view(torch.float32)
        if smallest:
            quantum = torch.where(y.abs() < smallest, smallest, quantum)
        return ((y / quantum).round() * quantum).clamp(low, high).to(dtype), _amax(x)

    return function
