"""Operands in blocks along the summed axis: which of them a kernel rounds."""

from __future__ import annotations

import math

import torch

from fourbit.backends import Plan
from fourbit.formats import E8M0
from fourbit.kernels.cuda._device import kernels, launch
from fourbit.kernels.cuda._grids import parameters, table_of
from fourbit.kernels.cuda._quantize import NO_TRITON, _key, _why_unreadable
from fourbit.quantizers import (
    ROUND_TILES,
    BlockScale,
    Request,
    Rounding,
    TilesRounded,
    fits_bfloat16,
    scale_shape,
    to_float32,
)
from fourbit.quantizers._statistics import Statistics

_ROWS = 32


def _why_not(request: Request) -> str:
    x, spec, tile, scaling = request.x, request.spec, request.tile, request.spec.scaling
    if declined := _why_unreadable(x):
        return declined
    if tile is None or tile.rows != 1 or tile.sums not in (16, 32, 64, 128) or x.shape[3] < tile.sums:
        return f"a {tile} is not a block of 16, 32, 64 or 128 in an axis that is as long"
    if not x.is_contiguous() or x.shape[2] != 1:
        return "the rows of the operand do not lie one behind the other, or it has spots"
    if request.save or request.rotation is not None or request.toward is not None or request.part is not None:
        return "codes to save, a rotation, an average or a part of a batch"
    if not isinstance(scaling, BlockScale):
        return "the scales of blocks are not rounded to a format"
    unknown = scaling.clips or scaling.corrected or scaling.micro or scaling.outer or scaling.prescale != 1.0
    if unknown or len(scaling.reach(request.format)) > 1:
        return f"no kernel has {scaling}"
    floor = scaling.rounding == "floor" and scaling.format == E8M0 and scaling.tensor_bound is None
    if floor and request.format.max < 1:
        return f"the largest number of {request.format.name} is below 1"
    grid = parameters(scaling.format)
    if not floor and (scaling.rounding != "nearest" or grid is None or grid[0] != "binary"):
        return f"no kernel rounds scales as {scaling}"
    if spec.samples != 1 or spec.rounding not in (Rounding.NEAREST, Rounding.STOCHASTIC):
        return f"no kernel rounds by {spec.rounding}, or several times"
    if spec.stochastic and (request.key is None or x.shape[3] % 2):
        return "random words without a key, or rows of an odd number of elements"
    if parameters(request.format, spec.stochastic) is None:
        return f"no kernel knows the grid of {request.format.name}"
    return "" if kernels() is not None else NO_TRITON


@ROUND_TILES.kernel("cuda")
def round_tiles(request: Request) -> Plan[TilesRounded]:
    """An operand in blocks, not to be saved."""
    return _why_not(request) or (lambda: _round(request))


def _round(request: Request) -> TilesRounded:
    from fourbit.kernels.cuda import _jit_tiles

    x, format, scaling, tile = request.x, request.format, request.spec.scaling, request.tile
    assert isinstance(scaling, BlockScale) and tile is not None and tile.sums is not None
    target = scaling.reach(format)[0]
    encode = scaling.encode(Statistics(x), format)
    shape = scale_shape(x.shape, tile)
    each = torch.empty(shape, dtype=torch.float32, device=x.device)
    amax = torch.empty_like(each)
    exact = fits_bfloat16(format.grid, scaling.format) and not request.wide
    q = torch.empty(x.shape, dtype=torch.bfloat16 if exact else torch.float32, device=x.device)
    grid = parameters(format, request.spec.stochastic)
    scale_grid = None if scaling.rounding == "floor" else parameters(scaling.format)
    assert grid is not None
    decode = encode.reciprocal()
    launch(
        _jit_tiles.blocks_kernel,
        -(-each.numel() // _ROWS),
        x,
        x,
        x.shape[3],
        each.numel(),
        encode * to_float32(1 / target),
        decode,
        _key(request),
        q,
        each,
        amax,
        table_of(format, grid, x.device),
        None,
        GRID=grid,
        SCALE=scale_grid,
        TOP=math.frexp(target)[1],
        STOCHASTIC=request.spec.stochastic,
        SIZE=tile.sums,
        ROWS=_ROWS,
        num_warps=4,
    )
    return TilesRounded(q, decode, each, amax, None)
