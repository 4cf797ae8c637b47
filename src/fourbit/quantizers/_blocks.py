"""Scales of blocks in formats of their own, and the quantization of an operand in tiles.

    x ~ tensor * block * q        block on the grid of a scale format, tensor one float32 number

Sources: OCP Microscaling Formats (MX) Specification v1.0; NVIDIA, Pretraining Large Language Models with NVFP4, arXiv
2509.25149; Cook et al., Four Over Six, arXiv 2512.02010; Castro et al., Quartet, arXiv 2505.14669; Panferov et al., Quartet
II, arXiv 2601.22813; Luo et al., HiFloat4 Format for Language Model Inference, arXiv 2602.11287.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import E8M0, Format, get
from fourbit.quantizers._round import Rounding, grid_of, nearest_number, round_to_format
from fourbit.quantizers._scaling import Bound, Scaling, to_float32
from fourbit.quantizers._share import Slice
from fourbit.quantizers._statistics import Statistics
from fourbit.quantizers._tiles import BlockScales, Folded, Tile, fold, scale_shape, unfold
from fourbit.quantizers._words import random_words, stream_key

ScaleRounding = Literal["floor", "ceil", "nearest", "stochastic"]

FLOAT32_MAX = torch.finfo(torch.float32).max

_SCALES = 0x5CA1E
"""Coordinate of the words of stochastic scales in an operand's stream."""


