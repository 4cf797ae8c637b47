"""`Share`: the part of a batch that one of several processes has, where the numbers are to be those of the whole batch.

A largest magnitude is then the largest of all processes, and the random word of an element is the one that it has in the
whole batch, whose parts lie one behind the other, of equal sizes, in the order of the processes. Every process has to come by
the same operands in the same order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as distributed
from torch import Tensor


class Share:
    """One process's part.

    Args:
        group: the processes that have the batch; None: all.

    Attributes:
        number, count: which part, of how many.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.number, self.count = distributed.get_rank(group), distributed.get_world_size(group)

    def largest(self, amax: Tensor) -> Tensor:
        """The largest of all processes, element by element; NaN where one is not finite."""
        found = torch.where(amax.isfinite(), amax, torch.inf).contiguous()
        distributed.all_reduce(found, distributed.ReduceOp.MAX, self._group)
        return torch.where(found.isfinite(), found, torch.nan)

    def total(self, t: Tensor) -> Tensor:
        """The sum over all processes."""
        found = t.clone()
        distributed.all_reduce(found, distributed.ReduceOp.SUM, self._group)
        return found

    def __deepcopy__(self, memo: Any) -> Share:
        return self

    def __reduce__(self) -> Any:
        """A model in a file has the batch to itself."""
        return type(None), ()


class Slice(NamedTuple):
    """Where an operand lies in that of the whole batch: this process's part along an axis."""

    share: Share
    axis: int

    def positions(self, t: Tensor) -> Tensor:
        """The position of each element in the memory of the whole, int64, for an operand that lies in memory as `t` does."""
        shape, stride = list(t.shape), 1
        first, strides = 0, [0] * t.dim()
        for d in sorted(range(t.dim()), key=lambda d: (t.stride(d), t.shape[d])):
            strides[d] = stride
            if d == self.axis:
                first = self.share.number * shape[d] * stride
                stride *= self.share.count
            stride *= shape[d]
        found = torch.full((), first, dtype=torch.int64, device=t.device)
        for d in range(t.dim()):
            index = torch.arange(shape[d], dtype=torch.int64, device=t.device).mul_(strides[d])
            found = found + index.view([-1 if d == i else 1 for i in range(t.dim())])
        return found
