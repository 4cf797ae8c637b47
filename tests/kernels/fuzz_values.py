"""Odd values for kernels: numbers in odd pieces of memory, scales, codes, requests; and when two results are the same."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fourbit import formats
from fourbit.errors import UserError
from fourbit.quantizers import Amax, ClipValue, FixedScale, QuantSpec, Request, Rounding

CLEAN = (UserError, RuntimeError, TypeError, NotImplementedError, IndexError)
"""A sentence of ours, or of torch: never an assertion, never a crash. (A UserError is a ValueError.)"""
DTYPES = (
    torch.float32,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.uint8,
    torch.int32,
)
SIZES = (0, 1, 1, 2, 3, 4, 7, 16, 17, 32, 63, 64, 65, 130)


class Fuzz:
    """A source of odd values. Tensors without memory are only for kernels that read them before torch does, which dies of
    them."""

    for_kernels = False

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def one(self, *values: Any) -> Any:
        """One of them."""
        return self.random.choice(values)

    def rarely(self, odd: Any, usual: Any, share: float = 0.1) -> Any:
        """Mostly the usual."""
        return odd if self.random.random() < share else usual

    def shape(self, axes: int) -> tuple[int, ...]:
        """Small sizes, zero among them."""
        return tuple(self.random.choice(SIZES if axes < 3 else SIZES[:10]) for _ in range(axes))

    def wrong(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape, or one near it."""
        if not shape or self.random.random() < 0.85:
            return shape
        axis = self.random.randrange(len(shape))
        changed = list(shape)
        changed[axis] = max(0, changed[axis] + self.one(-1, 1, 7, -changed[axis]))
        return self.one(tuple(changed), shape[1:], (*shape, 2), shape[::-1])

    def tensor(
        self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, odd: float = 0.25, powers: bool = False
    ) -> Tensor:
        """So many numbers in an odd piece of memory; `powers`: of fp4_r4_even."""
        shape = self.wrong(shape) if odd else shape
        dtype = self.rarely(self.one(*DTYPES), dtype, 0.08 if odd else 0)
        x = (torch.randn(shape) * 3).clamp(-7, 7)
        x = x.sign() * 4.0 ** (x.abs().floor() - 3).clamp(max=3) if powers else x
        x = x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)
        return self.memory(x) if self.random.random() < odd else x

    def memory(self, x: Tensor) -> Tensor:
        """The same numbers elsewhere: with gaps, repeats, another order of axes, or none at all."""
        kind = self.random.randrange(10 if self.for_kernels else 8)
        if kind == 0 and x.dim() > 1:
            return x.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 1 and x.dim():
            return x.repeat_interleave(2, -1)[..., ::2]
        if kind == 2 and x.dim() and x.shape[0]:
            return x[:1].expand(x.shape)
        if kind == 3:
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if kind == 4 and x.dim() == 4:
            return x.contiguous(memory_format=torch.channels_last)
        if kind == 5:
            return x.to("meta")
        if kind == 6 and x.dtype != torch.uint8:
            return torch._neg_view(-x)
        if kind == 7 and x.dim() and x.numel():  # rows that overlap
            return x.flatten().as_strided(x.shape, (*[1] * (x.dim() - 1), 1)) if sum(x.shape) <= x.numel() else x
        if kind == 8:
            return torch._efficientzerotensor(x.shape, dtype=x.dtype)
        if kind == 9:
            x = x.clone()
            x.untyped_storage().resize_(0)
        return x


def scalar(f: Fuzz) -> Tensor:
    """A scale, or something else."""
    usual = torch.tensor(f.one(0.5, 0.37, 1.0, 2.0**-9))
    return f.rarely(
        f.one(torch.ones(2), torch.tensor(math.nan), torch.tensor(3), torch.ones(1), usual.to("meta")), usual
    )


def bits(f: Fuzz, n: int, of: Callable[[int], int]) -> Tensor:
    """Packed codes or masks for n elements, sometimes of the wrong size."""
    size = f.rarely(max(0, of(n) + f.one(-32, -8, -1, 8, 64)), of(n), 0.15)
    return f.tensor((size,), torch.uint8, 0.1)


SPECS = [
    *(QuantSpec(name, FixedScale(0.5)) for name in ("int4_sym", "uint4", "fp4_r4_even", "fp16_169", "fp8_152", "int8")),
    *(QuantSpec(name, FixedScale(0.5), rounding=Rounding.STOCHASTIC) for name in ("fp4_r2", "int4_sym")),
    QuantSpec("fp4_r4_even", Amax(), rounding=Rounding.UNDERFLOW),
    QuantSpec("uint4", ClipValue()),
    QuantSpec("int4_sym", Amax(), "channel"),
]


def request(f: Fuzz, x: Tensor) -> Request:
    """How it is rounded."""
    spec = f.one(*SPECS)
    format = f.rarely(f.one(*formats.CATALOG.values()), spec.format)
    stored = f.rarely(torch.ones(2), torch.tensor(1.4)) if isinstance(spec.scaling, ClipValue) else None
    key = f.rarely(None, 7) if spec.rounding.draws else None
    return Request(x, spec, format, f.rarely((0,), None, 0.05), stored, key, f.one(True, False), f.rarely(False, True))


def same(a: Tensor, b: Tensor, rtol: float = 1e-5) -> None:
    """NaN equals NaN; sums may differ in their last bits."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    if a.numel() and not a.is_meta:
        a, b = a.double(), b.double()
        size = float(b[b.isfinite()].abs().max()) if bool(b.isfinite().any()) else 0.0
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * size + 1e-30, equal_nan=True)


def plain(x: Tensor) -> bool:
    return not x.is_meta and (not x.numel() or x.is_neg() or x.data_ptr() != 0)
