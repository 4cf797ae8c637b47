"""Tensors of 4-bit numbers at two codes per byte, and of truth values at eight per byte.

Elements are taken in the order in which they lie in memory, in blocks of 64; the last block is filled with zeros. In a
block, byte i holds the codes of elements i (low nibble) and i + 32 (high nibble), so that packing needs no shuffling within
a vector register. The code of an integer is its lower four bits; that of a number on another grid is its position there.
Masks hold element i in bit i mod 8 of byte i / 8.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fourbit.backends import Operation
from fourbit.formats import Format
from fourbit.quantizers._statistics import memory_flat
from fourbit.quantizers._tiles import BlockScales, fits_bfloat16

BLOCK = 64
"""Elements per block."""


@lru_cache(maxsize=256)
def is_packable(format: Format) -> bool:
    """Whether a nibble can tell the numbers of a format apart."""
    return len(format.grid) <= 16


@lru_cache(maxsize=256)
def has_integer_codes(format: Format) -> bool:
    """Whether all numbers are integers of four bits, -8 .. 7 or 0 .. 15."""
    return all(v.is_integer() for v in format.grid) and format.min >= -8 and format.max <= (7 if format.min < 0 else 15)


@dataclass(slots=True, eq=False)
class Packed:
    """Packed codes, and what is needed to get the tensor back: `grid`, or None for integers, `signed` or not; `blocks`, the
    scales of an operand [G, R, S, K] in tiles."""

    data: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    signed: bool
    grid: tuple[float, ...] | None = None
    blocks: BlockScales | None = None

    @property
    def fits_bfloat16(self) -> bool:
        """Whether bfloat16 holds every product of a number and the scale of its block."""
        if self.blocks is None:
            return False
        integers = tuple(float(n) for n in (range(-8, 8) if self.signed else range(16)))
        return fits_bfloat16(self.grid or integers, self.blocks.format)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """The grid values, times their block's scale, in the original shape and order of axes."""
        found = (UNPACK if self.blocks is None else UNPACK_TILES)(self, dtype)
        if found is not None:
            return found
        if self.blocks is not None:
            return self.blocks.times(replace(self, blocks=None).unpack(torch.float32)).to(dtype)
        pairs = self.data.view(-1, BLOCK // 2)
        q = torch.cat([pairs & 15, pairs >> 4], 1).view(-1)
        if self.grid is not None:
            q = torch.tensor(self.grid, dtype=torch.float32, device=q.device)[q.to(torch.int32)]
        elif self.signed:
            q = (q.to(torch.int8) ^ 8) - 8
        out = torch.empty_strided(self.shape, self.stride, dtype=dtype, device=self.data.device)
        memory_flat(out).copy_(q[: out.numel()])
        return out


UNPACK: Operation[[Packed, torch.dtype], Tensor] = Operation("unpack", reference="quantizers._packed.Packed.unpack")
"""Packed codes as numbers of a dtype."""
UNPACK_TILES: Operation[[Packed, torch.dtype], Tensor] = Operation(
    "unpack_tiles", reference="quantizers._packed.Packed.unpack"
)
"""Likewise of an operand in tiles, times the scales of its blocks."""


def pack(q: Tensor, format: Format) -> Packed:
    """Pack a dense tensor of numbers of `format`."""
    flat = memory_flat(q)
    if not has_integer_codes(format):
        flat = torch.bucketize(
            flat.to(torch.float32), torch.tensor(format.grid, dtype=torch.float32, device=q.device), out_int32=True
        )
    flat = _padded(flat.to(torch.int8)).view(-1, BLOCK)
    data = (flat[:, : BLOCK // 2] & 15) | (flat[:, BLOCK // 2 :] << 4)
    return as_packed(data.view(torch.uint8).reshape(-1), q.shape, q.stride(), format)


def as_packed(
    data: Tensor, shape: torch.Size, stride: tuple[int, ...], format: Format, blocks: BlockScales | None = None
) -> Packed:
    """Packed codes of `format` that are there already."""
    integers = has_integer_codes(format)
    return Packed(data, shape, stride, integers and format.min < 0, None if integers else format.grid, blocks)


def pack_mask(mask: Tensor) -> Tensor:
    """One bit per element of a dense boolean tensor: uint8, 8 bytes per block."""
    bits = _padded(memory_flat(mask).to(torch.uint8)).view(-1, 8, 8)
    weights = torch.tensor([1 << b for b in range(8)], dtype=torch.uint8, device=mask.device)
    return (bits * weights).sum(2, dtype=torch.uint8).reshape(-1)


def unpack_mask(data: Tensor, like: Tensor) -> Tensor:
    """The boolean tensor of the shape and order of axes of the dense tensor `like`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    bits = ((data.view(-1, 1) >> shifts) & 1).view(-1)
    out = torch.empty_like(like, dtype=torch.bool)
    memory_flat(out).copy_(bits[: out.numel()])
    return out


def _padded(flat: Tensor) -> Tensor:
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK))
