"""Inputs and comparisons of the parity checks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Check = tuple[str, Callable[[], None]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def between_infinities(values: Tensor) -> Tensor:
    """A copy of a dense tensor whose neighbours in memory are infinite; it starts at a multiple of 16 bytes."""
    memory = torch.full((values.numel() + 128,), math.inf, dtype=values.dtype, device=values.device)
    return memory.as_strided(values.shape, values.stride(), 64).copy_(values)


def sample(n: int, dtype: torch.dtype, device: str, spread: float = 4.0) -> Tensor:
    """Numbers over several binades, with zeros of both signs, subnormals and ties."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=generator) * torch.exp2(spread * torch.randn(n, generator=generator))
    special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 0.5, -0.5, 1.5, 2.5, 3e38, -3e38])
    if n >= 3 * len(special):
        x[n // 2 : n // 2 + len(special)] = special
    return between_infinities(x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).to(device))


def all_bfloat16(device: str) -> Tensor:
    """All 65,536 patterns, NaN and infinities included."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).to(device)


def same(ours: Tensor, theirs: Tensor, what: str, where: Tensor | None = None) -> None:
    assert ours.shape == theirs.shape, f"{what}: shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}"
    ours, theirs = ours.double(), theirs.double()
    wrong = (ours != theirs) & ~(ours.isnan() & theirs.isnan())
    if where is not None:
        wrong &= where
    if bool(wrong.any()):
        i = int(wrong.flatten().nonzero()[0])
        values = f"{float(ours.flatten()[i]):.9g} instead of {float(theirs.flatten()[i]):.9g}"
        raise AssertionError(f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {i}: {values}")
