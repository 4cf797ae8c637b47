"""`QuantSpec` describes how one operand is quantized; `quantize` does it; `QTensor` is the result.

    q = round_to_format(x * (1 / scale), format),        x ~ scale * q

The reciprocal of the scale is taken in float32 and multiplied, which is what fast kernels do too; for the power-of-two
scales of GradScale the difference to a division is nil.

q is kept in a carrier: the smallest of int8, uint8, bfloat16 and float32 that holds every number of the format exactly, so
that hardware can multiply it fast without changing a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fourbit import backends
from fourbit.errors import UserError
from fourbit.formats import Format, get
from fourbit.quantizers._blocks import BlockScale, fits_bfloat16, quantize_tiles
from fourbit.quantizers._estimator import DGE
from fourbit.quantizers._packed import Packed, is_packable, pack, pack_mask
from fourbit.quantizers._round import Rounding, nearest_number, round_to_format, round_toward
from fourbit.quantizers._scaling import FixedScale, Scaling
from fourbit.quantizers._statistics import Statistics, is_dense, memory_flat
from fourbit.quantizers._tiles import Granularity, Tile, fold, require_granularity, tile_of, unfold
from fourbit.quantizers._transform import Hadamard, Rotation
from fourbit.quantizers._words import random_words, stream_key

Restore = Literal["", "magnitude", "sum"]
Source = Literal["exact", "fprop"]


@dataclass(frozen=True)
class QuantSpec:
    """One operand: grid, scale, who shares it, and rounding rule.

    Args:
        format: a Format or the name of one.
        scaling: where the scale comes from.
        granularity: "tensor", "row", "channel", `Block(n)` or `Tile(rows, n)`: see `fourbit.quantizers.Tile`.
        rounding: a `Rounding`.
        samples: average of this many independent stochastic roundings (LUQ's SMP); 1 for other rules.
        restore: for gradients, what of the exact tensor x the products get back, which its rounding x^ has lost:
            "magnitude" multiplies their results by sum(x^2) / sum(x x^), so that the projection of x^ on x is x again, one
            number per tensor and GEMM; "sum" adds to each channel of x^ the same number, so that its sum is that of x (an
            experiment: the operand is no longer on the grid).
        transform: rotates the operand along the axis that its product sums over, before anything else. Both operands of a
            product have the same.
        source: what is quantized. "exact": the tensor; "fprop": for w_dgrad and x_wgrad, what fprop had of it (quantized a
            second time).
        estimator: for w_fprop, what the gradient of its rounding is taken for; None: straight through.
        outliers: for x_fprop, a quantile near 1. What lies beyond it (and below 1 minus it), of the tensor or of each row, is
            clamped, and the difference multiplied in high precision by the quantized weight (OCC, outlier clamping and
            compensation); the hardware would have a sparse product for it. None: everything is quantized.

    >>> str(QuantSpec("fp4_e2m1"))
    'fp4_e2m1, fixed 1'
    """

    format: Format
    scaling: Scaling = field(default_factory=FixedScale)
    granularity: Granularity = "tensor"
    rounding: Rounding = Rounding.NEAREST
    samples: int = 1
    restore: Restore = ""
    transform: Hadamard | None = None
    source: Source = "exact"
    estimator: DGE | None = None
    outliers: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get(self.format))
        if self.restore not in ("", "magnitude", "sum"):
            raise UserError(f"restore must be '', 'magnitude' or 'sum', not {self.restore!r}")
        require_granularity(self.granularity)
        if isinstance(self.scaling, BlockScale) and not self.in_tiles:
            raise UserError("a BlockScale needs tiles to scale: use granularity=Block(16), for example")
        micro = self.scaling.micro if isinstance(self.scaling, BlockScale) else ()
        if micro and not (
            isinstance(self.granularity, Tile)
            and self.granularity.rows == 1
            and not (self.granularity.sums or 1) % micro[0]
        ):
            raise UserError(
                f"parts of {micro[0]} with micro-exponents need blocks of whole parts: use granularity=Block(64)"
            )
        if objection := self.scaling.objection(self.granularity):
            raise UserError(objection)
        if self.restore and (
            self.transform is not None or isinstance(self.granularity, Tile) or self.granularity == "row"
        ):
            raise UserError("restore is for scales of the tensor or of channels, without a transform")
        if self.source not in ("exact", "fprop"):
            raise UserError(f"source must be 'exact' or 'fprop', not {self.source!r}")
        if not (self.transform is None or isinstance(self.transform, Hadamard)):
            raise UserError(f"transform must be a Hadamard or None, not {self.transform!r}")
        if self.estimator is not None and (self.transform is not None or self.scaling.clips):
            raise UserError("an estimator is for operands that are neither rotated nor clipped: leave one of them out")
        if self.outliers is not None:
            if not 0.5 < self.outliers < 1:
                raise UserError(f"outliers is a quantile between 0.5 and 1, not {self.outliers!r}")
            if self.transform is not None or self.scaling.clips or self.granularity not in ("tensor", "row"):
                raise UserError("outliers are split off per tensor or row, without a transform or a clip value")
        if self.samples < 1 or (self.samples > 1 and not self.rounding.draws):
            raise UserError("samples must be 1, or more with stochastic rounding")

    @property
    def stochastic(self) -> bool:
        """Whether it needs random words."""
        fresh = self.transform is not None and self.transform.is_fresh
        return self.rounding.draws or fresh or (isinstance(self.scaling, BlockScale) and self.scaling.draws)

    @property
    def in_tiles(self) -> bool:
        """Whether several scales are shared by parts of the operand."""
        return self.granularity != "tensor" and self.granularity != Tile(None, None)

    @property
    def needs_orientation(self) -> bool:
        """Whether it matters which axis the product sums over."""
        return self.in_tiles or self.transform is not None

    def starting_at(self, bound: float) -> QuantSpec:
        """The same for data that `bound` limits, where the first batch would decide the scale."""
        scaling, format = self.scaling.starting_at(bound, self.format)
        return replace(self, scaling=scaling, format=format)

    def __str__(self) -> str:
        parts = [self.format.name, str(self.scaling)]
        if self.in_tiles:
            parts.append(f"per {self.granularity}")
        if self.rounding is not Rounding.NEAREST:
            parts.append(self.rounding.value)
        if self.samples > 1:
            parts.append(f"{self.samples} samples")
        if self.restore:
            parts.append(f"{self.restore} restored")
        if self.transform is not None:
            parts.append(str(self.transform))
        if self.source == "fprop":
            parts.append("of fprop's")
        if self.estimator is not None:
            parts.append(str(self.estimator))
        if self.outliers is not None:
            parts.append(f"beyond quantile {self.outliers:g} in high precision")
        return ", ".join(parts)


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


@dataclass(frozen=True)
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
        amax: max|x| of all, rotated.
        packed: where it is to be saved: the codes, with the scales of blocks.
    """

    q: Tensor | None
    scale: Tensor
    each: Tensor
    amax: float
    packed: Packed | None


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
    return request.spec.scaling.of(Statistics(request.x), request.format, request.stored)


def run(request: Request) -> Quantized:
    """Quantize one operand."""
    if request.tile is not None and request.toward is None:
        found: TilesRounded | None = backends.dispatch("round_tiles", request)
        if found is not None:
            q = request.x.new_empty(0) if found.q is None else found.q
            tensor = QTensor(q, found.scale, request.format, (found.each, request.tile))
            return Quantized(tensor, found.amax, found.packed)
    if request.rotation is not None:
        request = replace(request, x=request.rotation.apply(request.x), rotation=None)
    if request.tile is not None:
        return _run_tiles(request, request.tile)
    statistics = Statistics(request.x)
    scale = request.spec.scaling.of(statistics, request.format, request.stored)
    rounded = None if request.toward is not None else backends.dispatch("round", request, scale)
    return _finish(request, scale, rounded or _round(request, scale, statistics))


def run_pair(first: Request, second: Request) -> tuple[Quantized, Quantized]:
    """Quantize one tensor to two formats with the same scale, reading it once where a kernel can."""
    statistics = Statistics(first.x)
    scale = first.spec.scaling.of(statistics, first.format, first.stored)
    both: Sequence[Rounded] | None = backends.dispatch("round_pair", first, second, scale)
    if both is None:
        both = [backends.dispatch("round", r, scale) or _round(r, scale, statistics) for r in (first, second)]
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
    q = _draw(scaled, format, spec, request.key, 0)
    for i in range(1, spec.samples):
        q = q.add_(_draw(scaled, format, spec, request.key, i))
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
        exact = spec.samples == 1 and fits_bfloat16(format, tiled.blocks.format) and not request.wide
        codes, carrier = tiled.blocks.times(codes), torch.bfloat16 if exact else torch.float32
    tensor = QTensor(codes.to(carrier), tiled.scale, format, (tiled.each, tiled.tile))
    return Quantized(tensor, tiled.amax, packed, mask)


def _draw(scaled: Tensor, format: Format, spec: QuantSpec, key: int, sample: int) -> Tensor:
    """One stochastic rounding; words go to elements in the order in which these lie in memory."""
    words = torch.empty_like(scaled, dtype=torch.int32)
    memory_flat(words).copy_(random_words(stream_key(key, sample), (scaled.numel(),), scaled.device))
    return round_to_format(scaled, format, spec.rounding, words)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    sums: int | Sequence[int] = -1,
    stored: Tensor | None = None,
    key: int | None = None,
    format: Format | None = None,
) -> QTensor:
    """Quantize `x` as `spec` says. Not differentiable: layers supply the straight-through gradient.

    Args:
        x: any shape, any floating dtype; the arithmetic is float32.
        sums: the axes that a matrix product sums over, along which blocks and rotations run; all others are rows. Of several,
            the last runs fastest. It does not matter where one scale belongs to the tensor.
        stored: what the scaling remembers: PACT's alpha, GradScale's exponent.
        key: stream key of the random words, for stochastic rounding.
        format: replaces `spec.format` (PACT's signed form).

    Returns:
        QTensor, its numbers in the order of axes of `x`; rotated, where there is a transform. NaN or infinity in `x` make the
        scale NaN (of the tensor, or of their tile), so that they reach whatever is computed from `dequantize()` and are never
        silently saturated.

    Raises:
        UserError: integer input, an axis that is not there, a transform that does not divide the axis, stochastic rounding
            without a key.

    >>> from fourbit.quantizers import Amax, BlockScale, Block
    >>> x = torch.tensor([[-3.0, 0.4, 1.0, 7.0]])
    >>> quantize(x, QuantSpec("int4_sym", Amax())).q
    tensor([[-3,  0,  1,  7]], dtype=torch.int8)
    >>> mxfp4 = QuantSpec("fp4_e2m1", BlockScale("e8m0"), Block(2))
    >>> quantize(x, mxfp4).dequantize()
    tensor([[-3.0000,  0.5000,  1.0000,  6.0000]])
    """
    if not spec.needs_orientation:
        return run(request_for(x, spec, stored=stored, key=key, format=format)).tensor
    require_numbers(x, "quantize")
    axes = [sums] if isinstance(sums, int) else list(sums)
    if x.dim() == 0 or any(not -x.dim() <= axis < x.dim() for axis in axes) or not axes:
        raise UserError(f"sums is {sums}, but the tensor has {x.dim()} axes")
    axes = [axis % x.dim() for axis in axes]
    rows = [d for d in range(x.dim()) if d not in axes]
    order = [*rows, *axes]
    t = x.detach().permute(order)
    num_sums = math.prod(x.shape[axis] for axis in axes)
    if spec.transform is not None:
        spec.transform.require_divides(num_sums, "lie along `sums`")
    m = t.reshape(1, math.prod(x.shape[d] for d in rows), 1, num_sums)
    rotation = None if spec.transform is None else Rotation(spec.transform, key)
    found = run(request_for(m, spec, tile_of(spec.granularity), stored, key, format, rotation=rotation)).tensor
    back = [order.index(d) for d in range(x.dim())]
    q = found.q.reshape(t.shape).permute(back)
    scale = found.scale
    if scale.numel() > 1 or (scale.dim() and found.each is not None and found.each[1].is_row):
        scale = scale.reshape([x.shape[d] for d in rows] + [1] * len(axes)).permute(back)
    return QTensor(q, scale, found.format)


