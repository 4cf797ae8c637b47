"""Operands whose tiles have scales, on the CPU: rotated, scaled and rounded from one read (two, where the tensor has a scale as
well), and their codes as numbers again.

    elements    grids of integers below 16 in units of the smallest magnitude: E2M1, E1M2, signed integers of 4 bits
    scales      powers of two from 2^-127 to 2^127 by the rules "floor" and "ceil"; small floats with subnormals to "nearest",
                of one level or two, with one target or the better of two
    tiles       of 1, 16 or 32 rows by 16, 32, 64 or 128 along the sums
    rounding    to nearest, stochastic (with one target)
    rotations   up to 128

Numbers along the sums may lie next to each other, or those along the rows: nothing is transposed, and the result lies as x
does.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit import backends
from fourbit.formats import Format
from fourbit.kernels._check import codes_of, fresh, is_plain, packed_bytes, pointer
from fourbit.kernels.cpu import _library as c
from fourbit.kernels.cpu._quantize import RULE_OF, float_grid, kernels, readable
from fourbit.quantizers import (
    BlockScale,
    BlockScales,
    Integers,
    Packed,
    Request,
    Rounding,
    Tile,
    TilesRounded,
    as_packed,
    codes_of_scales,
    fits_bfloat16,
    grid_of,
    has_integer_codes,
    is_packable,
    scale_fits_byte,
    scale_shape,
    stream_key,
    to_float32,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_ROTATED = 128
_SCALE_RULES = {"floor": 0, "ceil": 1, "nearest": 2}


class _Elements(NamedTuple):
    """A grid of integers below 16 in units of the smallest magnitude; `positions` of their magnitudes, from zero on."""

    grid: Any
    per_unit: float
    positions: Tensor | None
    zero: int


@lru_cache(maxsize=64)
def _elements(format: Format) -> _Elements | None:
    if not is_packable(format) or format.min != -format.max or 0.0 not in format.grid:
        return None
    places = {value / format.smallest: i for i, value in enumerate(format.grid)}
    if any(n != int(n) or abs(n) > 15 for n in places):
        return None
    if isinstance(grid_of(format), Integers):
        grid = c.FloatGrid(3, 3 + 127, 0.0, format.min, format.max, math.nan)  # below 16, the quantum is 1
    else:
        grid = float_grid(format)
        if grid is None or grid.smallest or not math.isnan(grid.overflow):
            return None
    zero = places[0.0]
    positions = None
    if not has_integer_codes(format):
        positions = torch.tensor([places.get(float(n), zero) - zero for n in range(16)], dtype=torch.int8)
    return _Elements(grid, 1.0 / float(format.smallest), positions, zero)


@lru_cache(maxsize=64)
def _scale_codes(format: Format, powers: bool) -> Tensor | None:
    """The codes of the scales that are not negative, in order, that of NaN at 255; None where the kernels have not got them."""
    if not scale_fits_byte(format):
        return None
    codes = codes_of_scales(format)
    if powers:
        found = codes[:-1] if list(format.grid) == [2.0**n for n in range(-127, 128)] else None
    else:
        grid = float_grid(format)
        known = grid is not None and not grid.smallest and math.isnan(grid.overflow) and 0.0 in format.grid
        found = codes[list(format.grid).index(0.0) : -1] if known else None
    if found is None or len(found) > 255:
        return None
    table = torch.zeros(256, dtype=torch.uint8)
    table[: len(found)], table[255] = found, codes[-1]
    return table


def _takes_tile(tile: Tile) -> bool:
    return tile.rows in (1, 16, 32) and tile.sums in (16, 32, 64, 128)


def _is_turned(shape: torch.Size, stride: tuple[int, ...]) -> bool | None:
    """Whether rows lie next to each other, and not what is summed over; None: neither does."""
    if stride[3] == 1 and shape[3] > 1:
        return False
    if stride[1] == 1 and shape[1] > 1:
        return True
    return False if stride[3] == 1 or shape[3] == 1 else None


def _tiles(shape: torch.Size, tile: Tile, turned: bool) -> Any:
    tiles = c.Tiles()
    tiles.groups, tiles.rows, tiles.spots, tiles.sums = shape
    tiles.turned, tiles.tile_rows, tiles.tile_sums = turned, tile.rows, tile.sums
    return tiles


def _takes(request: Request) -> bool:
    x, spec, scaling, rotation = request.x, request.spec, request.spec.scaling, request.rotation
    if not x.is_cpu or x.dtype not in _DTYPES or x.dim() != 4 or not x.numel() or not is_plain(x):
        return False
    if (
        not isinstance(scaling, BlockScale)
        or scaling.clips
        or scaling.corrected
        or scaling.micro
        or scaling.outer
        or scaling.draws
    ):
        return False
    targets = scaling.targets or (request.format.max,)
    if scaling.rounding != "nearest" and (len(targets) > 1 or scaling.tensor_bound is not None):
        return False
    if spec.samples > 1 or spec.rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
        return False
    if spec.rounding.draws and (request.key is None or len(targets) > 1):
        return False
    return (
        len(targets) <= 2
        and request.tile is not None
        and _takes_tile(request.tile)
        and (rotation is None or rotation.transform.size <= _MOST_ROTATED)
    )


@backends.register("round_tiles", "cpu")
def round_tiles(request: Request) -> TilesRounded | None:
    """One operand, rotated, scaled and rounded."""
    if not _takes(request):
        return None
    scaling, format, tile, rotation = request.spec.scaling, request.format, request.tile, request.rotation
    assert isinstance(scaling, BlockScale) and tile is not None
    elements, code_of = _elements(format), _scale_codes(scaling.format, scaling.rounding != "nearest")
    if elements is None or code_of is None:
        return None
    x = readable(request.x)
    turned = _is_turned(x.shape, x.stride())
    if turned is None:
        x, turned = x.contiguous(), False
    size = 1 if rotation is None else rotation.transform.size
    shape = torch.Size((*x.shape[:3], -(-x.shape[3] // size) * size))
    n = shape.numel()
    narrow = fits_bfloat16(format, scaling.format) and not request.wide
    steps = _as_x_lies(x, shape, turned)
    out = None
    if request.carrier or not request.save:
        out = torch.empty_strided(shape, steps, dtype=torch.bfloat16 if narrow else torch.float32)
    of_tiles = scale_shape(shape, tile)
    each = x.new_empty(of_tiles, dtype=torch.float32)
    scale_codes = x.new_empty(of_tiles, dtype=torch.uint8)
    tiles = _tiles(shape, tile, turned)
    tiles.x, tiles.dtype = pointer(x, "x", x.dtype, x.numel()), c.CODES[x.dtype]
    tiles.x_sums, tiles.x_steps[:] = x.shape[3], x.stride()
    signs = None
    if rotation is not None:
        signs = rotation.transform.signs_for(x.device, rotation.key)
        tiles.rotation, tiles.factor = size, to_float32(1.0 / math.sqrt(size))
        tiles.signs = None if signs is None else pointer(signs, "signs", torch.float32, size)
    targets = scaling.targets or (format.max,)
    arguments: Any = c.RoundTiles(tiles, _SCALE_RULES[scaling.rounding], len(targets))
    for i, target in enumerate(targets):
        arguments.target[i] = target
        arguments.factor[i] = to_float32(1 / target) if len(targets) == 1 else to_float32(targets[0] / target)
    arguments.reach = 0.0 if scaling.tensor_bound is None else scaling.tensor_bound * targets[0]
    arguments.prescale = scaling.prescale
    arguments.scale_grid = float_grid(scaling.format) or c.FloatGrid()
    arguments.code_of = pointer(code_of, "code_of", torch.uint8, 256)
    arguments.grid, arguments.per_unit, arguments.zero = elements.grid, elements.per_unit, elements.zero
    if elements.positions is not None:
        arguments.positions = pointer(elements.positions, "positions", torch.int8, 16)
    arguments.rule = RULE_OF[request.spec.rounding]
    if request.spec.rounding.draws and request.key is not None:
        arguments.key = stream_key(request.key, 0)
    arguments.out_steps[:] = steps
    if out is not None:
        arguments.out, arguments.out_dtype = fresh(out), c.CODES[out.dtype]
    packed = codes = None
    if request.save:
        packed = x.new_empty(packed_bytes(n), dtype=torch.uint8)
        arguments.packed = fresh(packed)
        if shape[1 if turned else 3] % 64:
            codes = x.new_empty(n, dtype=torch.int8)
            arguments.codes = fresh(codes)
    arguments.scale_codes, arguments.each = fresh(scale_codes), fresh(each)
    amax = kernels().round_tiles(ctypes.byref(arguments))
    scale = torch.tensor(arguments.decode, dtype=torch.float32) / scaling.prescale
    blocks = BlockScales(scale_codes, scaling.format, tile)
    saved = None if packed is None else as_packed(packed, shape, steps, format, blocks)
    return TilesRounded(out, scale, each, amax, saved)


def _as_x_lies(x: Tensor, shape: torch.Size, turned: bool) -> tuple[int, ...]:
    """The strides of a result of that shape, its axes in the order of x's."""
    first = 1 if turned else 3
    order = sorted(range(4), key=lambda axis: (axis != first, x.stride(axis), x.shape[axis]))
    strides, step = [0] * 4, 1
    for axis in order:
        strides[axis] = step
        step *= shape[axis]
    return tuple(strides)


