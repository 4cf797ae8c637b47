"""`Request` is one operand to be quantized as a QuantSpec says; `run` does it, by a kernel or the reference.

    q = round_to_format(x * (1 / scale), format),        x ~ scale * q

The reciprocal of the scale is taken in float32 and multiplied, which is what fast kernels do too; for the power-of-two
scales of GradScale the difference to a division is nil.

q is kept in a carrier: the smallest of int8, uint8, bfloat16 and float32 that holds every number of the format exactly, so
that hardware can multiply it fast without changing a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fourbit.backends import Operation
from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.quantizers._blocks import quantize_tiles
from fourbit.quantizers._packed import Packed, is_packable, pack, pack_mask
from fourbit.quantizers._round import Rounding, nearest_number, round_to_format, round_toward
from fourbit.quantizers._share import Slice
from fourbit.quantizers._spec import QuantSpec
from fourbit.quantizers._statistics import Statistics, is_dense, memory_flat
from fourbit.quantizers._tiles import Tile, fits_bfloat16, fold, unfold
from fourbit.quantizers._transform import Rotation
from fourbit.quantizers._words import random_words, stream_key, words_at


@lru_cache(maxsize=256)
def carrier_dtype(format: Format) -> torch.dtype:
    """The smallest dtype that holds every number of a format exactly, and that hardware multiplies.

    >>> from fourbit.formats import FP4_R4_EVEN, FP16_169, INT4_SYM
    >>> carrier_dtype(INT4_SYM), carrier_dtype(FP4_R4_EVEN), carrier_dtype(FP16_169)
    (torch.int8, torch.bfloat16, torch.float32)
    """
    if format.bits > 8:
        return torch.float32
    if all(float(v).is_integer() for v in format.grid):
        if format.min >= -128 and format.max <= 127:
            return torch.int8 if format.min < 0 else torch.uint8
        if format.min >= 0 and format.max <= 255:
            return torch.uint8
    exact = torch.tensor(format.grid, dtype=torch.float64)
    normal = format.smallest >= torch.finfo(torch.bfloat16).smallest_normal
    return torch.bfloat16 if normal and bool((exact.to(torch.bfloat16).double() == exact).all()) else torch.float32


class QTensor(NamedTuple):
    """x ~ scale * q: `q` on the grid of `format`, in its carrier dtype; `scale` float32.

    Where the scale is NaN, because the data held NaN or infinity, q means nothing. After SMP, q is a mean of grid values in
    float32. `scale` is 0-d, or has the dimensions of q with size 1 where it is shared. Where tiles have scales, they are in q
    already, up to the one of the tensor, and `each` has them all, with the tile.
    """

    q: Tensor
    scale: Tensor
    format: Format
    each: tuple[Tensor, Tile] | None = None

    @property
    def scales(self) -> Tensor:
        """The scale of each element, broadcastable against q."""
        if self.each is None:
            return self.scale
        each, tile = self.each
        return unfold(each.expand_as(fold(self.q, tile).t), self.q.shape)

    def dequantize(self) -> Tensor:
        """scale * q, float32."""
        return self.q.to(torch.float32) * self.scale


@dataclass(slots=True, eq=False)
class Request:
    """One operand to be rounded, and what is wanted besides its numbers.

    Args:
        x: dense, any floating dtype; with tiles [groups, rows, spots, sums].
        spec, format: `format` replaces that of the spec.
        tile: who shares a scale; None: all.
        stored: what the scaling remembers: PACT's alpha, GradScale's exponent.
        key: stream key of the random words.
        save: also return the mask of the straight-through gradient, and packed codes where a nibble holds them.
        carrier: also return q itself; what is not saved in codes is returned in any case.
        wide: with scales of blocks, q in float32 even where bfloat16 holds it, for products in float32.
        rotation: of x along its last axis, before anything else.
        toward: a running average of x, in its shape: of the two neighbours of a number, the one on its side is taken.
        part: of a batch, which x is in this process: its scale and its words are then those of the whole batch.
    """

    x: Tensor
    spec: QuantSpec
    format: Format
    tile: Tile | None = None
    stored: Tensor | None = None
    key: int | None = None
    save: bool = False
    carrier: bool = True
    rotation: Rotation | None = None
    wide: bool = False
    toward: Tensor | None = None
    part: Slice | None = None

    @property
    def statistics(self) -> Statistics:
        """Of x, or of the whole batch."""
        shared = self.part is not None and self.spec.scaling.reads_data
        return Statistics(self.x, share=self.part.share if shared and self.part is not None else None)

    @property
    def has_own_words(self) -> bool:
        """Whether the position in x decides which word an element gets, or none gets one."""
        return self.part is None or not self.spec.rounding.draws

    @property
    def has_own_scales(self) -> bool:
        """Whether all scales are of elements of x alone."""
        if self.part is None or not self.spec.scaling.reads_data:
            return True
        return self.tile is not None and not (self.part.spans(self.tile) or self.spec.scaling.has_tensor_scale)


class Rounded(NamedTuple):
    """The numbers, max|x| (of those that share a scale), and what is saved for backward.

    `amax` is a float where it is known to the host: no tensor needs to be made and read to see that all is finite.
    `packed` may be None: who asked for it packs then. `mask` has one bit per element (see `pack_mask`), None where everything
    passes.
    """

    q: Tensor | None
    amax: Tensor | float
    packed: Packed | None = None
    mask: Tensor | None = None


class TilesRounded(NamedTuple):
    """An operand [groups, rows, spots, sums] in blocks, its axes in the order of x's, or in another.

    Attributes:
        q: numbers times the scale of their block; None where only the codes are wanted.
        scale: of the tensor, 0-d.
        each: the whole scale of each tile, of `scale_shape`.
        amax: max|x| of all, rotated, or of each tile.
        packed: where it is to be saved: the codes, with the scales of blocks.
        mask: one bit per element, in the order of q, where its scaling clips and it is to be saved.
    """

    q: Tensor | None
    scale: Tensor
    each: Tensor
    amax: Tensor | float
    packed: Packed | None
    mask: Tensor | None = None


ROUND: Operation[[Request, Tensor], Rounded] = Operation("round", reference="quantizers._request._round")
"""One operand with its scale."""
ROUND_PAIR: Operation[[Request, Request, Tensor], Sequence[Rounded]] = Operation(
    "round_pair", reference="quantizers._request._round"
)
"""One tensor to two formats, with one scale."""
ROUND_TILES: Operation[[Request], TilesRounded] = Operation("round_tiles", reference="quantizers._request._run_tiles")
"""An operand in tiles, not yet rotated."""


class Quantized(NamedTuple):
    """A quantized operand, with max|x| and what is saved for backward."""

    tensor: QTensor
    amax: Tensor | float
    packed: Packed | None = None
    mask: Tensor | None = None


def require_numbers(x: Tensor, who: str) -> None:
    """Reject what has no arithmetic: integers, 8-bit floats, sparse tensors.

    Raises:
        UserError: with `who` met it, and what to do.
    """
    if not x.is_floating_point() or x.dtype.itemsize < 2:
        raise UserError(
            f"{who} got a tensor of {x.dtype}: convert it to a floating-point dtype of 16 bits or more first"
        )
    if x.layout is not torch.strided:
        raise UserError(f"{who} got a tensor of layout {x.layout}: make it dense first, with x.to_dense()")


def prepare(x: Tensor) -> Tensor:
    """`x` detached and dense."""
    require_numbers(x, "quantize")
    x = x.detach()
    return x if is_dense(x) else x.contiguous()


def scale_of(request: Request) -> Tensor:
    """The scale that `run` would use for a whole tensor, 0-d."""
    return request.spec.scaling.of(request.statistics, request.format, request.stored)


def run(request: Request) -> Quantized:
    """Quantize one operand."""
    if request.part is not None and (request.tile is not None or request.rotation is not None):
        turned = request.spec.transform.size if request.spec.transform is not None else 1
        request.part.require_whole(request.x.shape, request.tile, turned)
    if request.tile is not None and request.toward is None and request.has_own_words and request.has_own_scales:
        found = ROUND_TILES(request)
        if found is not None:
            q = request.x.new_empty(0) if found.q is None else found.q
            tensor = QTensor(q, found.scale, request.format, (found.each, request.tile))
            return Quantized(tensor, found.amax, found.packed, found.mask)
    if request.rotation is not None:
        request = replace(request, x=request.rotation.apply(request.x), rotation=None)
    if request.tile is not None:
        return _run_tiles(request, request.tile)
    statistics = request.statistics
    scale = request.spec.scaling.of(statistics, request.format, request.stored)
    kernel = ROUND.plan(request, scale) if request.toward is None and request.has_own_words else None
    return _finish(request, scale, _round(request, scale, statistics) if kernel is None else kernel())


def run_pair(first: Request, second: Request) -> tuple[Quantized, Quantized]:
    """Quantize one tensor to two formats with the same scale, reading it once where a kernel can."""
    statistics = first.statistics
    scale = first.spec.scaling.of(statistics, first.format, first.stored)
    own = first.has_own_words and second.has_own_words
    both = ROUND_PAIR(first, second, scale) if own else None
    if both is None:
        both = [(ROUND(r, scale) if own else None) or _round(r, scale, statistics) for r in (first, second)]
    return _finish(first, scale, both[0]), _finish(second, scale, both[1])


def _finish(request: Request, scale: Tensor, rounded: Rounded) -> Quantized:
    amax, q = rounded.amax, rounded.q if rounded.q is not None else request.x.new_empty(0)
    if not isinstance(amax, float) or not math.isfinite(amax):
        scale = scale + amax * 0  # NaN for data with NaN or infinity
    packed = rounded.packed
    if packed is None and request.save and request.spec.samples == 1 and is_packable(request.format):
        packed = pack(q, request.format)
    return Quantized(QTensor(q, scale, request.format), amax, packed, rounded.mask)


def _round(request: Request, scale: Tensor, statistics: Statistics) -> Rounded:
    """The reference."""
    x, spec, format = request.x.to(torch.float32), request.spec, request.format
    reciprocal = scale.reciprocal()
    q = _to_grid(x * reciprocal, request, None if request.toward is None else request.toward * reciprocal)
    q = q.to(carrier_dtype(format)) if spec.samples == 1 else q
    bound = spec.scaling.bound(scale, format, request.stored) if request.save else None
    return Rounded(q, statistics.amax, mask=None if bound is None else pack_mask(bound.inside(x)))


def _to_grid(scaled: Tensor, request: Request, toward: Tensor | None = None) -> Tensor:
    """Numbers in grid units, rounded; after SMP a mean of several roundings."""
    spec, format = request.spec, request.format
    if toward is not None:
        return round_toward(scaled, toward, format)
    if not spec.rounding.draws:
        nearest = spec.rounding is Rounding.NEAREST
        return nearest_number(scaled, format) if nearest else round_to_format(scaled, format, spec.rounding)
    if request.key is None:
        raise UserError("stochastic rounding needs a key: pass key=stream_key(seed, ...)")
    q = _draw(scaled, request, request.key, 0)
    for i in range(1, spec.samples):
        q = q.add_(_draw(scaled, request, request.key, i))
    return q if spec.samples == 1 else q.div_(spec.samples)


def _run_tiles(request: Request, tile: Tile) -> Quantized:
    """The reference for operands [groups, rows, spots, sums] whose tiles have scales."""
    spec, format = request.spec, request.format
    x = request.x.to(torch.float32).contiguous()
    tiled = quantize_tiles(
        x,
        tile,
        spec.scaling,
        format,
        request.stored,
        request.key,
        lambda scaled, toward: _to_grid(scaled, request, toward),
        request.toward,
        request.part,
    )
    mask = None
    if request.save and spec.scaling.clips:
        whole = QTensor(tiled.codes, tiled.scale, format, (tiled.each, tiled.tile)).scales
        bound = spec.scaling.bound(whole, format, request.stored)
        mask = None if bound is None else pack_mask(bound.inside(x))
    carrier = carrier_dtype(format) if spec.samples == 1 else torch.float32
    codes, packed = tiled.codes, None
    if request.save and spec.samples == 1 and is_packable(format):
        packed = replace(pack(codes.nan_to_num(0.0), format), blocks=tiled.blocks)  # the scale says NaN
    if tiled.blocks is not None:
        exact = spec.samples == 1 and fits_bfloat16(format.grid, tiled.blocks.format) and not request.wide
        codes, carrier = tiled.blocks.times(codes), torch.bfloat16 if exact else torch.float32
    tensor = QTensor(codes.to(carrier), tiled.scale, format, (tiled.each, tiled.tile))
    return Quantized(tensor, tiled.amax, packed, mask)


def _draw(scaled: Tensor, request: Request, key: int, sample: int) -> Tensor:
    """One stochastic rounding; words go to elements in the order in which these lie in memory."""
    words = torch.empty_like(scaled, dtype=torch.int32)
    key = stream_key(key, sample)
    if request.part is None:
        memory_flat(words).copy_(random_words(key, (scaled.numel(),), scaled.device))
    else:
        words.copy_(words_at(key, request.part.positions(words)))
    return round_to_format(scaled, request.format, request.spec.rounding, words)


def request_for(
    x: Tensor,
    spec: QuantSpec,
    tile: Tile | None = None,
    stored: Tensor | None = None,
    key: int | None = None,
    format: Format | None = None,
    save: bool = False,
    rotation: Rotation | None = None,
    wide: bool = False,
) -> Request:
    """The request to round `x`; with scales for parts of it, an operand [groups, rows, spots, sums] cut into such tiles."""
    tile = None if tile is None or tile.is_tensor else tile
    return Request(prepare(x), spec, format or spec.format, tile, stored, key, save, rotation=rotation, wide=wide)
