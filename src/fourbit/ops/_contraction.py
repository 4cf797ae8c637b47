"""Contractions: the bilinear maps y = x * w that matrix-like layers compute, and their two derivatives.

A subclass gives `fprop`; `dgrad` and `wgrad` follow from bilinearity (the vector-Jacobian product of a linear map does not
depend on where it is taken). Overrides are a matter of speed and are tested against that default.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fourbit.errors import UserError
from fourbit.ops import _matrices as matrices
from fourbit.ops._matrices import Matrices
from fourbit.ops._orientation import Orientation
from fourbit.quantizers import is_dense

Which = Literal["fprop", "dgrad", "wgrad"]
"""The three products of a layer: fprop(x, w), dgrad(g, w), wgrad(g, x)."""


class ProductSize(NamedTuple):
    """`count` products of a matrix [m, k] by a matrix [k, n], of `x` and `w` different numbers: fewer than the matrices have
    where a convolution reads its input, or all products the same weights, several times."""

    count: int
    m: int
    n: int
    k: int
    x: int
    w: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.count * self.m * self.n * self.k

    def repeated(self, count: int) -> ProductSize:
        """So many of them, of other `x` and the same `w`."""
        return self._replace(count=self.count * count, x=self.x * count)


@dataclass(frozen=True)
class Contraction(ABC):
    """A bilinear map. All tensors of one call share a floating dtype."""

    def prepare(self, t: Tensor, operand: str) -> Tensor:
        """Operand "x", "w" or "g" as a dense tensor, in the order of axes that the products are fastest with."""
        return t if is_dense(t) else t.contiguous()

    def encode(self) -> tuple[int, ...]:
        """The map as integers: its kind, then its fields."""
        raise TypeError(f"{type(self).__name__} has no encoding: it cannot be compiled")

    @staticmethod
    def decode(code: Sequence[int]) -> Contraction:
        """The map that `encode` gave."""
        kind, *fields = code
        return _KINDS[kind](fields)

    @abstractmethod
    def fprop(self, x: Tensor, w: Tensor) -> Tensor:
        """y = x * w."""

    def dgrad(self, g: Tensor, w: Tensor, x: Tensor) -> Tensor:
        """dx for output gradient `g`. `x` gives shape and layout only."""
        return torch.func.vjp(lambda t: self.fprop(t, w), x)[1](g)[0]

    def wgrad(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """dw for output gradient `g`. `w` gives shape and layout only."""
        return torch.func.vjp(lambda t: self.fprop(x, t), w)[1](g)[0]

    def matrices(self, which: Which, a: Tensor, b: Tensor, shape: Sequence[int]) -> Matrices:
        """One of the three products as products of matrices, in the order in which hardware adds the terms.

        Args:
            a, b: x and w, g and w, or g and x, all of one floating dtype.
            shape: of the result.
        """
        raise UserError(
            f"the order of additions is not defined for {type(self).__name__}: leave accumulation=None for such layers"
        )

    def orientation(self, which: Which, operand: str, shape: Sequence[int]) -> Orientation:
        """How an operand "x", "w" or "g" of that shape lies in one of the products that it enters."""
        raise UserError(
            f"{type(self).__name__} does not say which axes its products sum over: use granularity='tensor' and no transform"
        )

    @property
    def keeps_rows(self) -> bool:
        """Whether the rows of a product's first operand are rows of its result, for all groups."""
        return True

    @abstractmethod
    def size(self, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> ProductSize:
        """Of fprop as products of matrices, from the shapes of operands and result; dgrad and wgrad have as many
        multiply-accumulates. Whoever counts them, counts them here."""


@dataclass(frozen=True)
class LinearMap(Contraction):
    """y[..., n] = sum_k x[..., k] w[n, k]."""

    def encode(self) -> tuple[int, ...]:
        """Kind 0."""
        return (0,)

    def fprop(self, x: Tensor, w: Tensor) -> Tensor:
        """x w^T."""
        return F.linear(x, w)

    def dgrad(self, g: Tensor, w: Tensor, x: Tensor) -> Tensor:
        """g w."""
        return g.matmul(w)

    def wgrad(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """g^T x, summed over all leading axes."""
        rows = g.shape[:-1].numel()
        return g.reshape(rows, g.shape[-1]).t().matmul(x.reshape(rows, x.shape[-1]))

    def matrices(self, which: Which, a: Tensor, b: Tensor, shape: Sequence[int]) -> Matrices:
        """Rows times features."""
        if which == "wgrad":
            return matrices.linear(matrices.rows(a).t(), matrices.rows(b), shape)
        return matrices.linear(matrices.rows(a), b if which == "dgrad" else b.t(), shape)

    def orientation(self, which: Which, operand: str, shape: Sequence[int]) -> Orientation:
        """Leading axes of x and g are rows, which wgrad sums over."""
        axes = tuple(range(len(shape)))
        leading, last = axes[:-1], axes[-1:]
        if (operand == "w" and which == "dgrad") or which == "wgrad":
            leading, last = last, leading
        is_open = which == "wgrad"
        return Orientation(tuple(shape), (1,) * len(shape), (), leading, (), last, is_open)

    def size(self, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> ProductSize:
        """Rows times in_features times out_features."""
        return ProductSize(1, prod(y[:-1]), y[-1], x[-1], prod(x), prod(w))


@dataclass(frozen=True)
class Matmul(Contraction):
    """y = x @ w with torch.matmul's batching and broadcasting: two activations, as in attention scores."""

    def encode(self) -> tuple[int, ...]:
        """Kind 1."""
        return (1,)

    def fprop(self, x: Tensor, w: Tensor) -> Tensor:
        """torch.matmul."""
        return torch.matmul(x, w)

    def matrices(self, which: Which, a: Tensor, b: Tensor, shape: Sequence[int]) -> Matrices:
        """Batches of matrices; a gradient sums over the batches that its operand was broadcast along."""
        x_dim = a.dim() if which == "fprop" else b.dim() if which == "wgrad" else len(shape)
        w_dim = len(shape) if which == "wgrad" else b.dim()

        def lift(t: Tensor, row: bool, column: bool) -> Tensor:  # vectors as torch.matmul sees them
            t = t.unsqueeze(-1) if column else t
            return t.unsqueeze(-2) if row else t

        if which == "fprop":
            a, b = lift(a, x_dim == 1, False), lift(b, False, w_dim == 1)
            return matrices.batched(a, b, torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), shape)
        g = lift(a, x_dim == 1, w_dim == 1)
        if which == "dgrad":
            return matrices.batched(g, lift(b, False, w_dim == 1).mT, shape[:-2], shape)
        return matrices.batched(lift(b, x_dim == 1, False).mT, g, shape[:-2], shape)

    @property
    def keeps_rows(self) -> bool:
        """A gradient may be summed over batches."""
        return False

    def orientation(self, which: Which, operand: str, shape: Sequence[int]) -> Orientation:
        """The last axis of x, the last but one of w and the last of g are summed over, in the products that have them first."""
        axes = tuple(range(len(shape)))
        batch, row, last = axes[:-2], axes[-2:-1], axes[-1:]
        if len(axes) == 1 and operand == "w":
            row, last = last, row
        if which == "wgrad" or (operand == "w" and which == "fprop"):
            row, last = last, row
        return Orientation(tuple(shape), (1,) * len(shape), batch, row, (), last, is_open=True)

    def size(self, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> ProductSize:
        """One product per matrix of the batch; vectors are matrices of one row or column."""
        rows = x[-2] if len(x) > 1 else 1
        columns = w[-1] if len(w) > 1 else 1
        return ProductSize(prod(y) // max(1, rows * columns), rows, columns, x[-1], prod(x), prod(w))


_CONV: dict[tuple[int, bool], Callable[..., Tensor]] = {
    (1, False): F.conv1d,
    (2, False): F.conv2d,
    (3, False): F.conv3d,
    (1, True): F.conv_transpose1d,
    (2, True): F.conv_transpose2d,
    (3, True): F.conv_transpose3d,
}


@dataclass(frozen=True)
class Convolution(Contraction):
    """Convolution in 1 to 3 dimensions, [N, C, ...] batched, zero padding; or its transpose.

    Args:
        stride, padding, dilation, output_padding: one integer per dimension.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = (0,)

    def encode(self) -> tuple[int, ...]:
        """Kind 2, groups, transposed, number of dimensions, then stride, padding, dilation and output padding."""
        fields = (*self.stride, *self.padding, *self.dilation, *self.output_padding)
        return (2, self.groups, int(self.transposed), len(self.stride), *fields)

    def prepare(self, t: Tensor, operand: str) -> Tensor:
        """Two-dimensional operands in channels_last, which the convolutions of CPUs and of tensor cores are fastest with."""
        return (
            t.contiguous(memory_format=torch.channels_last)
            if self.takes_channels_last(t)
            else super().prepare(t, operand)
        )

    @staticmethod
    def takes_channels_last(t: Tensor) -> bool:
        """Whether `prepare` gives channels_last."""
        return t.dim() == 4 and t.device.type in ("cpu", "cuda")

    def fprop(self, x: Tensor, w: Tensor) -> Tensor:
        """torch's convolution without bias."""
        conv = _CONV[len(self.stride), self.transposed]
        if self.transposed:
            return conv(x, w, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        return conv(x, w, None, self.stride, self.padding, self.dilation, self.groups)

    def dgrad(self, g: Tensor, w: Tensor, x: Tensor) -> Tensor:
        """The data half of torch's convolution_backward."""
        return self._backward(g, x, w, (True, False, False))[0]

    def wgrad(self, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
        """The weight half of torch's convolution_backward."""
        if self._skips_pixels(w):
            # oneDNN's kernel for these, in channels_last, writes beyond its memory on processors without AVX-512. The pixels
            # that such a kernel meets, by themselves, give the same sums.
            x = x if not any(self.padding) else F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
            x = x[(..., *(slice(None, None, s) for s in self.stride))]
            con = replace(self, stride=(1,) * len(self.stride), padding=(0,) * len(self.stride))
            return con.wgrad(g, con.prepare(x, "x"), w)
        return self._backward(g, x, w, (False, True, False))[1]

    def _skips_pixels(self, w: Tensor) -> bool:
        """Whether the kernel is of one pixel, and the stride larger."""
        return not self.transposed and w.device.type == "cpu" and w.shape[2:].numel() == 1 and max(self.stride) > 1

    def _backward(
        self, g: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        padding = self.output_padding if self.transposed else (0,) * len(self.stride)
        return torch.ops.aten.convolution_backward(
            g, x, w, None, self.stride, self.padding, self.dilation, self.transposed, padding, self.groups, mask
        )

    def matrices(self, which: Which, a: Tensor, b: Tensor, shape: Sequence[int]) -> Matrices:
        """Patches times kernels."""
        geometry = matrices.Geometry(self.stride, self.padding, self.dilation, self.groups)
        if which == "wgrad":
            return geometry.to_weight(b, a, shape) if self.transposed else geometry.to_weight(a, b, shape)
        outward = (which == "fprop") != self.transposed
        return geometry.to_output(a, b) if outward else geometry.to_input(a, b, shape)

    def orientation(self, which: Which, operand: str, shape: Sequence[int]) -> Orientation:
        """Samples are rows and channels are summed over, the other way round in wgrad; pixels are spots."""
        G, spots = self.groups, tuple(range(3, 1 + len(shape)))
        if operand == "w":
            split, merges = (G, shape[0] // G, *shape[1:]), (2, *(1 for _ in shape[1:]))
            rows, sums = ((1,), (2,)) if (which == "fprop") != self.transposed else ((2,), (1,))
            return Orientation(split, merges, (0,), rows, spots, sums)
        split, merges = (shape[0], G, shape[1] // G, *shape[2:]), (1, 2, *(1 for _ in shape[2:]))
        if which == "wgrad":
            return Orientation(split, merges, (1,), (2,), spots, (0,), is_open=True)
        return Orientation(split, merges, (1,), (0,), spots, (2,))

    def size(self, x: Sequence[int], w: Sequence[int], y: Sequence[int]) -> ProductSize:
        """One product per group: pixels of the output (of the input where transposed) times channels times the weights that
        meet in one of them."""
        t = x if self.transposed else y
        return ProductSize(self.groups, prod(t) // t[1], t[1] // self.groups, prod(w[1:]), prod(x), prod(w))


def _decode_convolution(fields: Sequence[int]) -> Convolution:
    groups, transposed, n, *rest = fields
    stride, padding, dilation = (tuple(rest[i * n : (i + 1) * n]) for i in range(3))
    return Convolution(stride, padding, dilation, groups, bool(transposed), tuple(rest[3 * n :]))


_KINDS: tuple[Callable[[Sequence[int]], Contraction], ...] = (
    lambda fields: LinearMap(),
    lambda fields: Matmul(),
    _decode_convolution,
)
