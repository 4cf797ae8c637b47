"""Matrix products with rounded sums on the CPU: the chains of many results side by side, one to each lane of a vector.

The longer of the two free axes runs over the lanes; a product of two numbers does not depend on their order, so turning the
whole product over changes nothing. Lanes are padded to panels of 16, 32 or 64.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.backends import Plan
from fourbit.kernels._check import pointer, require
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._quantize import float_grid, kernels
from fourbit.ops import ACCUMULATE, Accumulation
from fourbit.quantizers import Rounding

_COSTS = {64: 1.0, 32: 1.3, 16: 2.1}
"""Measured time per lane: narrow panels leave the processor waiting for one addition after another."""


@ACCUMULATE.kernel("cpu")
def accumulate(a: Tensor, b: Tensor, accumulation: Accumulation, key: int | None) -> Plan[Tensor]:
    """[G, M, K] x [G, K, N] with sums in a binary float format."""
    grid = float_grid(accumulation.format)
    if grid is None or accumulation.rounding is Rounding.TRUNCATE:
        return f"no kernel rounds sums to {accumulation.format.name} by {accumulation.rounding}"
    if not (a.is_cpu and b.is_cpu) or a.dtype != torch.float32 or b.dtype != torch.float32 or a.is_neg() or b.is_neg():
        return "the operands are not float32 numbers on the CPU, as they lie there"
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        return "the sizes of the operands do not go together"
    return lambda: _accumulate(a, b, accumulation, key, grid)


def _accumulate(a: Tensor, b: Tensor, accumulation: Accumulation, key: int | None, grid: Any) -> Tensor:
    G, M, K = a.shape
    N = b.shape[2]
    if G * M * N == 0 or K == 0:
        return a.new_zeros(G, M, N)
    turned = M > N
    left, right = (b.mT, a.mT) if turned else (a, b)
    num_rows, num_lanes = left.shape[1], right.shape[2]
    width = min(_COSTS, key=lambda w: -(-num_lanes // w) * w * _COSTS[w])
    num_panels = -(-num_lanes // width)
    rows_GMK = left.contiguous()
    fill = num_panels * width - num_lanes
    padded = F.pad(right, (0, fill)) if fill else right
    columns_GPKW = padded.unflatten(2, (num_panels, width)).transpose(1, 2).contiguous()
    out = left.new_empty(G, num_rows, num_panels * width, dtype=torch.float32)
    require(G * num_rows * num_panels * width * (K + 1) < 2**63, "a product of fewer than 2^63 additions")
    arguments = c.Accumulate(
        rows=pointer(rows_GMK, "rows", torch.float32, G * num_rows * K, torch.contiguous_format),
        columns=pointer(columns_GPKW, "columns", torch.float32, G * num_panels * K * width, torch.contiguous_format),
        out=pointer(out, "out", torch.float32, G * num_rows * num_panels * width, torch.contiguous_format),
        groups=G,
        num_rows=num_rows,
        panels=num_panels,
        depth=K,
        chunk=min(accumulation.chunk or K, K),
        width=width,
        grid=grid,
        stochastic=accumulation.stochastic,
        key=key if accumulation.stochastic and key is not None else 0,
        group_step=M * N,
        row_step=1 if turned else N,
        lane_step=N if turned else 1,
    )
    kernels().accumulate(ctypes.byref(arguments))
    y = out[:, :, :num_lanes]
    return (y.mT if turned else y).contiguous()
