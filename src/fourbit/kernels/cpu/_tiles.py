"""Operands whose tiles have scales, on the CPU: rotated, scaled and rounded from one read (two, where the tensor has a scale as
well), and their codes as numbers again.

    elements    grids of integers below 16 in units of the smallest magnitude: E2M1, E1M2, signed integers of 4 bits
    scales      powers of two from 2^-127 to 2^127 by the rules "floor", "ceil" and "nearest"; small floats with subnormals to
                "nearest", of one level or two, with one target or the better of two; of the largest magnitude or of a
                multiple of the root mean square, with the mask of what it clips
    tiles       of 1, 16 or 32 rows by 16, 32, 64 or 128 along the sums
    rounding    to nearest, stochastic (with one target)
    rotations   up to 128

Numbers along the sums may lie next to each other, or those along the rows: nothing is transposed, and the result lies as x
does.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit.backends import Plan
from fourbit.formats import Format
from fourbit.kernels._check import codes_of, fresh, mask_bytes, packed_bytes, pointer
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._quantize import RULE_OF, float_grid, kernels, readable, why_unreadable
from fourbit.quantizers import (
    ROUND_TILES,
    UNPACK_TILES,
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

_MOST_ROTATED = 128
_SCALE_RULES = {"floor": 0, "ceil": 1, "nearest": 2}
_NEAREST_POWER = 3
_POWERS = [2.0**n for n in range(-127, 128)]


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
        grid = c.FloatGrid(
            mantissa_bits=3, lowest=3 + 127, min=format.min, max=format.max, overflow=math.nan
        )  # quantum 1 below 16
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
def _are_powers(format: Format) -> bool:
    """Whether its numbers are the powers of two that the kernels have."""
    return list(format.grid) == _POWERS


@lru_cache(maxsize=64)
def _scale_codes(format: Format) -> Tensor | None:
    """The codes of the scales that are not negative, in order, that of NaN at 255; None where the kernels have not got them."""
    if not scale_fits_byte(format):
        return None
    codes = codes_of_scales(format)
    if _are_powers(format):
        found = codes[:-1]
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


class _Walk(NamedTuple):
    """How the library sees an operand [G, R, S, K]. Where the spots of an image lie one behind the other and their tiles are
    whole, they are one long line: of sums, or, turned, of rows, `rows_in_spot` from each; tiles then come in another order.
    """

    shape: tuple[int, int, int, int]
    axis: int  # that the spots have become part of; 2: none
    turned: bool
    rows_in_spot: int = 0

    @staticmethod
    def of(shape: torch.Size, strides: Sequence[tuple[int, ...]], tile: Tile, block: int, turned: bool) -> _Walk:
        """Of tensors with these strides, rotated in blocks."""
        groups, rows, spots, sums = shape
        neighbours = rows if turned else sums
        assert tile.rows is not None and tile.sums is not None
        if spots > 1 and all(stride[2] == neighbours for stride in strides):
            if not turned and sums % math.lcm(tile.sums, block) == 0:
                return _Walk((groups, rows, 1, spots * sums), 3, turned)
            if turned and rows % tile.rows == 0:
                return _Walk((groups, spots * rows, 1, sums), 1, turned, rows)
        return _Walk((groups, rows, spots, sums), 2, turned)

    def tiles(self, tile: Tile) -> Any:
        """The library's structure, without x."""
        groups, rows, spots, sums = self.shape
        return c.Tiles(
            groups=groups,
            rows=rows,
            spots=spots,
            sums=sums,
            rows_in_spot=self.rows_in_spot,
            turned=self.turned,
            tile_rows=tile.rows,
            tile_sums=tile.sums,
        )

    def in_order(self, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Scales as the library writes them, in the order of the operand's tiles."""
        if self.axis != 1:
            return scales.view(shape)
        groups, down, _, spots, _, across, _ = shape
        return scales.view(groups, spots, down, across).transpose(1, 2).reshape(shape)

    def as_walked(self, scales: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The other way round."""
        if self.axis != 1:
            return scales
        groups, down, _, spots, _, across, _ = shape
        return scales.view(groups, down, spots, across).transpose(1, 2).contiguous()


def _why_not(request: Request) -> str:
    x, spec, scaling, rotation = request.x, request.spec, request.spec.scaling, request.rotation
    if declined := why_unreadable(x):
        return declined
    if x.dim() != 4 or not x.numel():
        return "the operand has not four axes, or is empty"
    if not isinstance(scaling, BlockScale) or scaling.corrected or scaling.micro or scaling.outer or scaling.draws:
        return f"no kernel scales by {scaling}"
    targets = scaling.targets or (request.format.max,)
    if _are_powers(scaling.format):
        if len(targets) > 1 or scaling.tensor_bound is not None:
            return "scales that are powers of two have one level and one target"
    elif scaling.rounding != "nearest":
        return "scales that are no powers of two are rounded to nearest"
    if scaling.clips and (len(targets) > 1 or x.shape[3] % 8):
        return "a clip has one target, and sums in whole bytes of the mask"
    if spec.samples > 1 or spec.rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
        return f"no kernel rounds by {spec.rounding}, or several times"
    if spec.rounding.draws and (request.key is None or len(targets) > 1):
        return "random words need a key, and one target"
    if len(targets) > 2:
        return "there are more than two targets"
    if request.tile is None or not _takes_tile(request.tile):
        return f"no kernel knows tiles of {request.tile}"
    if rotation is not None and rotation.transform.size > _MOST_ROTATED:
        return f"rotations go up to {_MOST_ROTATED}"
    if _elements(request.format) is None:
        return f"{request.format.name} has no grid of integers below 16"
    if _scale_codes(scaling.format) is None:
        return f"no kernel knows scales in {scaling.format.name} by this rule"
    return ""


@ROUND_TILES.kernel("cpu")
def round_tiles(request: Request) -> Plan[TilesRounded]:
    """One operand, rotated, scaled and rounded."""
    return _why_not(request) or (lambda: _round_tiles(request))


def _round_tiles(request: Request) -> TilesRounded:
    scaling, format, tile, rotation = request.spec.scaling, request.format, request.tile, request.rotation
    assert isinstance(scaling, BlockScale) and tile is not None
    elements, code_of = _elements(format), _scale_codes(scaling.format)
    assert elements is not None and code_of is not None
    x = readable(request.x)
    turned = _is_turned(x.shape, x.stride())
    if turned is None or scaling.clips:
        x, turned = x.contiguous(), False
    size = 1 if rotation is None else rotation.transform.size
    shape = torch.Size((*x.shape[:3], -(-x.shape[3] // size) * size))
    n = shape.numel()
    narrow = fits_bfloat16(format.grid, scaling.format) and not request.wide
    steps = _as_x_lies(x, shape, turned)
    out = None
    if request.carrier or not request.save:
        out = torch.empty_strided(shape, steps, dtype=torch.bfloat16 if narrow else torch.float32)
    of_tiles = scale_shape(shape, tile)
    each = x.new_empty(math.prod(of_tiles), dtype=torch.float32)
    scale_codes = x.new_empty(math.prod(of_tiles), dtype=torch.uint8)
    whole = x.shape == shape  # and not filled up to blocks of the rotation
    walk = (
        _Walk.of(shape, (steps, x.stride()), tile, size, turned)
        if whole
        else _Walk((shape[0], shape[1], shape[2], shape[3]), 2, turned)
    )
    tiles = walk.tiles(tile)
    tiles.x, tiles.dtype = pointer(x, "x", x.dtype, x.numel()), c.CODES[x.dtype]
    tiles.x_sums, tiles.x_steps[:] = x.shape[3] if walk.axis != 3 else walk.shape[3], x.stride()
    signs = None
    if rotation is not None:
        signs = rotation.transform.signs_for(x.device, rotation.key)
        tiles.rotation, tiles.factor = size, to_float32(1.0 / math.sqrt(size))
        tiles.signs = None if signs is None else pointer(signs, "signs", torch.float32, size)
    targets = scaling.targets or (format.max,)
    nearest_power = scaling.rounding == "nearest" and _are_powers(scaling.format)
    arguments: Any = c.RoundTiles(
        tiles=tiles,
        scale_rule=_NEAREST_POWER if nearest_power else _SCALE_RULES[scaling.rounding],
        num_targets=len(targets),
        clip_rms=scaling.clip_rms or 0.0,
        reach=0.0 if scaling.tensor_bound is None else scaling.tensor_bound * targets[0],
        prescale=scaling.prescale,
        scale_grid=float_grid(scaling.format) or c.FloatGrid(),
        code_of=pointer(code_of, "code_of", torch.uint8, 256),
        grid=elements.grid,
        per_unit=elements.per_unit,
        zero=elements.zero,
        rule=RULE_OF[request.spec.rounding],
        scale_codes=fresh(scale_codes),
        each=fresh(each),
    )
    for i, target in enumerate(targets):
        arguments.target[i] = target
        arguments.factor[i] = to_float32(1 / target) if len(targets) == 1 else to_float32(targets[0] / target)
    if elements.positions is not None:
        arguments.positions = pointer(elements.positions, "positions", torch.int8, 16)
    if request.spec.rounding.draws and request.key is not None:
        arguments.key = stream_key(request.key, 0)
    arguments.out_steps[:] = steps
    if out is not None:
        arguments.out, arguments.out_dtype = fresh(out), c.CODES[out.dtype]
    packed = codes = mask = None
    if request.save and scaling.clips:
        mask = x.new_zeros(mask_bytes(n), dtype=torch.uint8)
        arguments.mask = fresh(mask)
    if request.save:
        packed = x.new_empty(packed_bytes(n), dtype=torch.uint8)
        arguments.packed = fresh(packed)
        if walk.shape[1 if turned else 3] % 64:
            codes = x.new_empty(n, dtype=torch.int8)
            arguments.codes = fresh(codes)
    amax = kernels().round_tiles(ctypes.byref(arguments))
    scale = torch.tensor(arguments.decode, dtype=torch.float32) / scaling.prescale
    each, scale_codes = walk.in_order(each, of_tiles), walk.in_order(scale_codes, of_tiles)
    blocks = BlockScales(scale_codes, scaling.format, tile)
    saved = None if packed is None else as_packed(packed, shape, steps, format, blocks)
    return TilesRounded(out, scale, each, amax, saved, mask)


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


@UNPACK_TILES.kernel("cpu")
def unpack_tiles(packed: Packed, dtype: torch.dtype) -> Plan[Tensor]:
    """Codes as numbers times the scales of their tiles."""
    blocks = packed.blocks
    if blocks is None or blocks.format is None or dtype not in (torch.float32, torch.bfloat16):
        return f"there are no codes of scales, or no kernel unpacks to {dtype}"
    if not packed.data.is_cpu or len(packed.shape) != 4 or not packed.shape.numel():
        return "the codes are on another device, have not four axes, or are none"
    if not _takes_tile(blocks.tile):
        return f"no kernel knows tiles of {blocks.tile}"
    turned = _is_turned(packed.shape, packed.stride)
    if turned is None:
        return "neither rows nor sums lie next to each other"
    if packed.grid is not None and len(packed.grid) > 16:
        return "the grid has more than 16 numbers"
    return lambda: _unpack_tiles(packed, blocks, turned, dtype)


def _unpack_tiles(packed: Packed, blocks: BlockScales, turned: bool, dtype: torch.dtype) -> Tensor:
    out = torch.empty_strided(packed.shape, packed.stride, dtype=dtype)
    assert blocks.format is not None
    scales = _numbers(tuple(blocks.format.values), 256)
    of_tiles = scale_shape(packed.shape, blocks.tile)
    walk = _Walk.of(packed.shape, [packed.stride], blocks.tile, 1, turned)
    codes = walk.as_walked(blocks.data, of_tiles)
    arguments: Any = c.UnpackTiles(
        tiles=walk.tiles(blocks.tile),
        packed=codes_of(packed.data, out.numel()),
        is_signed=packed.signed,
        scale_codes=pointer(codes, "scales", torch.uint8, math.prod(of_tiles), torch.contiguous_format),
        scale_of=pointer(scales, "scale_of", torch.float32, 256),
        out=fresh(out),
        out_dtype=c.CODES[dtype],
        exact=dtype == torch.float32,
    )
    arguments.steps[:] = packed.stride
    if packed.grid is not None:
        arguments.positions = pointer(_numbers(packed.grid, 16), "grid", torch.float32, 16)
    kernels().unpack_tiles(ctypes.byref(arguments))
    return out
