"""Matrix products on the CPU.

    operands                               Linear                         2-d convolutions
    int8 x int8 (forward)                  _int_mm, or ours, exact        ours, or oneDNN's int8 convolution, exact
    gradient in one int8 x int8            _int_mm, or ours, exact        as below; backward, 1x1 convolutions are as Linear
    gradient in bfloat16                   ours                           ours, or oneDNN's, rounded to bfloat16
    numbers with the scales of blocks      ours, in bfloat16              float32, the reference's
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
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fourbit.backends import Plan, Reusable
from fourbit.kernels._check import bits_of, codes_of, fresh, pointer, require, require_disjoint
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._convolutions import convolve, convolve_backward
from fourbit.kernels.cpu._matrices import (
    MOST_TURNED,
    Matrix,
    int8,
    matrices,
    operands_of,
    own_integers,
    own_multiply,
    rows_of,
    why_not_finished,
)
from fourbit.kernels.cpu._quantize import float_grid, kernels
from fourbit.ops import (
    BLOCK_CARRIER,
    EPILOGUE,
    GEMM,
    PRODUCT,
    Contraction,
    Convolution,
    Finish,
    Gemm,
    Layout,
    LinearMap,
    Operand,
    Raw,
)
from fourbit.quantizers import Packed, carrier_dtype, is_dense


@GEMM.kernel("cpu")
def gemm(g: Gemm) -> Plan[Raw]:
    """The product without scale and rounding."""
    if declined := _why_not(g):
        return declined
    con = g.contraction
    if isinstance(con, LinearMap):
        return matrices(g)
    if not isinstance(con, Convolution) or con.transposed or con.groups != 1 or len(con.stride) != 2:
        return f"no kernel computes {con}: linear maps, and plain convolutions of images"
    return convolve(g, con) if g.which == "fprop" else convolve_backward(g, con)


def _why_not(g: Gemm) -> str:
    """What keeps all kernels from a product."""
    a, b = g.a, g.b
    if not (a.is_cpu and b.is_cpu):
        return "an operand is on another device"
    if a.format is None or b.format is None:
        return "an operand is in full precision, or has scales of its blocks in its numbers"
    if carrier_dtype(b.format).itemsize != 1:
        return f"{b.format.name} does not fit int8"
    if isinstance(b.q, Tensor) and b.q.is_floating_point():
        return "the second operand was multiplied by scales of its parts, or averaged"
    return ""


@PRODUCT.kernel("cpu")
def product(g: Gemm, finish: Finish) -> Plan[tuple[Tensor, Tensor | None]]:
    """The products of Linear, finished before they are written for the first time."""
    a, b, layout, fprop = g.a, g.b, finish.layout, g.which == "fprop"
    if not isinstance(g.contraction, LinearMap):
        return "only linear maps are finished as they are written"
    wide = _are_bfloat16(a, b)
    if fprop and not wide:
        multiply = own_integers(g, finish)
        return multiply if isinstance(multiply, str) else Reusable(lambda g, finish: (multiply(g, finish), None))
    if wide:
        if not kernels().has_dot_product or finish.mask is not None:
            return f"{kernels().isa} does not multiply bfloat16, or the result is masked"
        declined = why_not_finished(replace(finish, dtype=torch.float32))
    else:
        declined = _why_not(g) or why_not_finished(finish)
    if declined:
        return declined
    if not isinstance(a.q, Tensor) or (layout is None) != fprop or (layout is not None and not layout.is_contiguous()):
        return "the gradient or the result does not lie in order"
    of = c.Integers() if wide else operands_of(a.format, b.format, a.q.dtype)
    if of is None or (not wide and b.format.max > 127):  # type: ignore[union-attr]
        return f"{kernels().isa} has no product of these formats"
    integers = isinstance(finish.codes, Packed) and finish.codes.grid is None
    if finish.mask is not None and (layout.shape[-1] % 16 or (finish.codes is not None and not integers)):  # type: ignore[union-attr]
        return "masked results come in sixteens, with codes of integers"
    turned = g.which == "wgrad"
    if not a.q.dim() or not b.q.shape or (not turned and len(b.q.shape) != 2):
        return "an operand is no matrix"
    left, right = Matrix.of(a), Matrix.of(b)
    depth, rows = left.shape if turned else left.shape[::-1]
    of_depth, columns = right.shape[::-1] if fprop else right.shape
    if 0 in left.shape or 0 in right.shape or depth != of_depth:
        return "an operand is empty, or the sizes do not go together"
    shape = torch.Size((*a.q.shape[:-1], columns)) if layout is None else layout.shape
    if shape.numel() != rows * columns:
        return "the result has another size"
    if wide and depth > MOST_TURNED:
        return "the sum is too long"

    def run(g: Gemm, finish: Finish) -> tuple[Tensor, Tensor | None]:
        if wide:
            numbers = Matrix.of(g.b).make()
        else:
            numbers = int8(g.b) if g.which == "dgrad" else rows_of(int8(g.b))
        y, clipped = own_multiply(Matrix.of(g.a).make(), numbers, turned, of, finish, g.b.cache, fprop)
        return (y if y.shape == shape else y.view(shape)).to(finish.dtype), clipped

    return Reusable(run)


def _are_bfloat16(*operands: Operand) -> bool:
    """Whether all are numbers in bfloat16 without formats, as those with the scales of blocks in them are."""
    return all(
        o.format is None and isinstance(o.q, Tensor) and o.q.dtype == torch.bfloat16 and o.q.is_cpu and not o.q.is_neg()
        for o in operands
    )


@BLOCK_CARRIER.kernel("cpu")
def block_carrier(contraction: Contraction, device: torch.device) -> Plan[torch.dtype]:
    """What linear maps multiply with float32 sums."""
    if device.type != "cpu":
        return f"the numbers are on {device}"
    return lambda: torch.bfloat16 if isinstance(contraction, LinearMap) and kernels().has_dot_product else torch.float32


_SUMS = (torch.float32, torch.bfloat16, torch.int32)
"""What products leave."""


@EPILOGUE.kernel("cpu")
def epilogue(raw: Raw, finish: Finish) -> Plan[tuple[Tensor, Tensor | None]]:
    """Scale, round, mask, and sum what was clipped: one pass."""
    y = raw.y
    if not y.is_cpu or y.dtype not in _SUMS or finish.dtype not in (torch.float32, torch.bfloat16) or y.is_neg():
        return f"no kernel makes {finish.dtype} of {y.dtype} on {y.device.type}"
    if any(t is not None and t.numel() != 1 for t in (finish.scale, finish.late)):
        return "parts of the result have scales"
    integers = isinstance(finish.codes, Packed) and finish.codes.grid is None
    if finish.mask is not None and finish.codes is not None and not integers:
        return "the clipped operand has no codes of integers"
    grid = None
    if finish.output is not None and not raw.rounded:
        grid = float_grid(finish.output)
        if grid is None:
            return f"no kernel rounds products to {finish.output.name}"
    return lambda: _epilogue(raw, finish, grid)


def _epilogue(raw: Raw, finish: Finish, grid: Any) -> tuple[Tensor, Tensor | None]:
    y, out_dtype = raw.y, finish.dtype
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
        out=fresh(out),
        out_dtype=c.CODES[out_dtype],
    )
    clipped = kernels().epilogue(ctypes.byref(arguments))
    return out, torch.tensor(clipped, dtype=torch.float32) if codes is not None else None