@lru_cache(maxsize=64)
def _numbers(values: tuple[float, ...], length: int) -> Tensor:
    """float32, with zeros behind."""
    table = torch.zeros(length, dtype=torch.float32)
    table[: len(values)] = torch.tensor(values, dtype=torch.float32)
    return table


@backends.register("unpack_tiles", "cpu")
def unpack_tiles(packed: Packed, dtype: torch.dtype) -> Tensor | None:
    """Codes as numbers times the scales of their tiles."""
    blocks = packed.blocks
    if blocks is None or blocks.format is None or dtype not in (torch.float32, torch.bfloat16):
        return None
    if not packed.data.is_cpu or not _takes_tile(blocks.tile) or len(packed.shape) != 4 or not packed.shape.numel():
        return None
    turned = _is_turned(packed.shape, packed.stride)
    if turned is None or (packed.grid is not None and len(packed.grid) > 16):
        return None
    out = torch.empty_strided(packed.shape, packed.stride, dtype=dtype)
    scales = _numbers(tuple(blocks.format.values), 256)
    num = math.prod(scale_shape(packed.shape, blocks.tile))
    arguments: Any = c.UnpackTiles(_tiles(packed.shape, blocks.tile, turned), codes_of(packed.data, out.numel()))
    arguments.is_signed, arguments.exact = packed.signed, dtype == torch.float32
    if packed.grid is not None:
        arguments.positions = pointer(_numbers(packed.grid, 16), "grid", torch.float32, 16)
    arguments.scale_codes = pointer(blocks.data, "scales", torch.uint8, num, torch.contiguous_format)
    arguments.scale_of = pointer(scales, "scale_of", torch.float32, 256)
    arguments.out, arguments.out_dtype, arguments.steps[:] = fresh(out), c.CODES[dtype], packed.stride
    kernels().unpack_tiles(ctypes.byref(arguments))
    return out
