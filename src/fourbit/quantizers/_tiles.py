"""Who shares a scale: tiles of an operand in the orientation of its matrix product.

An operand lies as [groups, rows, spots, sums]: the product sums over `sums` (and, in a convolution, over the `spots`, the
pixels or kernel positions that meet), each row gives results of its own. A tile is a number of rows by a number of summed
elements; elements of one tile share a scale.

    tensor     all elements
    row        one row: a token of x or g, an output channel of w; the product can take such a scale out again
    Block(n)   n neighbours along the summed axis of one row and spot
    Tile(r, n) r rows by n neighbours of one spot

The last tile of an axis may be smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format


@dataclass(frozen=True)
class Tile:
    """Elements that share a scale: `rows` rows by `sums` elements along the summed axis; None: all of them.

    >>> print(Tile(16, 16), Tile(1, 32))
    tile of 16x16 block of 32
    """

    rows: int | None
    sums: int | None

    def __post_init__(self) -> None:
        for name, size in (("rows", self.rows), ("sums", self.sums)):
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
                raise UserError(f"a tile has a positive number of {name}, or None for all of them, not {size!r}")

    @property
    def T(self) -> Tile:
        """The tile of the transposed operand, which another product sums along its rows."""
        return Tile(self.sums, self.rows)

    @property
    def in_spot(self) -> bool:
        """Whether each spot has tiles of its own."""
        return self.rows is not None and self.sums is not None

    @property
    def is_tensor(self) -> bool:
        """Whether all elements share one scale."""
        return self.rows is None and self.sums is None

    @property
    def is_row(self) -> bool:
        """Whether the product can take the scale out again, row by row."""
        return self.rows is not None and self.sums is None

    def __str__(self) -> str:
        if self.is_tensor:
            return "tensor"
        if self.sums is None:
            return "row" if self.rows == 1 else f"{self.rows} rows"
        rows = "all" if self.rows is None else str(self.rows)
        return f"block of {self.sums}" if rows == "1" else f"tile of {rows}x{self.sums}"


def Block(size: int) -> Tile:
    """`size` neighbours along the axis that the product sums over.

    >>> Block(16)
    Tile(rows=1, sums=16)
    """
    return Tile(1, size)


Granularity = Literal["tensor", "channel", "row"] | Tile
"""Who shares a scale. "channel": the output channel of w and g, the input channel of x, rows of a product or summed over."""

TENSOR, ROW, COLUMN = Tile(None, None), Tile(1, None), Tile(None, 1)


def tile_of(granularity: Granularity, channels_are_rows: bool = True) -> Tile:
    """The tile that a granularity means for an operand whose channels are rows, or are summed over."""
    if isinstance(granularity, Tile):
        return granularity
    if granularity == "channel":
        return ROW if channels_are_rows else COLUMN
    return TENSOR if granularity == "tensor" else ROW


def require_granularity(granularity: object) -> None:
    """Reject what is none.

    Raises:
        UserError: it is neither a name nor a Tile.
    """
    if not isinstance(granularity, Tile) and granularity not in ("tensor", "channel", "row"):
        raise UserError(
            f"granularity must be 'tensor', 'channel', 'row', Block(n) or Tile(rows, sums), not {granularity!r}"
        )


class Folded(NamedTuple):
    """An operand cut into tiles.

    Attributes:
        t: [G, R', r, S', s, K', k]: tiles R', S', K' of r rows, s spots, k summed elements; zeros where a tile is not full.
        count: elements of each tile, broadcastable against its scale.
    """

    t: Tensor
    count: Tensor | int

    DIMS = (2, 4, 6)


def _sizes(shape: torch.Size, tile: Tile) -> tuple[int, int, int, int]:
    """r, k, and how many of them, for an operand [G, R, S, K]; of all elements of an empty axis there is one tile."""
    r, k = (
        size if size is None else min(size, max(1, n)) for size, n in ((tile.rows, shape[1]), (tile.sums, shape[3]))
    )
    r, k = max(1, shape[1]) if r is None else r, max(1, shape[3]) if k is None else k
    return r, k, 1 if tile.rows is None else -(-shape[1] // r), 1 if tile.sums is None else -(-shape[3] // k)


def fold(m: Tensor, tile: Tile) -> Folded:
    """[G, R, S, K] cut into tiles. A scale of the tensor has no groups either: they are rows then."""
    m = m.reshape(1, -1, *m.shape[2:]) if tile.is_tensor else m
    r, k, num_r, num_k = _sizes(m.shape, tile)
    G, R, S, K = m.shape
    ragged_r, ragged_k = num_r * r - R, num_k * k - K
    if ragged_r or ragged_k:
        m = F.pad(m, (0, ragged_k, 0, 0, 0, ragged_r))
    spots = (S, 1) if tile.in_spot else (1, S)
    t = m.reshape(G, num_r, r, *spots, num_k, k)
    if not (ragged_r or ragged_k):
        return Folded(t, r * spots[1] * k)
    full = [
        torch.tensor([size] * (num - 1) + [n - size * (num - 1)], device=m.device).view(view)
        for size, num, n, view in ((r, num_r, R, (1, -1, 1, 1, 1, 1, 1)), (k, num_k, K, (1, 1, 1, 1, 1, -1, 1)))
    ]
    return Folded(t, full[0] * full[1] * spots[1])


def unfold(t: Tensor, shape: torch.Size) -> Tensor:
    """What `fold` took apart, [G, R, S, K] = shape."""
    G, num_r, r, S, s, num_k, k = t.shape
    m = t.reshape(G, num_r * r, S * s, num_k * k)
    return m[:, : G and shape[0] * shape[1] // G, :, : shape[3]].reshape(shape)


class BlockScales(NamedTuple):
    """The scales of tiles as they are kept: codes of `format` (uint8; None: float32 numbers), one for each tile in order."""

    data: Tensor
    format: Format | None
    tile: Tile

    def numbers(self) -> Tensor:
        """float32."""
        if self.format is None:
            return self.data
        values = torch.tensor(self.format.values, dtype=torch.float32, device=self.data.device)
        return values[self.data.to(torch.int32)]

    def times(self, q: Tensor) -> Tensor:
        """Each element of q [G, R, S, K] times the scale of its tile, float32."""
        t = fold(q.to(torch.float32), self.tile).t
        return unfold(t * self.numbers().view(scale_shape(q.shape, self.tile)), q.shape)


@lru_cache(maxsize=256)
def fits_bfloat16(grid: tuple[float, ...], scale_format: Format | None) -> bool:
    """Whether bfloat16 holds every product of a number of the grid and a scale."""
    if scale_format is None or _significand(grid) + _significand(tuple(scale_format.grid)) > 8:
        return False
    smallest = min(abs(value) for value in grid if value)
    return smallest * scale_format.smallest >= 2.0**-133  # the smallest number of bfloat16


def _significand(grid: tuple[float, ...]) -> int:
    """Bits of the longest odd part of a number."""
    longest = 1
    for value in grid:
        numerator = abs(value).as_integer_ratio()[0]
        longest = max(longest, (numerator // (numerator & -numerator)).bit_length() if numerator else 1)
    return longest


def scale_shape(shape: torch.Size, tile: Tile) -> tuple[int, ...]:
    """Of the scales of an operand [G, R, S, K], broadcastable against `Folded.t`."""
    if tile.is_tensor:
        return (1,) * 7
    _, _, num_r, num_k = _sizes(shape, tile)
    return shape[0], num_r, 1, shape[2] if tile.in_spot else 1, 1, num_k, 1
