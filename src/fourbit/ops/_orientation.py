"""An operand in the orientation of its matrix product: [groups, rows, spots, sums], a rearrangement of its axes.

What shares a scale (`fourbit.quantizers.Tile`) and what is rotated depends on the axis that a product sums over, and one
operand enters two products. `Contraction.orientation` gives the arrangement for each; it copies no number twice, as im2col
would: the spots are pixels or kernel positions, each with summed channels of its own.

    linear       x, g  rows: leading axes    sums: features         in wgrad the other way round
                 w     rows: out features    sums: in features      in dgrad the other way round
    matmul       groups: batch axes          rows and sums: the last two axes
    convolution  x, g  groups: of channels   rows: samples          spots: pixels             sums: channels
                       in wgrad              rows: channels                                   sums: samples
                 w     groups: of channels   rows: out channels     spots: kernel positions   sums: in channels
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Orientation:
    """Where the axes of an operand go.

    Args:
        split: the operand's shape, with channels of several groups as two axes [groups, channels of one].
        merges: of each axis of the operand, how many of `split` it is.
        groups, rows, spots, sums: axes of `split`; every axis is in one of them.
        is_open: whether zeros may be added along `sums`: samples or tokens, whose number is nobody's choice.
    """

    split: tuple[int, ...]
    merges: tuple[int, ...]
    groups: tuple[int, ...]
    rows: tuple[int, ...]
    spots: tuple[int, ...]
    sums: tuple[int, ...]
    is_open: bool = False

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.groups, *self.rows, *self.spots, *self.sums)

    def _size(self, axes: tuple[int, ...]) -> int:
        return prod(self.split[axis] for axis in axes)

    @property
    def shape(self) -> torch.Size:
        """[groups, rows, spots, sums]."""
        return torch.Size(map(self._size, (self.groups, self.rows, self.spots, self.sums)))

    def of(self, t: Tensor) -> Tensor:
        """The operand as [groups, rows, spots, sums]."""
        return t.reshape(self.split).permute(self._order).reshape(self.shape)

    def back(self, m: Tensor) -> Tensor:
        """An operand [groups, rows, spots, sums] as the product takes it. Where sums have grown, so does their axis; of
        several, which are leading ones, one is left."""
        order, sizes = self._order, [self.split[axis] for axis in self._order]
        if m.shape[3] == self.shape[3]:
            inverse = [order.index(axis) for axis in range(len(order))]
            return self._merged(m.reshape(sizes).permute(inverse), self.merges)
        kept = sizes[: len(sizes) - len(self.sums)]
        first = min(self.sums)
        axes = [axis for axis in range(len(order)) if axis not in self.sums or axis == first]
        source = [*order[: len(kept)], first]
        inverse = [source.index(axis) for axis in axes]
        merges = self.merges if len(self.sums) == 1 else (1,) * len(axes)
        return self._merged(m.reshape([*kept, m.shape[3]]).permute(inverse), merges)

    @staticmethod
    def _merged(t: Tensor, merges: tuple[int, ...]) -> Tensor:
        shape, axis = [], 0
        for count in merges:
            shape.append(prod(t.shape[axis : axis + count]))
            axis += count
        return t.reshape(shape)

    def spread(self, scale: Tensor) -> Tensor:
        """Scales [groups, rows, 1, 1], broadcastable against the operand."""
        varying = (*self.groups, *self.rows)
        sizes = [self.split[axis] for axis in varying]
        order = [*varying, *(axis for axis in range(len(self.split)) if axis not in varying)]
        t = scale.reshape([*sizes, *(1 for _ in order[len(varying) :])]).permute(
            [order.index(a) for a in range(len(order))]
        )
        axis = 0
        for count in self.merges:  # a split channel axis has all of its scales, or none
            if count > 1 and any(n > 1 for n in t.shape[axis : axis + count]):
                t = t.expand([self.split[a] if axis <= a < axis + count else -1 for a in range(t.dim())])
            axis += count
        return self._merged(t, self.merges)
