"""Formats as the kernels see them: a tuple of plain numbers that is compiled in, and for some a table in device memory.

    ("integers", low, high)
    ("log", start, smallest, largest, octaves, smallest, largest, ratio)     the first four as float32 bit patterns
    ("binary", mantissa bits, lowest exponent, smallest or 0, max, overflow or 0)
    ("float16",), ("bfloat16",)                                              torch's own dtypes
    ("table", steps, min, max, overflow or 0)                                2^steps slots, searched in that many steps

The kind follows from the structure of the grid (`quantizers.grid_of`), never from a format's name.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fourbit.formats import Format
from fourbit.quantizers import Binary, Integers, Logarithmic, Table, float_bits, grid_of

Parameters = tuple[Any, ...]


@lru_cache(maxsize=256)
def parameters(format: Format, stochastic: bool = False) -> Parameters | None:
    """What the kernels need to know of a format; None where they cannot round to it."""
    grid = grid_of(format)
    if isinstance(grid, Logarithmic):
        bits = [float_bits(v) for v in (grid.threshold, grid.smallest, grid.largest)]
        return ("log", *bits, int(math.log2(grid.ratio)) << 23, grid.smallest, grid.largest, grid.ratio)
    if not stochastic:
        if isinstance(grid, Integers):
            return ("integers", float(grid.low), float(grid.high)) if max(-grid.low, grid.high) < 2**21 else None
        if isinstance(grid, Binary) and _adds_exactly(grid):
            f = grid.format
            smallest = 0.0 if f.subnormals else float(f.smallest)
            return ("binary", f.mantissa_bits, _lowest(grid), smallest, float(f.max), _overflow(format))
        dtype = getattr(grid, "dtype", None)
        if dtype is not None:
            return (str(dtype).removeprefix("torch."),)
    if format.bits > 8:
        return None
    return ("table", max(1, math.ceil(math.log2(len(format.grid)))), format.min, format.max, _overflow(format))


def _overflow(format: Format) -> float:
    return float(format.overflow_point) if format.overflow == "infinity" else 0.0


def _lowest(grid: Binary) -> int:
    """The smallest exponent of a normal number, biased as in float32."""
    return (1 if grid.format.subnormals else 0) - grid.format.exponent_bias + 127


def _adds_exactly(grid: Binary) -> bool:
    """Whether adding and subtracting 1.5 * 2^23 quanta rounds: the quantum is normal, and so is 2^24 of the largest ones."""
    f = grid.format
    largest = math.frexp(2 * f.max)[1] - 1 - f.mantissa_bits
    return f.mantissa_bits <= 20 and _lowest(grid) > f.mantissa_bits and largest + 24 <= 127


@lru_cache(maxsize=256)
def table(format: Format, device: torch.device) -> Tensor:
    """2^steps boundaries, then the levels, filled up with infinity: what "table" grids are searched in."""
    grid, steps = Table(format), parameters(format, True)
    assert steps is not None and steps[0] == "table"
    slots = 1 << steps[1]
    filled = torch.full((2 * slots + 1,), math.inf, dtype=torch.float32)
    filled[: len(grid.boundaries)] = grid.boundaries
    filled[slots : slots + len(grid.levels)] = grid.levels
    return filled.to(device)


def table_of(format: Format, grid: Parameters, device: torch.device) -> Tensor | None:
    """The table where the kind of grid needs one."""
    return table(format, device) if grid[0] == "table" else None
