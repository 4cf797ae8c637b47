"""Matrix products on tensor cores, and which formats are exact in what these multiply.

    int8        torch._int_mm       4-bit integers              products and sums exact (int32)
    bfloat16    torch.mm            every format of 8 bits      products exact, sums in float32
    FP8         torch._scaled_mm    4-bit integers, radix-4     products exact, sums in the FP8 tensor cores' accumulator
    TF32        float32 operands    up to 11 significant bits   products exact, sums in float32

Hopper's FP8 accumulator keeps about 14 bits of a partial sum; without "fast accumulation", which is never asked for, the
library moves it to float32 every 128 products or so. So sums have a relative error near 2^-13 instead of 2^-24: less than
the rounding of results to FP16 1-6-9 (2^-10), but not exact, and used only where products are "fast".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from fourbit.formats import Format
from fourbit.kernels.cuda._device import capability
from fourbit.quantizers import carrier_dtype

_FP8_SMALLEST = 1024
"""Least size of every dimension of a product in FP8: below, turning the operands costs more than it gains."""


@lru_cache(maxsize=256)
def _holds(format: Format, dtype: torch.dtype) -> bool:
    grid = torch.tensor(format.grid, dtype=torch.float64)
    return bool((grid.to(dtype).double() == grid).all())


@lru_cache(maxsize=256)
def fits_fp8(format: Format) -> torch.dtype | None:
    """The 8-bit float dtype that holds every number of a format exactly, E4M3 before E5M2."""
    if format.bits > 8:
        return None
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if _holds(format, dtype):
            return dtype
    return None


@lru_cache(maxsize=256)
def fits_int8(format: Format) -> bool:
    """Whether the numbers of a format are integers in -128 .. 127."""
    return carrier_dtype(format).itemsize == 1 and format.max <= 127


def fits_bfloat16(format: Format) -> bool:
    """Whether bfloat16 holds every number of a format exactly."""
    return carrier_dtype(format) is not torch.float32


@lru_cache(maxsize=256)
def fits_tf32(format: Format) -> bool:
    """Whether every number of a format has at most 11 significant bits, in the range of normal float32 numbers."""
    if format.smallest < 2.0**-126 or max(format.max, -format.min) >= 2.0**127:
        return False
    return all((math.frexp(v)[0] * 2**11).is_integer() for v in format.grid)


def is_worth_fp8(*sizes: int) -> bool:
    """Whether matrices of these sizes are large enough, and divisible by 16 as the library asks."""
    return all(size >= _FP8_SMALLEST and size % 16 == 0 for size in sizes)


def takes_int8(m: int, k: int, n: int, device: torch.device) -> bool:
    """Whether the library multiplies int8 matrices [m, k] and [n, k]^T: m > 16, k and n multiples of 8, exact sums."""
    return not (m <= 16 or k % 8 or n % 8 or k * 128 * 128 >= 2**31 or capability(device) < (7, 5))


def fp8_of(a: Format, b: Format, device: torch.device) -> tuple[torch.dtype, torch.dtype] | None:
    """The 8-bit float dtypes in which a device multiplies two formats; None: it does not."""
    kind, other = fits_fp8(a), fits_fp8(b)
    if kind is None or other is None or kind is other is torch.float8_e5m2 or capability(device) < (8, 9):
        return None
    return kind, other


def int8_mm(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T in int32, exact, of sizes that `takes_int8` lets pass, the summed axis last in memory."""
    return torch.ops.aten._int_mm(a_MK.contiguous(), b_NK.contiguous().t())


def bfloat16_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a b of bfloat16 matrices in float32: products exact, sums in float32. From compute capability 8.0 on."""
    return torch.mm(a_MK, b_KN, out_dtype=torch.float32)


@lru_cache(maxsize=16)
def _one(device: torch.device) -> Tensor:
    return torch.ones((), dtype=torch.float32, device=device)


def fp8_mm(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """a b^T of 8-bit float matrices, both with the summed axis last in memory, in float32. Not E5M2 times E5M2."""
    one = _one(a_MK.device)
    return torch.ops.aten._scaled_mm(a_MK, b_NK.t(), one, one, out_dtype=torch.float32, use_fast_accum=False)


@contextmanager
def tf32() -> Iterator[None]:
    """float32 matrix products on tensor cores while the block runs: exact where both operands have at most 11 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
