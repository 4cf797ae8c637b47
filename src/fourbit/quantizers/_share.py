"""`Share`: the part of an operand that one of several processes has, where the numbers are to be those of the whole.

A largest magnitude is then the largest of all processes, and the random word of an element is the one that it has in the
whole, whose parts lie one behind the other along an axis, of equal sizes, in the order of the processes. Every process has to
come by the same operands in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor

from fourbit.errors import UserError
from fourbit.quantizers._tiles import Tile


class Share:
    """One process's part.

    Args:
        group: the processes that have the parts; None: all.

    Attributes:
        number, count: which part, of how many.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.number, self.count = distributed.get_rank(group), distributed.get_world_size(group)

    def largest(self, amax: Tensor, size: int = 0) -> Tensor:
        """The largest of all processes, element by element; NaN where one is not finite.

        Args:
            size: elements of the part.

        Raises:
            UserError: in all processes, where the parts are of different sizes.
        """
        sizes = torch.tensor([size, -size], dtype=torch.float64, device=amax.device)
        found = torch.cat((torch.where(amax.isfinite(), amax, torch.inf).flatten().double(), sizes))
        distributed.all_reduce(found, distributed.ReduceOp.MAX, self._group)
        if found[-2] != -found[-1]:
            raise UserError(
                f"{self.count} processes have parts of {-int(found[-1])} to {int(found[-2])} numbers of one operand: give each "
                "an equal part of the batch, of a size that the number of processes divides"
            )
        found = found[:-2].view(amax.shape).to(amax.dtype)
        return torch.where(found.isfinite(), found, torch.nan)

    def total(self, t: Tensor) -> Tensor:
        """The sum over all processes."""
        found = t.clone()
        distributed.all_reduce(found, distributed.ReduceOp.SUM, self._group)
        return found

    def __deepcopy__(self, memo: Any) -> Share:
        return self

    def __reduce__(self) -> Any:
        """A model in a file has everything to itself."""
        return type(None), ()


class Slice(NamedTuple):
    """Where an operand lies in the whole: this process's part along an axis."""

    share: Share
    axis: int

    def spans(self, tile: Tile) -> bool:
        """Whether elements of several processes share a scale of [groups, rows, spots, sums] in such tiles."""
        return self.axis in (1, 3) and (tile.rows if self.axis == 1 else tile.sums) is None

    def require_whole(self, shape: Sequence[int], tile: Tile | None, block: int) -> None:
        """Raise a UserError where the ends of the parts cut tiles, or blocks of a rotation, that the whole would have there.

        Args:
            shape: of the part, [groups, rows, spots, sums].
            tile: who shares a scale.
            block: numbers along the last axis that a rotation mixes; 1: none.
        """
        if self.share.count == 1 or self.axis not in (1, 3):
            return
        size = None if tile is None else (tile.rows if self.axis == 1 else tile.sums)
        for unit in (size or 1, block if self.axis == 3 else 1):
            if shape[self.axis] % unit:
                raise UserError(
                    f"each process has {shape[self.axis]} of the terms or rows of a product, which blocks of {unit} do not "
                    f"divide, so that they would not be those of the whole batch: give each a multiple of {unit}, or do "
                    "without share_batch."
                )

    def positions(self, t: Tensor) -> Tensor:
        """The position of each element in the memory of the whole, int64, for an operand that lies in memory as `t` does."""
        shape, stride = list(t.shape), 1
        first, strides = 0, [0] * t.dim()
        for d in sorted(range(t.dim()), key=lambda d: (t.stride(d), t.shape[d])):
            strides[d] = stride
            if d == self.axis % t.dim():
                first = self.share.number * shape[d] * stride
                stride *= self.share.count
            stride *= shape[d]
        found = torch.full((), first, dtype=torch.int64, device=t.device)
        for d in range(t.dim()):
            index = torch.arange(shape[d], dtype=torch.int64, device=t.device).mul_(strides[d])
            found = found + index.view([-1 if d == i else 1 for i in range(t.dim())])
        return found


class Sharing(NamedTuple):
    """Of which operands of a layer a process has parts.

    Args:
        share: which part.
        axes: for each such slot, the axis along which the parts lie: in the tensor, and as [groups, rows, spots, sums].
        in_evaluation: whether processes work together in evaluation mode, too.
    """

    share: Share
    axes: Mapping[str, tuple[int, int]]
    in_evaluation: bool = False
