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

from fourbit.backends import Plan
from fourbit.kernels._check import checked, is_plain, mask_bytes, packed_bytes
from fourbit.kernels.cuda._device import capability, kernels, launch, takes
from fourbit.kernels.cuda._grids import parameters, table_of
from fourbit.kernels.cuda._multiply import fits_fp8, is_worth_fp8
from fourbit.quantizers import (
    BLOCK,
    MOMENTS,
    ROUND,
    ROUND_PAIR,
    UNPACK,
    Bound,
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


NO_TRITON = "Triton is not there to compile kernels"


def _why_unreadable(x: Tensor) -> str:
    """Why no kernel can read `x` as it is; "" where they can."""
    if not takes(x):
        return "the tensor is on another device, or on a GPU that has no kernels"
    if x.dtype not in DTYPES:
        return f"the tensor is {x.dtype}: float32, bfloat16 and float16 are read"
    if x.numel() == 0 or not is_plain(x):
        return "the tensor is empty, or its elements do not fill one piece of memory"
    return ""


def _why_not_rounded(request: Request, scale: Tensor) -> str:
    """Why no kernel may round this, to a grid that it knows; "" where one may."""
    x, spec = request.x, request.spec
    if declined := _why_unreadable(x):
        return declined
    if scale.numel() != 1 or scale.dtype != torch.float32 or scale.device != x.device:
        return "there is not one float32 scale, on the device of the tensor"
    if spec.samples != 1 or spec.rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
        return f"no kernel rounds by {spec.rounding}, or several times"
    if request.key is None and spec.stochastic:
        return "random words without a key"
    if parameters(request.format, spec.stochastic) is None:
        return f"no kernel knows the grid of {request.format.name}"
    return "" if kernels() is not None else NO_TRITON


def _limit(request: Request, scale: Tensor) -> Bound | None:
    return request.spec.scaling.bound(scale, request.format, request.stored) if request.save else None


@ROUND.kernel("cuda")
def round_one(request: Request, scale: Tensor) -> Plan[Rounded]:
    """One operand, to one format."""
    if declined := _why_not_rounded(request, scale):
        return declined
    bound = _limit(request, scale)
    if bound is not None and isinstance(bound.value, Tensor) and bound.value.numel() != 1:
        return "there is more than one clip value"
    return lambda: _round((request,), scale, bound)[0]


@ROUND_PAIR.kernel("cuda")
def round_pair(first: Request, second: Request, scale: Tensor) -> Plan[tuple[Rounded, ...]]:
    """Two formats from one read."""
    both = (first, second)
    for request in both:
        if declined := _why_not_rounded(request, scale):
            return declined
    if any(r.spec.stochastic or r.save for r in both):
        return "more than the numbers is wanted, or the rounding draws random words"
    x = first.x
    if second.x is not x:
        return "these are two tensors"
    if x.dim() in (2, 3) and x.is_contiguous() and capability(x.device) >= (8, 9):
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        if is_worth_fp8(rows, columns) and all(fits_fp8(r.format) is torch.float8_e4m3fn for r in both):
            return lambda: _round_transposed(first, second, scale, rows, columns)
    return lambda: _round(both, scale, None)


def _zero_amax(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=x.device)


def _round(requests: tuple[Request, ...], scale: Tensor, bound: Bound | None) -> tuple[Rounded, ...]:
    one, x = requests[0], requests[0].x
    grids: list[Any] = [parameters(r.format, r.spec.stochastic) for r in requests]
    tables = [table_of(r.format, grid, x.device) for r, grid in zip(requests, grids, strict=True)]
    q = [torch.empty_like(x, dtype=carrier_dtype(r.format)) if r.carrier else None for r in requests]
    n, blocks = x.numel(), -(-x.numel() // BLOCK)
    limit = None if bound is None else torch.as_tensor(bound.value, dtype=torch.float32, device=x.device)
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


@UNPACK.kernel("cuda")
def unpack(packed: Packed, dtype: torch.dtype) -> Plan[Tensor]:
    """Packed codes as numbers of any dtype that holds them."""
    if not takes(packed.data) or packed.grid is not None or packed.shape.numel() == 0:
        return "the codes are on another device, are not those of integers, or are none"
    wanted = (torch.int8, torch.uint8, *DTYPES)
    if dtype not in wanted and not (dtype is torch.float8_e4m3fn and capability(packed.data.device) >= (8, 9)):
        return f"no kernel of this device unpacks to {dtype}"
    return NO_TRITON if kernels() is None else lambda: _unpack(packed, dtype)


def _unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    out = torch.empty_strided(packed.shape, packed.stride, dtype=dtype, device=packed.data.device)
    n = out.numel()
    programs = -(-n // (BLOCK * ROWS))
    codes = checked(packed.data, "packed", torch.uint8, packed_bytes(n), out)
    arguments = (codes, n, checked(out, "out", dtype, n, out))
    launch(kernels().unpack_kernel, programs, out, *arguments, SIGNED=packed.signed, ROWS=ROWS, num_warps=8)  # type: ignore[union-attr]
    return out


@MOMENTS.kernel("cuda")
def moments(x: Tensor) -> Plan[Moments]:
    """Means of x^2 and |x|, and max|x|, from one read."""
    if declined := _why_unreadable(x):
        return declined
    return NO_TRITON if kernels() is None else lambda: _moments(x)


def _moments(x: Tensor) -> Moments:
    n, block = x.numel(), 4096
    programs = -(-n // block)
    sums = torch.empty((2, programs), dtype=torch.float64, device=x.device)
    amax = _zero_amax(x)
    arguments = (x, n, sums[0], sums[1], amax.view(torch.int32))
    launch(kernels().moments_kernel, programs, x, *arguments, BLOCK=block, num_warps=8)  # type: ignore[union-attr]
    means = sums.sum(1).div_(n)
    return Moments(means[0], means[1], amax)
