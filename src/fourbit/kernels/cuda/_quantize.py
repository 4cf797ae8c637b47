"""Rounding on a GPU: one kernel reads a tensor once and writes carriers, packed codes and mask, and leaves amax behind.

Scales are read by the kernel, so the host waits for nothing. What the kernels do not take (a scale per channel, several
samples, truncation) is left to the reference.

The gradients of a large Linear layer come out as 8-bit floats where these hold the numbers exactly, the second (that of
wgrad) transposed in memory, because FP8 tensor cores want both operands with the summed axis last. That is a choice of
carrier and of strides, not of numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.kernels._check import checked, is_plain, mask_bytes, packed_bytes
from fourbit.kernels.cuda._device import capability, kernels, launch, takes
from fourbit.kernels.cuda._grids import parameters, table_of
from fourbit.kernels.cuda._multiply import fits_fp8, is_worth_fp8
from fourbit.quantizers import (
    BLOCK,
    Moments,
    Packed,
    Request,
    Rounded,
    Rounding,
    carrier_dtype,
    has_integer_codes,
    stream_key,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS = 64
"""Blocks per program: 4096 elements, 16 per thread in 8 warps."""


def _takes(request: Request, scale: Tensor) -> bool:
    x, spec = request.x, request.spec
    return (
        takes(x)
        and x.dtype in DTYPES
        and x.numel() > 0
        and is_plain(x)
        and scale.numel() == 1
        and scale.dtype == torch.float32
        and scale.device == x.device
        and spec.samples == 1
        and spec.rounding in (Rounding.NEAREST, Rounding.STOCHASTIC)
        and (request.key is not None or not spec.stochastic)
        and parameters(request.format, spec.stochastic) is not None
        and kernels() is not None
    )


@backends.register("round", "cuda")
def round_one(request: Request, scale: Tensor) -> Rounded | None:
    """One operand, to one format."""
    found = _round((request,), scale) if _takes(request, scale) else None
    return None if found is None else found[0]


@backends.register("round_pair", "cuda")
def round_pair(first: Request, second: Request, scale: Tensor) -> tuple[Rounded, ...] | None:
    """Two formats from one read."""
    both = (first, second)
    if not all(_takes(r, scale) and not r.spec.stochastic and not r.save for r in both):
        return None
    x = first.x
    if second.x is not x:
        return None
    if x.dim() in (2, 3) and x.is_contiguous() and capability(x.device) >= (8, 9):
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        if is_worth_fp8(rows, columns) and all(fits_fp8(r.format) is torch.float8_e4m3fn for r in both):
            return _round_transposed(first, second, scale, rows, columns)
    return _round(both, scale)


def _zero_amax(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=x.device)


def _round(requests: tuple[Request, ...], scale: Tensor) -> tuple[Rounded, ...] | None:
    one, x = requests[0], requests[0].x
    grids: list[Any] = [parameters(r.format, r.spec.stochastic) for r in requests]
    tables = [table_of(r.format, grid, x.device) for r, grid in zip(requests, grids, strict=True)]
    q = [torch.empty_like(x, dtype=carrier_dtype(r.format)) if r.carrier else None for r in requests]
    n, blocks = x.numel(), -(-x.numel() // BLOCK)
    bound = one.spec.scaling.bound(scale, one.format, one.stored) if one.save else None
    limit = None if bound is None else torch.as_tensor(bound.value, dtype=torch.float32, device=x.device)
    if limit is not None and limit.numel() != 1:
        return None
    packed = mask = None
    if one.save and has_integer_codes(one.format):
        packed = torch.empty(packed_bytes(n), dtype=torch.uint8, device=x.device)
    if bound is not None:
        mask = torch.empty(mask_bytes(n) // 4, dtype=torch.int32, device=x.device)
    amax = _zero_amax(x)
    launch(
        kernels().round_kernel,  # type: ignore[union-attr]
        -(-blocks // ROWS),
        x,
        x,
        x.numel(),
        scale,
        None if limit is None else checked(limit, "bound", torch.float32, 1, x),
        amax.view(torch.int32),
        _key(one),
        q[0],
        q[1] if len(q) > 1 else None,
        packed,
        mask,
        tables[0],
        tables[1] if len(tables) > 1 else None,
        FIRST=grids[0],
        SECOND=grids[1] if len(grids) > 1 else None,
        STOCHASTIC=one.spec.stochastic,
        RULE=None if bound is None else bound.rule,
        ROWS=ROWS,
        num_warps=8,
    )
    saved = None if packed is None else Packed(packed, x.shape, x.stride(), one.format.min < 0)
    first = Rounded(q[0], amax, saved, None if mask is None else mask.view(torch.uint8))
    return (first, *(Rounded(other, amax) for other in q[1:]))


def _key(request: Request) -> int:
    """The stream key as the signed 64-bit integer with the same bits; 0 where nothing is drawn."""
    if not request.spec.stochastic or request.key is None:
        return 0
    key = stream_key(request.key, 0)
    return key - (1 << 64) if key >> 63 else key


def _round_transposed(
    first: Request, second: Request, scale: Tensor, rows: int, columns: int
) -> tuple[Rounded, Rounded]:
    x = first.x
    plain = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    turned = torch.empty((columns, rows), dtype=torch.float8_e4m3fn, device=x.device)
    amax = _zero_amax(x)
    grids: list[Any] = [parameters(r.format) for r in (first, second)]
    tables = [table_of(r.format, grid, x.device) for r, grid in zip((first, second), grids, strict=True)]
    launch(
        kernels().round_pair_transposed_kernel,  # type: ignore[union-attr]
        -(-rows // 64) * -(-columns // 64),
        x,
        x,
        rows,
        columns,
        scale,
        amax.view(torch.int32),
        plain,
        turned,
        *tables,
        FIRST=grids[0],
        SECOND=grids[1],
        TILE_ROWS=64,
        TILE_COLUMNS=64,
        num_warps=8,
    )
    return Rounded(plain, amax), Rounded(turned.t().view(x.shape), amax)


@backends.register("unpack", "cuda")
def unpack(packed: Packed, dtype: torch.dtype) -> Tensor | None:
    """Packed codes as numbers of any dtype that holds them."""
    if not takes(packed.data) or packed.grid is not None or packed.shape.numel() == 0 or kernels() is None:
        return None
    wanted = (torch.int8, torch.uint8, *DTYPES)
    if dtype not in wanted and not (dtype is torch.float8_e4m3fn and capability(packed.data.device) >= (8, 9)):
        return None
    out = torch.empty_strided(packed.shape, packed.stride, dtype=dtype, device=packed.data.device)
    n = out.numel()
    programs = -(-n // (BLOCK * ROWS))
    codes = checked(packed.data, "packed", torch.uint8, packed_bytes(n), out)
    arguments = (codes, n, checked(out, "out", dtype, n, out))
    launch(kernels().unpack_kernel, programs, out, *arguments, SIGNED=packed.signed, ROWS=ROWS, num_warps=8)  # type: ignore[union-attr]
    return out


@backends.register("moments", "cuda")
def moments(x: Tensor) -> Moments | None:
    """Means of x^2 and |x|, and max|x|, from one read."""
    if not takes(x) or x.dtype not in DTYPES or x.numel() == 0 or not is_plain(x) or kernels() is None:
        return None
    n, block = x.numel(), 4096
    programs = -(-n // block)
    sums = torch.empty((2, programs), dtype=torch.float64, device=x.device)
    amax = _zero_amax(x)
    arguments = (x, n, sums[0], sums[1], amax.view(torch.int32))
    launch(kernels().moments_kernel, programs, x, *arguments, BLOCK=block, num_warps=8)  # type: ignore[union-attr]
    means = sums.sum(1).div_(n)
    return Moments(means[0], means[1], amax)
