"""Contractions written out as matrix products, term by term: what an accumulator adds, and in which order.

The order of the summed axis is part of the numbers once sums are rounded. It is that of the GEMM that hardware runs:

    linear        fprop: input features.  dgrad: output features.  wgrad: rows, the leading axes in order of their indices
    matmul        fprop: the summed axis.  Gradients: batch axes along which an operand was broadcast, then the other
                  operand's free axis
    convolution   fprop: im2col, kernel positions in order, for each of them the input channels.  dgrad: im2col of the output
                  gradient, with zeros between its pixels where there is a stride and around it; the gradient's pixels in
                  order, for each of them the output channels.  wgrad: samples, for each of them the output pixels in order

Terms with a zero of the padding or the stride are terms like others: they fill a chunk, but change no sum. A transposed
convolution's fprop is the dgrad of an ordinary one, its dgrad the fprop, and its wgrad sums over the input pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Matrices(NamedTuple):
    """y[g] = a[g] @ b[g], terms added in order of the summed axis; `arrange` gives [G, M, N] the shape of the result."""

    a: Tensor
    b: Tensor
    arrange: Callable[[Tensor], Tensor]


def rows(t: Tensor) -> Tensor:
    """[..., K] -> [num_rows, K]."""
    return t.reshape(prod(t.shape[:-1]), t.shape[-1])


def linear(a: Tensor, b: Tensor, shape: Sequence[int]) -> Matrices:
    """One product of two matrices, whose result gets `shape`."""
    return Matrices(a.unsqueeze(0), b.unsqueeze(0), lambda y: y.reshape(tuple(shape)))


def batched(a: Tensor, b: Tensor, own: Sequence[int], shape: Sequence[int]) -> Matrices:
    """Batches of products [..., M, K] [..., K, N], summed over the batch axes that the result lacks.

    Args:
        own: batch axes of the result; one that is missing or 1 is summed over.
        shape: that the result gets.
    """
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    own = (1,) * (len(batch) - len(own)) + tuple(own)
    kept = [d for d in range(len(batch)) if own[d] == batch[d]]
    summed = [d for d in range(len(batch)) if own[d] != batch[d]]
    num_kept, num_summed = prod(batch[d] for d in kept), prod(batch[d] for d in summed)
    M, K, N, last = a.shape[-2], a.shape[-1], b.shape[-1], len(batch)
    a = a.expand(*batch, M, K).permute(*kept, last, *summed, last + 1).reshape(num_kept, M, num_summed * K)
    b = b.expand(*batch, K, N).permute(*kept, *summed, last, last + 1).reshape(num_kept, num_summed * K, N)
    return Matrices(a, b, lambda y: y.reshape(tuple(shape)))


class Geometry(NamedTuple):
    """Stride, padding, dilation per dimension, and groups, of a convolution that is not transposed."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def to_output(self, x: Tensor, w: Tensor) -> Matrices:
        """x [N, C, *I], w [O, C / groups, *R] -> [N, O, *P]."""
        d, G = len(self.stride), self.groups
        x = x.contiguous()  # pixels side by side, as in the patches
        patches_GRCNP = self._patches(self._padded(x), w.shape[2:], self.stride)
        N, pixels, C, R = x.shape[0], patches_GRCNP.shape[3 + d :], w.shape[1], prod(w.shape[2:])
        a = patches_GRCNP.reshape(G, R * C, N * prod(pixels)).mT
        b = w.reshape(G, w.shape[0] // G, C, R).permute(0, 3, 2, 1).reshape(G, R * C, w.shape[0] // G)
        return Matrices(a, b, lambda y: _images(y, N, pixels))

    def to_input(self, g: Tensor, w: Tensor, shape: Sequence[int]) -> Matrices:
        """g [N, O, *P], w [O, C / groups, *R] -> [N, C, *I] = shape."""
        d, G, pixels = len(self.stride), self.groups, tuple(shape[2:])
        N, num_out, C, R = g.shape[0], w.shape[0] // G, w.shape[1], prod(w.shape[2:])
        patches_GRONI = self._patches(self._spread(g, pixels, w.shape[2:]), w.shape[2:], (1,) * d)
        a = patches_GRONI.reshape(G, R * num_out, N * prod(pixels)).mT
        flipped = w.flip(tuple(range(2, 2 + d))).reshape(G, num_out, C, R)
        b = flipped.permute(0, 3, 1, 2).reshape(G, R * num_out, C)
        return Matrices(a, b, lambda y: _images(y, N, pixels))

    def to_weight(self, g: Tensor, x: Tensor, shape: Sequence[int]) -> Matrices:
        """g [N, O, *P], x [N, C, *I] -> [O, C / groups, *R] = shape."""
        d, N, G = len(self.stride), g.shape[0], self.groups
        num_out, num_pixels = shape[0] // G, prod(g.shape[2:])
        patches_GRCNP = self._patches(self._padded(x), tuple(shape[2:]), self.stride)
        a = g.reshape(N, G, num_out, num_pixels).permute(1, 2, 0, 3).reshape(G, num_out, N * num_pixels)
        kernels_last = (0, *range(2 + d, 3 + 2 * d), *range(1, 2 + d))  # channels innermost, as in channels_last x
        b = patches_GRCNP.permute(kernels_last).reshape(G, N * num_pixels, prod(shape[1:]))
        by_kernel = (G, num_out, *shape[2:], shape[1])
        return Matrices(a, b, lambda y: y.reshape(by_kernel).movedim(-1, 2).reshape(tuple(shape)))

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, [p for padding in reversed(self.padding) for p in (padding, padding)])

    def _spread(self, g: Tensor, size: tuple[int, ...], kernel: Sequence[int]) -> Tensor:
        """Pixel p of g at p * stride - padding + reach, reach = dilation * (kernel - 1); zeros between and around."""
        for axis, step in enumerate(self.stride):
            reach, dim = self.dilation[axis] * (kernel[axis] - 1), axis + 2
            length, offset = size[axis] + reach, reach - self.padding[axis]
            first = max(0, -(offset // step))  # the first pixel that falls into the image
            num = max(0, min(g.shape[dim], (length - 1 - offset) // step + 1) - first)
            index = offset + step * torch.arange(first, first + num, device=g.device)
            spread = g.new_zeros([length if i == dim else n for i, n in enumerate(g.shape)])
            g = spread.index_copy_(dim, index, g.narrow(dim, first if num else 0, num))
        return g

    def _patches(self, x: Tensor, kernel: Sequence[int], stride: tuple[int, ...]) -> Tensor:
        """[N, C, *I] -> [G, *R, C / groups, N, *P], a view."""
        d, G, C = len(kernel), self.groups, x.shape[1]
        for axis, (R, step, dilation) in enumerate(zip(kernel, stride, self.dilation, strict=True)):
            x = x.unfold(2 + axis, dilation * (R - 1) + 1, step)[..., ::dilation]
        x = x.unflatten(1, (G, C // G))  # [N, G, C, *P, *R]
        return x.permute(1, *range(3 + d, 3 + 2 * d), 2, 0, *range(3, 3 + d))


def _images(y: Tensor, N: int, pixels: Sequence[int]) -> Tensor:
    """[G, N * pixels, C] -> [N, G * C, *pixels]."""
    G, _, C = y.shape
    axes = range(2, 2 + len(pixels))
    return y.reshape(G, N, *pixels, C).permute(1, 0, 2 + len(pixels), *axes).reshape(N, G * C, *pixels)
