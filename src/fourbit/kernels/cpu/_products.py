"""Matrix products on the CPU.

    operands                               Linear                         2-d convolutions
    int8 x int8 (forward)                  _int_mm, or ours, exact        ours, or oneDNN's int8 convolution, exact
    gradient in one int8 x int8            _int_mm, or ours, exact        as below; backward, 1x1 convolutions are as Linear
    gradient in bfloat16                   ours                           ours, or oneDNN's, rounded to bfloat16
    where ours does not run:
    gradient in two int8 x int8            two _int_mm, exact             oneDNN's, rounded to bfloat16
    other gradients that bfloat16 holds    bfloat16, rounded to it        oneDNN's, rounded to bfloat16

Ours are of two kinds. With AVX512-BF16, gradients are bfloat16, and sums float32. With AVX2 or AVX-VNNI all are integers,
and rounded once, to float32: forward, and gradients of every format whose numbers are multiples of its smallest magnitude, up
to 32767 of it, as those of radix-4 and radix-2 FP4 are; Linear, and convolutions of any kernel, stride and channels.

A gradient goes in two int8 where every number of its format is 256 high + low in units of the smallest magnitude: radix-4
FP4 does. What is rounded to bfloat16 is so only where products are "fast"; "exact" leaves it to the reference, which
multiplies in float32. Everything else (grouped, dilated, transposed, 1-d and 3-d convolutions, wide formats) is the
reference's anyway.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fourbit import backends
from fourbit.kernels._check import bits_of, codes_of, pointer, require, require_disjoint
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._convolutions import convolve, convolve_backward, integer_gradient, pointwise
from fourbit.kernels.cpu._matrices import int8, matrices, operands_of, own_integers, own_multiply, rows_of
from fourbit.kernels.cpu._quantize import float_grid, kernels
from fourbit.ops import Convolution, Finish, Gemm, Layout, LinearMap, Raw
from fourbit.quantizers import Packed, carrier_dtype, is_dense


@backends.register("gemm", "cpu")
def gemm(g: Gemm) -> Raw | None:
    """The product without scale and rounding, or None."""
    if not g.a.device.type == g.b.device.type == "cpu" or g.a.format is None or g.b.format is None:
        return None
    if carrier_dtype(g.b.format).itemsize != 1 or (isinstance(g.b.q, torch.Tensor) and g.b.q.is_floating_point()):
        return None
    con = g.contraction
    if isinstance(con, LinearMap):
        return matrices(g)
    if not isinstance(con, Convolution) or con.transposed or con.groups != 1 or len(con.stride) != 2:
        return None
    if g.which == "fprop":
        return convolve(g, con)
    found = integer_gradient(g, con)
    if found is not None:
        return found
    is_pointwise = con.stride == (1, 1) and con.padding == (0, 0) and g.layout is not None
    if is_pointwise and (g.which == "wgrad" or g.layout.shape[2:] == g.a.q.shape[2:]):  # type: ignore[union-attr]
        kernel = (g.layout if g.which == "wgrad" else g.b.q).shape[2:]  # type: ignore[union-attr]
        if tuple(kernel) == (1, 1):
            found = pointwise(g)
            if found is not None:
                return found
    return convolve_backward(g, con)


@backends.register("product", "cpu")
def product(g: Gemm, finish: Finish) -> tuple[Tensor, Tensor | None] | None:
    """The products of Linear, finished before they are written for the first time."""
    a, b, layout = g.a, g.b, finish.layout
    if not a.device.type == b.device.type == "cpu":
        return None
    if isinstance(g.contraction, LinearMap) and g.which == "fprop":
        y = own_integers(g, finish)
        return None if y is None else (y, None)
    if not isinstance(g.contraction, LinearMap) or g.which == "fprop" or layout is None:
        return None
    if not isinstance(a.q, Tensor) or a.q.numel() == 0:
        return None
    of = operands_of(a.format, b.format, a.q.dtype)
    if of is None:
        return None
    if a.format is None or b.format is None or b.format.max > 127 or carrier_dtype(b.format).itemsize != 1:
        return None
    if isinstance(b.q, Tensor) and b.q.is_floating_point():  # multiplied by scales per channel, or averaged
        return None
    if finish.dtype != torch.float32 or finish.keep_infinite or not layout.is_contiguous():
        return None
    if any(t is not None and t.numel() != 1 for t in (finish.scale, finish.late)):
        return None
    if finish.output is not None and float_grid(finish.output) is None:
        return None
    integers = isinstance(finish.codes, Packed) and finish.codes.grid is None
    if finish.mask is not None and (layout.shape[-1] % 16 or (finish.codes is not None and not integers)):
        return None
    right, left = int8(b) if g.which == "dgrad" else rows_of(int8(b)), rows_of(a.q)
    if right.numel() == 0 or right.dim() != 2 or left.shape[0 if g.which == "wgrad" else 1] != right.shape[0]:
        return None
    if layout.shape.numel() != left.shape[1 if g.which == "wgrad" else 0] * right.shape[1]:
        return None
    y, clipped = own_multiply(left, right, g.which == "wgrad", of, finish, b.cache)
    return y.view(layout.shape), clipped


_SUMS = (torch.float32, torch.bfloat16, torch.int32)
"""What products leave."""


@backends.register("epilogue", "cpu")
def epilogue(raw: Raw, finish: Finish) -> tuple[Tensor, Tensor | None] | None:
    """Scale, round, mask, and sum what was clipped: one pass."""
    y, out_dtype = raw.y, finish.dtype
    if not y.is_cpu or y.dtype not in _SUMS or out_dtype not in (torch.float32, torch.bfloat16) or y.is_neg():
        return None
    if any(t is not None and t.numel() != 1 for t in (finish.scale, finish.late)):
        return None
    integers = isinstance(finish.codes, Packed) and finish.codes.grid is None
    if finish.mask is not None and finish.codes is not None and not integers:
        return None
    grid = None
    if finish.output is not None and not raw.rounded:
        grid = float_grid(finish.output)
        if grid is None:
            return None
    if raw.high is not None:
        require(raw.high.shape == y.shape and y.dtype == torch.int32, "two int32 halves of one shape")
    if finish.layout is not None:
        require(finish.layout.shape == y.shape, f"a product of shape {tuple(finish.layout.shape)}")
        y = finish.layout.match(y)
    elif not is_dense(y):
        y = y.contiguous()
    high = None if raw.high is None else Layout.of(y).match(raw.high)
    in_place = y.dtype == out_dtype
    out = y.view(out_dtype) if y.element_size() == out_dtype.itemsize else torch.empty_like(y, dtype=out_dtype)
    scale = raw.unit * (1.0 if finish.scale is None else float(finish.scale))
    if in_place and grid is None and finish.mask is None and high is None and scale == 1.0 and finish.late is None:
        return y, None
    codes = finish.codes if isinstance(finish.codes, Packed) and finish.mask is not None else None
    n = y.numel()
    if high is not None:
        require_disjoint(out, "y", [(high, "high")])
    arguments = c.Epilogue(
        x=pointer(y, "y", y.dtype, n),
        dtype=c.CODES[y.dtype],
        n=n,
        high=None if high is None else pointer(high, "high", torch.int32, n, like=y),
        scale=scale,
        rounds=grid is not None,
        keep_infinite=finish.keep_infinite,
        grid=grid or c.FloatGrid(),
        post=1.0 if finish.late is None else float(finish.late),
        mask=bits_of(finish.mask, "mask", n),
        packed=None if codes is None else codes_of(codes.data, n),
        is_signed=codes is not None and codes.signed,
        out=pointer(out, "out", out_dtype, n, like=y),
        out_dtype=c.CODES[out_dtype],
    )
    clipped = kernels().epilogue(ctypes.byref(arguments))
    return out, torch.tensor(clipped, dtype=torch.float32) if codes is not None else None
