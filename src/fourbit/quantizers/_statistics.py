"""What scales are made of: the largest magnitude and the first two moments of a tensor, computed when asked for."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from fourbit.backends import Operation
from fourbit.quantizers._share import Share


def is_dense(x: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of axes."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def memory_flat(x: Tensor) -> Tensor:
    """The elements of a dense tensor in the order in which they lie in memory, as a view."""
    return x.view(-1) if x.is_contiguous() else x.as_strided((x.numel(),), (1,), x.storage_offset())


def amax_of(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """max|x| in float32 over `dims` (kept, size 1) or as a 0-d tensor; NaN if any element is NaN; 0 if empty."""
    if x.numel() == 0:
        shape = () if dims is None else [1 if d in dims else n for d, n in enumerate(x.shape)]
        return x.new_zeros(shape, dtype=torch.float32)
    if dims == ():
        return x.detach().abs().to(torch.float32)
    if dims is None:
        x = x.detach()
        if is_dense(x):  # order does not matter; aminmax would copy a channels_last tensor
            x = memory_flat(x)
        low, high = torch.aminmax(x)
        return torch.maximum(high, -low).to(torch.float32)
    return x.detach().abs().amax(dims, keepdim=True).to(torch.float32)


class Moments(NamedTuple):
    """Means of x^2 and |x| (float64) and max|x| (float32); NaN or infinite where the data are. Floats where the host knows."""

    mean_square: Tensor | float
    mean_abs: Tensor | float
    amax: Tensor | float


MOMENTS: Operation[[Tensor], Moments] = Operation("moments", reference="quantizers._statistics.Statistics")
"""Means of x^2 and |x|, and max|x|."""


class Statistics:
    """Statistics of `x` over the axes `dims` that share a scale (None: all), each computed once, when first used.

    Args:
        count: how many elements share one, where zeros fill up what is missing of the axes.
        share: of which `x` is in this process, if the largest magnitudes are those of the whole batch.
        spans: whether elements of all processes share each of `amax`.
    """

    def __init__(
        self,
        x: Tensor,
        dims: tuple[int, ...] | None = None,
        count: Tensor | int | None = None,
        share: Share | None = None,
        spans: bool = True,
    ):
        self.x, self.dims, self.count = x.detach() if x.requires_grad else x, dims, count
        self._share, self._spans = share, spans

    @cached_property
    def moments(self) -> Moments:
        """All three at once. Means are taken in float64, so that they do not depend on the order of summation."""
        found = self._moments()
        return found if self._share is None or not self._spans else _of_all(found, self._share, self.x.numel())

    def _moments(self) -> Moments:
        if self.dims is None:
            found = MOMENTS(self.x)
            if found is not None:
                return found
        if self.x.numel() == 0:
            zero = self.x.new_zeros((), dtype=torch.float64)
            return Moments(zero, zero, zero.to(torch.float32))
        x = self.x.to(torch.float32).to(torch.float64)
        keep = self.dims is not None
        axes = tuple(range(x.dim())) if self.dims is None else self.dims
        amax = amax_of(self.x, self.dims)
        if self.count is not None:
            return Moments(
                x.square().sum(axes, keepdim=keep) / self.count, x.abs().sum(axes, keepdim=keep) / self.count, amax
            )
        return Moments(x.square().mean(axes, keepdim=keep), x.abs().mean(axes, keepdim=keep), amax)

    @cached_property
    def amax(self) -> Tensor:
        """max|x|."""
        if "moments" in self.__dict__:
            return torch.as_tensor(self.moments.amax)
        amax = amax_of(self.x, self.dims)
        return self._share.largest(amax, self.x.numel()) if self._share is not None and self._spans else amax

    @cached_property
    def largest(self) -> Tensor:
        """The largest of `amax`, 0-d."""
        largest = self.amax.max() if self.amax.numel() else self.amax.new_zeros(())
        return largest if self._share is None or self._spans else self._share.largest(largest, self.x.numel())


def _of_all(mine: Moments, share: Share, size: int) -> Moments:
    """The moments of the whole batch."""
    means = torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in mine[:2]])
    mean_square, mean_abs = share.total(means) / share.count
    amax = share.largest(torch.as_tensor(mine.amax, dtype=torch.float32), size)
    if isinstance(mine.amax, float):
        return Moments(float(mean_square), float(mean_abs), float(amax))
    return Moments(mean_square, mean_abs, amax)