def quantize_pair(
    x: Tensor, first: QuantSpec, second: QuantSpec, *, stored: Tensor | None = None
) -> tuple[QTensor, QTensor, Tensor]:
    """Quantize `x` to two formats with one scale, as two-phase rounding does: one pass over memory.

    Args:
        x: any shape, any floating dtype.
        first, second: nearest rounding, the same scaling, one scale per tensor.
        stored: what the scaling keeps: GradScale's exponent.

    Returns:
        Both results, and max|x| (0-d float32).

    Raises:
        UserError: the two differ in scaling or granularity.

    >>> from fourbit.quantizers import GradScale
    >>> even, odd = QuantSpec("fp4_r4_even", GradScale()), QuantSpec("fp4_r4_odd", GradScale())
    >>> a, b, amax = quantize_pair(torch.tensor([3.0, -40.0]), even, odd, stored=torch.tensor(0))
    >>> a.q.tolist(), b.q.tolist(), float(amax)
    ([4.0, -64.0], [2.0, -32.0], 40.0)
    """
    if (first.scaling, first.granularity) != (second.scaling, "tensor"):
        raise UserError(f"two formats that share a scale need the same scaling, per tensor: got {first} and {second}")
    a, b = run_pair(request_for(x, first, stored=stored), request_for(x, second, stored=stored))
    return a.tensor, b.tensor, torch.as_tensor(a.amax)


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