@dataclass(frozen=True)
class BlockScale(Scaling):
    """The scale of each tile, rounded to a format: amax / format.max at full range, by one of these rules.

        floor       2^(floor(log2 amax) - floor(log2 format.max)): OCP's rule for E8M0; numbers may saturate
        ceil        the smallest scale with which nothing saturates
        nearest     to the nearest scale
        stochastic  to one of the two neighbours, without bias

    With `tensor_bound`, two levels: the largest block scale is that number, and one float32 scale of the tensor does the rest,

        e = tensor_bound * target / max|x|,   d = 1 / e,   block = round(amax * (e * (1 / target))),   x times 1 / (block * d)

    in float32 and in this order, that of TransformerEngine; with several targets the block is round(amax / first * e *
    (first / target)), that of four over six. `fourbit.formats.BlockFormat` is the same in pure Python.

    Args:
        format: of the scales.
        rounding: see above.
        tensor_bound: the block scale that the largest number of the tensor gets (NVFP4: 448); None: one level.
        targets: magnitudes of the format that a block's largest number may become; of several, each block takes the one with
            the least squared error, the first where they tie. None: format.max alone. Four over six: (6, 4).
        prescale: numbers are multiplied by it before rounding and the product is divided by it: with 3/4 none of E2M1 rounds
            beyond 6 under the floor rule.
        clip_rms: take this multiple of the root mean square of the tile in place of amax, and let gradients pass only within
            scale * format.max (QuEST); None: amax.
        corrected: multiply the scales of so many elements (a block of a random rotation) by sum(x^2) / sum(x x^) over them, x^
            their rounding, and round the scales then: without bias after that rotation (MS-EDEN). 0: not.
        micro: sizes of the parts of a block that have a factor of 1 or 2 each, larger parts first (HiFloat4: 8, 4); the target
            is then format.max times 2 for each level, and scales and their reciprocals are rounded to bfloat16 on their way,
            as `fourbit.formats.BlockFormat` has it. A part's factor is kept with its scale, as one float32 number.
        outer: with `tensor_bound`, the float32 scale is not of the tensor but of each so many elements along the sums
            (TetraJet-v2: 128), and multiplied into the scales that are kept; 0: of the tensor.
    """

    reads_data: ClassVar[bool] = True
    format: Format = E8M0
    rounding: ScaleRounding = "floor"
    tensor_bound: float | None = None
    targets: tuple[float, ...] | None = None
    prescale: float = 1.0
    clip_rms: float | None = None
    corrected: int = 0
    micro: tuple[int, ...] = ()
    outer: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", get(self.format))
        object.__setattr__(self, "micro", tuple(self.micro))
        if self.rounding not in ("floor", "ceil", "nearest", "stochastic"):
            raise UserError(f"a scale is rounded by 'floor', 'ceil', 'nearest' or 'stochastic', not {self.rounding!r}")
        if self.rounding == "floor" and any(math.frexp(v)[0] != 0.5 for v in self.format.grid if v > 0):
            raise UserError(
                f"the floor rule is for scales that are powers of two: use rounding='nearest' with {self.format.name}"
            )
        for name in ("tensor_bound", "prescale", "clip_rms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number, not {value!r}")
        plain = (self.rounding, self.tensor_bound, self.prescale, self.clip_rms, self.corrected, self.targets)
        if self.micro and plain != ("nearest", None, 1.0, None, 0, None):
            raise UserError(
                "micro-exponents go with rounding='nearest' and nothing else of a BlockScale: leave the rest out"
            )
        if any(size % part for size, part in zip(self.micro, self.micro[1:], strict=False)):
            raise UserError(
                f"each of the parts with micro-exponents divides the larger ones, which {self.micro} do not"
            )

        if self.outer and (self.tensor_bound is None or self.corrected or self.targets is not None):
            raise UserError("outer blocks need a tensor_bound, and neither targets nor a correction")

    def reach(self, format: Format) -> tuple[float, ...]:
        """The magnitudes that a block's largest number may become."""
        return self.targets or (format.max * 2.0 ** len(self.micro),)

    def kept(self, tile: Tile) -> tuple[Tile, Format | None]:
        """For whom scales are kept with the codes, and in which format (None: float32)."""
        if self.micro:
            return Tile(1, self.micro[-1]), None
        return tile, None if self.outer else self.format

    @property
    def clips(self) -> bool:
        """With `clip_rms`."""
        return self.clip_rms is not None

    @property
    def has_tensor_scale(self) -> bool:
        """With `tensor_bound`, but for outer blocks."""
        return self.tensor_bound is not None and not self.outer

    @property
    def draws(self) -> bool:
        """Whether the scales need random words."""
        return self.rounding == "stochastic"

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """The scale of each tile before a choice among several targets, or a correction."""
        encode = self.encode(statistics, format)
        block = self.block(statistics, format, encode, self.reach(format)[0])
        return block / (encode * self.prescale)

    def encode(self, statistics: Statistics, format: Format) -> Tensor:
        """tensor_bound * target / max|x|, 0-d float32; 1 with one level."""
        amax = statistics.amax
        if self.tensor_bound is None:
            return torch.ones((), dtype=torch.float32, device=amax.device)
        outer = max(1, self.outer // statistics.x.shape[6]) if self.outer else 0
        largest = _over_outer(amax, outer) if outer else statistics.largest
        reach = self.tensor_bound * self.reach(format)[0]
        encode = torch.tensor(reach, dtype=torch.float32, device=amax.device) / largest
        return torch.where(largest > 0, encode.clamp(max=FLOAT32_MAX), torch.where(largest == 0, 1.0, largest))

    def block(self, statistics: Statistics, format: Format, encode: Tensor, target: float) -> Tensor:
        """The scale of each tile whose largest number is to become `target`, on its grid; NaN where that is not finite."""
        if self.clip_rms is not None:
            mean_square = torch.as_tensor(statistics.moments.mean_square)
            statistic = (self.clip_rms * mean_square.sqrt()).to(torch.float32)
        else:
            statistic = statistics.amax
        if self.rounding == "floor":
            _, exponent = torch.frexp(statistic)
            top = math.frexp(target)[1]
            block = torch.exp2((exponent - top).to(torch.float32)).clamp(self.format.smallest, self.format.max)
            block = torch.where(statistic > 0, block, self.format.smallest)
        elif self.micro:
            block = self.rounded(_bfloat16(statistic * float(torch.tensor(1 / target, dtype=torch.bfloat16))))
        elif self.rounding == "ceil":
            block = self._covering(statistic * encode, target)
        elif self.targets is not None and len(self.targets) > 1:
            top = self.targets[0]
            block = self.rounded(statistic / top * encode * to_float32(top / target))
        else:
            block = self.rounded(statistic * (encode * to_float32(1 / target)))
        return torch.where(statistics.amax.isfinite(), block, math.nan)

    def micro_factors(self, t: Tensor, reciprocal: Tensor, format: Format) -> Tensor:
        """The product of the factors of each element of folded tiles [..., k], in its shape.

        Args:
            reciprocal: of the scales of the tiles.
        """
        whole = torch.nn.functional.pad(t, (0, -t.shape[-1] % self.micro[0]))
        factors = torch.ones_like(whole)
        limit = 2.0 ** (math.frexp(format.max)[1] - 1 + len(self.micro))
        for size in self.micro:
            largest = whole.abs().unflatten(-1, (-1, size)).amax(-1) * reciprocal
            doubled = (largest / factors[..., ::size] >= limit).to(torch.float32) + 1
            factors = factors * doubled.repeat_interleave(size, -1)
            limit /= 2
        return factors[..., : t.shape[-1]]

    def _covering(self, largest: Tensor, target: float) -> Tensor:
        """The smallest scale with largest / scale <= target."""
        raw = largest / target
        low = grid_of(self.format).neighbors(raw)[0]
        above = grid_of(self.format).neighbors(torch.nextafter(raw, torch.full_like(raw, math.inf)))[1]
        covers = low.double() * target >= largest.double()
        return torch.where(covers, low, above)

    def rounded(self, raw: Tensor, key: int | None = None) -> Tensor:
        """On the grid of the scale format."""
        if self.rounding == "stochastic" and key is not None:
            words = random_words(stream_key(key, _SCALES), tuple(raw.shape), raw.device)
            return round_to_format(raw, self.format, Rounding.STOCHASTIC, words)
        return nearest_number(raw, self.format)

    def bound(self, scale: Tensor, format: Format, stored: Tensor | None) -> Bound | None:
        """|x| <= scale * format.max, with `clip_rms`."""
        return Bound("inclusive", scale * format.max) if self.clips else None

    def __str__(self) -> str:
        parts = [f"{self.format.name} scales, {self.rounding}"]
        if self.tensor_bound is not None:
            parts.append(f"over a tensor scale (at most {self.tensor_bound:g})")
        if self.targets is not None and len(self.targets) > 1:
            parts.append("best of " + " and ".join(f"{t:g}" for t in self.targets))
        if self.clip_rms is not None:
            parts.append(f"clipped at {self.clip_rms:g} RMS")
        if self.prescale != 1.0:
            parts.append(f"times {self.prescale:g}")
        if self.corrected:
            parts.append(f"corrected by {self.corrected}")
        if self.outer:
            parts.append(f"of each {self.outer}")
        if self.micro:
            parts.append(f"with a factor of 1 or 2 for each {' and for each '.join(map(str, self.micro))}")
        return " ".join(parts)


class Tiled(NamedTuple):
    """An operand [G, R, S, K] quantized in tiles: x ~ scale * (blocks * codes).

    Attributes:
        codes: on the grid, float32.
        blocks: scale of each tile, None where the scale of a row says it all.
        scale: 0-d, or [G, R, 1, 1].
        each: the whole scale of each tile, as `fold` has tiles.
        amax: of each tile.
        tile: who shares a scale: the tile asked for, or a part of it that has a factor.
    """

    codes: Tensor
    blocks: BlockScales | None
    scale: Tensor
    each: Tensor
    amax: Tensor
    tile: Tile


def quantize_tiles(
    x: Tensor,
    tile: Tile,
    scaling: Scaling,
    format: Format,
    stored: Tensor | None,
    key: int | None,
    to_grid: Callable[[Tensor, Tensor | None], Tensor],
    toward: Tensor | None = None,
    part: Slice | None = None,
) -> Tiled:
    """Scale and round an operand.

    Args:
        x: [G, R, S, K].
        to_grid: rounds numbers in grid units, [G, R, S, K], given those of `toward`.
        toward: an average in the shape of x, or None.
        part: of the batch, which x is in this process, if its scales are those of the whole batch.
    """
    x = x.to(torch.float32)
    folded = fold(x, tile)
    average = None if toward is None else fold(toward.to(torch.float32), tile)

    def in_units(factor: Tensor) -> Tensor:
        """x times a factor of its tile, rounded."""
        others = None if average is None else unfold(average.t * factor, x.shape)
        return to_grid(unfold(folded.t * factor, x.shape), others)

    share = part.share if part is not None and scaling.reads_data else None
    spans = part is not None and part.spans(tile)
    statistics = Statistics(folded.t, Folded.DIMS, folded.count, share, spans)
    shape = scale_shape(x.shape, tile)
    if isinstance(scaling, BlockScale):
        return _with_block_scales(x, folded, statistics, tile, scaling, format, key, in_units)
    scale = scaling.of(statistics, format, stored if stored is None or stored.numel() == 1 else stored.view(shape))
    scale = (scale + statistics.amax * 0).expand(shape)
    codes = in_units(scale.reciprocal())
    if tile.is_row:
        rows = unfold(scale.expand(*shape[:2], folded.t.shape[2], *shape[3:]), torch.Size((*x.shape[:2], 1, 1)))
        return Tiled(codes, None, rows, scale, statistics.amax, tile)
    largest = scale.max() if scale.numel() else scale.new_ones(())
    blocks = BlockScales((scale / largest).contiguous(), None, tile)
    return Tiled(codes, blocks, largest, scale, statistics.amax, tile)


def _with_block_scales(
    x: Tensor,
    folded: Folded,
    statistics: Statistics,
    tile: Tile,
    scaling: BlockScale,
    format: Format,
    key: int | None,
    in_units: Callable[[Tensor], Tensor],
) -> Tiled:
    if scaling.micro:
        return _with_micro_exponents(x, folded, statistics, tile, scaling, format, in_units)
    encode = scaling.encode(statistics, format)
    decode = encode.reciprocal()

    def rounded(block: Tensor) -> Tensor:
        reciprocal = (block * decode).reciprocal().clamp(max=FLOAT32_MAX) * scaling.prescale
        reciprocal = torch.where(block == 0, 0.0, reciprocal)
        return in_units(reciprocal)

    def error(block: Tensor, codes: Tensor) -> Tensor:
        values = fold(codes, tile).t * block
        if scaling.tensor_bound is not None:
            values = values * statistics.largest / (scaling.tensor_bound * scaling.reach(format)[0])
        squares = (values - folded.t).square()
        total = torch.zeros_like(block)
        for r, s, k in itertools.product(*(range(folded.t.shape[d]) for d in Folded.DIMS)):  # one after the other
            total = total + squares[:, :, r : r + 1, :, s : s + 1, :, k : k + 1]
        return total

    targets = scaling.reach(format)
    block = scaling.block(statistics, format, encode, targets[0])
    codes = rounded(block)
    for target in targets[1:]:
        other = scaling.block(statistics, format, encode, target)
        other_codes = rounded(other)
        better = error(other, other_codes) < error(block, codes)
        block = torch.where(better, other, block)
        codes = torch.where(unfold(better.expand_as(folded.t), x.shape), other_codes, codes)
    if scaling.corrected:
        numbers = fold(codes, tile).t * (block * decode)
        together = max(1, scaling.corrected // folded.t.shape[6])
        projection = _over_neighbours((folded.t * numbers).sum(Folded.DIMS, keepdim=True), together)
        square = _over_neighbours(folded.t.square().sum(Folded.DIMS, keepdim=True), together)
        factor = torch.where(projection > 0, square / projection, 1.0)
        block = torch.where(block.isfinite(), scaling.rounded(block * factor, key), block)
    each = block * decode / scaling.prescale
    if scaling.outer:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        return Tiled(codes, BlockScales(each.contiguous(), None, tile), one, each, statistics.amax, tile)
    return Tiled(codes, _kept(block, scaling.format, tile), decode / scaling.prescale, each, statistics.amax, tile)


def _with_micro_exponents(
    x: Tensor,
    folded: Folded,
    statistics: Statistics,
    tile: Tile,
    scaling: BlockScale,
    format: Format,
    in_units: Callable[[Tensor], Tensor],
) -> Tiled:
    one = torch.ones((), dtype=torch.float32, device=x.device)
    block = scaling.block(statistics, format, one, scaling.reach(format)[0])
    reciprocal = _bfloat16(block.reciprocal())
    factors = scaling.micro_factors(folded.t, reciprocal, format)
    codes = in_units(reciprocal / factors)
    part, kept_format = scaling.kept(tile)
    whole = unfold((block * factors).expand_as(folded.t), x.shape)
    each = (
        fold(whole, part).t[..., :1].contiguous()
    )  # the first element of a part is there, even where the last is not full
    return Tiled(codes, BlockScales(each, kept_format, part), one, each, statistics.amax, part)


def _bfloat16(t: Tensor) -> Tensor:
    """Rounded to bfloat16, float32."""
    return t.to(torch.bfloat16).to(torch.float32)


def _over_outer(amax: Tensor, count: int) -> Tensor:
    """The largest of `count` neighbouring tiles along the summed axis, for each of them."""
    num = amax.shape[5]
    whole = torch.nn.functional.pad(amax, (0, 0, 0, -num % count)).unflatten(5, (-1, count))
    return whole.amax(6, keepdim=True).expand_as(whole).flatten(5, 6)[:, :, :, :, :, :num]


def _over_neighbours(sums: Tensor, count: int) -> Tensor:
    """Sums of tiles, added over `count` neighbours along the summed axis; each of them gets the total."""
    num = sums.shape[5]
    whole = torch.nn.functional.pad(sums, (0, 0, 0, -num % count)).unflatten(5, (-1, count))
    return whole.sum(6, keepdim=True).expand_as(whole).flatten(5, 6)[:, :, :, :, :, :num]


def _kept(block: Tensor, format: Format, tile: Tile) -> BlockScales:
    """The scales as codes, where eight bits hold them and NaN."""
    if not scale_fits_byte(format):
        return BlockScales(block, None, tile)
    codes, _ = _codes_of(format)
    grid = torch.tensor(format.grid, dtype=torch.float32, device=block.device)
    index = torch.bucketize(block.contiguous(), grid, out_int32=True)
    index = torch.where(block.isnan(), len(format.grid), index)
    return BlockScales(codes.to(block.device)[index], format, tile)


def scale_fits_byte(format: Format | None) -> bool:
    """Whether scales of that format, and NaN, are kept as codes of one byte."""
    return format is not None and format.bits <= 8 and _codes_of(format)[1]


def codes_of_scales(format: Format) -> Tensor:
    """The code of each grid value, then that of NaN, uint8."""
    return _codes_of(format)[0]


@lru_cache(maxsize=64)
def _codes_of(format: Format) -> tuple[Tensor, bool]:
    """The code of each grid value, then that of NaN, uint8; whether there is one."""
    nan = [code for code, value in enumerate(format.values) if math.isnan(value)]
    codes = [format.encode(value) for value in format.grid]
    return torch.tensor([*codes, nan[0] if nan else 0], dtype=torch.uint8), bool(nan)
