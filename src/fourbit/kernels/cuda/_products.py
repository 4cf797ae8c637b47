"""Products of a layer on a GPU, and what follows them.

    operands                        Linear, 1x1 convolution              other convolutions
    4-bit integers (forward)        int8, exact                          float16 or bfloat16, "fast" only
    gradient, large, "fast"         FP8 (see `_multiply`)                bfloat16
    gradient, else                  bfloat16, sums in float32            bfloat16, "fast" only
    FP16 1-6-9, and all the rest    TF32: products exact, sums in float32

cuDNN sums a convolution of half-precision operands in float32 and rounds the results to their dtype. In the forward pass that
is float16 where the largest possible sum fits (weights are multiplied by a power of two): 11 significant bits, and the
output format is applied afterwards. Elsewhere it is bfloat16, which is accepted in place of the output format. Where "exact"
is asked for, convolutions run in float32, which torch lets cuDNN multiply in TF32 unless
`torch.backends.cudnn.allow_tf32` is off. Sizes that int8 does not take go to bfloat16, exact up to sums of 2^24.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fourbit.backends import Plan
from fourbit.formats import Format
from fourbit.kernels._check import checked, mask_bytes, packed_bytes, require
from fourbit.kernels.cuda._device import capability, kernels, launch, takes
from fourbit.kernels.cuda._grids import parameters, table_of
from fourbit.kernels.cuda._multiply import (
    bfloat16_mm,
    fits_bfloat16,
    fits_int8,
    fits_tf32,
    fp8_mm,
    fp8_of,
    int8_mm,
    is_worth_fp8,
    takes_int8,
    tf32,
)
from fourbit.kernels.cuda._quantize import DTYPES, NO_TRITON, ROWS
from fourbit.ops import EPILOGUE, GEMM, Convolution, Finish, Gemm, LinearMap, Operand, Raw, reference_product
from fourbit.quantizers import BLOCK, Packed, is_dense


@GEMM.kernel("cuda")
def gemm(g: Gemm) -> Plan[Raw]:
    """The product without scale and rounding."""
    a, b = g.a, g.b
    if not takes(a.q.data if isinstance(a.q, Packed) else a.q):
        return "the operands are on another device, or on a GPU that has no kernels"
    if not (a.on_grid and b.on_grid):
        return "an operand is in full precision, was averaged, or has scales of its parts in its numbers"
    if a.q.shape.numel() == 0 or b.q.shape.numel() == 0:
        return "an operand is empty"
    found: Plan[Raw] = ""
    if isinstance(g.contraction, LinearMap):
        found = _linear(g)
    elif isinstance(g.contraction, Convolution):
        found = _pointwise(g, g.contraction)
        if isinstance(found, str):
            found = _convolve(g, g.contraction)
    return _by_tf32(g) if isinstance(found, str) else found


def _formats(g: Gemm) -> tuple[Format, Format]:
    assert g.a.format is not None and g.b.format is not None  # on the grid
    return g.a.format, g.b.format


def _by_tf32(g: Gemm) -> Plan[Raw]:
    """The reference's product on tensor cores, where these multiply its operands exactly."""
    formats = _formats(g)
    if not all(map(fits_tf32, formats)):
        return f"{formats[0].name} or {formats[1].name} has more than the 11 bits of TF32"

    def run() -> Raw:
        with tf32():
            return Raw(reference_product(g))

    return run


def _int8(operand: Operand) -> Tensor:
    q = operand.q
    return q.unpack(torch.int8) if isinstance(q, Packed) else q.view(torch.int8)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _linear(g: Gemm) -> Plan[Raw]:
    """fprop a b^T, dgrad a b, wgrad a^T b, the leading axes of a and of wgrad's b flattened."""
    a, b, formats = g.a, g.b, _formats(g)
    rows, columns = a.q.shape[:-1].numel(), a.q.shape[-1]
    width = b.q.shape[0] if g.which == "fprop" else b.q.shape[-1]
    shape = (*(a.q.shape[:-1] if g.which != "wgrad" else a.q.shape[-1:]), width)
    if g.which == "fprop" and all(map(fits_int8, formats)) and takes_int8(rows, columns, width, a.device):
        return lambda: Raw(int8_mm(_rows(_int8(a)), _int8(b)).view(shape))
    if g.which != "fprop" and g.products == "fast" and is_worth_fp8(rows, columns, b.q.shape[-1]):
        kinds = fp8_of(*formats, a.device)
        if kinds is not None:
            return lambda: Raw(_backward_in_fp8(g, *kinds).view(shape))
    if not all(map(fits_bfloat16, formats)) or capability(a.device) < (8, 0):
        return f"this device has no product of {formats[0].name} and {formats[1].name}"

    def run() -> Raw:
        left, right = _rows(a.to(torch.bfloat16)), _rows(b.to(torch.bfloat16))
        y = bfloat16_mm(left.t() if g.which == "wgrad" else left, right.t() if g.which == "fprop" else right)
        return Raw(y.view(shape))

    return run


def _backward_in_fp8(g: Gemm, kind: torch.dtype, other: torch.dtype) -> Tensor:
    """g w or g^T x on FP8 tensor cores, which want both operands with the summed axis last in memory."""
    left = _rows(g.a.to(kind))
    return fp8_mm((left if g.which == "dgrad" else left.t()).contiguous(), _transposed(g.b, other))


def _transposed(operand: Operand, dtype: torch.dtype) -> Tensor:
    """The rows of an operand as columns, contiguous; packed codes directly so."""
    q = operand.q
    columns = q.shape[-1]
    if isinstance(q, Packed) and q.grid is None and columns % BLOCK == 0 and _is_row_major(q) and kernels() is not None:
        rows, device = q.shape[:-1].numel(), q.data.device
        out = torch.empty((columns, rows), dtype=dtype, device=device)
        programs = -(-rows // 64) * (columns // BLOCK)
        codes = checked(q.data, "packed", torch.uint8, packed_bytes(rows * columns), out)
        arguments = (codes, rows, columns, out)
        launch(kernels().unpack_transposed_kernel, programs, out, *arguments, SIGNED=q.signed, ROWS=64, num_warps=4)  # type: ignore[union-attr]
        return out
    return _rows(operand.to(dtype)).t().contiguous()


def _is_row_major(q: Packed) -> bool:
    return torch.empty_strided(q.shape, q.stride, device="meta").is_contiguous()


def _matrix(operand: Operand, order: tuple[int, ...], columns: int) -> Operand:
    """An operand with four axes as a matrix whose rows run over the axes `order` but the last; a view where memory allows."""
    q = operand.q
    if isinstance(q, Packed):
        outline = torch.empty_strided(q.shape, q.stride, device="meta").permute(order)
        if outline.is_contiguous():
            shape = torch.Size((q.shape.numel() // columns, columns))
            return operand._replace(q=replace(q, shape=shape, stride=(columns, 1)))
        q = q.unpack(torch.int8 if q.signed else torch.uint8)
    return operand._replace(q=q.permute(order).reshape(-1, columns))


def _pointwise(g: Gemm, con: Convolution) -> Plan[Raw]:
    """A 1x1 convolution as a product of matrices: in channels_last, its pixels are the rows."""
    kernel = g.layout.shape[2:] if g.which == "wgrad" and g.layout is not None else g.b.q.shape[2:]
    if con.transposed or con.groups != 1 or con.stride != (1, 1) or con.padding != (0, 0) or tuple(kernel) != (1, 1):
        return "the convolution is not 1x1, with stride 1 and no padding"
    formats, (n, columns, *pixels) = _formats(g), g.a.q.shape
    in_int8 = g.which == "fprop" and all(map(fits_int8, formats))
    in_int8 = in_int8 and takes_int8(n * math.prod(pixels), columns, g.b.q.shape[0], g.a.device)
    if in_int8 or (all(map(fits_bfloat16, formats)) and capability(g.a.device) >= (8, 0)):
        return lambda: _run_pointwise(g)  # as a matrix, `_linear` takes it
    return "this device has no product of these formats"


def _run_pointwise(g: Gemm) -> Raw:
    order = (0, 2, 3, 1)  # of a weight too: its last two axes have size 1
    a, b = (_matrix(o, order, o.q.shape[1]) for o in (g.a, g.b))
    work = _linear(replace(g, contraction=LinearMap(), a=a, b=b))
    assert callable(work)
    raw = work()
    if g.which == "wgrad":
        assert g.layout is not None
        return raw._replace(y=raw.y.view(g.layout.shape))
    n, _, height, width = g.a.q.shape
    return raw._replace(y=raw.y.view(n, height, width, -1).permute(0, 3, 1, 2))


def _float16_shift(g: Gemm, con: Convolution) -> int | None:
    """s such that no sum of products, times 2^-s, is too large for float16, and 2^-s itself is normal; None: there is none.

    For integers: every other result is then normal, so that it keeps 11 bits.
    """
    formats, shape = _formats(g), g.b.q.shape
    if not all(map(fits_int8, formats)):
        return None
    depth = shape.numel() // shape[1 if con.transposed else 0]
    bound = depth * math.prod(max(f.max, -f.min) for f in formats)
    shift = max(0, math.ceil(math.log2(bound)) - 15)
    return shift if shift <= 14 else None


def _convolve(g: Gemm, con: Convolution) -> Plan[Raw]:
    """cuDNN's convolution of half-precision carriers."""
    if g.products != "fast" or not all(map(fits_bfloat16, _formats(g))) or capability(g.a.device) < (8, 0):
        return "an exact convolution is wanted, or this device has none of these formats"
    return lambda: _run_convolution(g, con)


def _run_convolution(g: Gemm, con: Convolution) -> Raw:
    if g.which == "fprop":
        shift = _float16_shift(g, con)
        if shift is not None:
            x, w = g.a.to(torch.float16), g.b.to(torch.float16)
            return Raw(con.fprop(x, w * 2.0**-shift if shift else w), unit=2.0**shift)
        return Raw(con.fprop(g.a.to(torch.bfloat16), g.b.to(torch.bfloat16)), rounded=True)
    assert g.layout is not None
    gradient, other = g.a.to(torch.bfloat16), g.b.to(torch.bfloat16)
    like = g.layout.empty(torch.bfloat16, gradient.device)
    multiply = con.dgrad if g.which == "dgrad" else con.wgrad
    return Raw(multiply(gradient, other, like), rounded=True)


@EPILOGUE.kernel("cuda")
def epilogue(raw: Raw, finish: Finish) -> Plan[tuple[Tensor, Tensor | None]]:
    """Scale, round, mask, and sum what was clipped: one pass."""
    y = raw.y
    if not takes(y) or y.dtype not in (*DTYPES, torch.int32) or finish.dtype not in DTYPES or raw.high is not None:
        return f"no kernel makes {finish.dtype} of {y.dtype} on {y.device.type}"
    codes = finish.codes if finish.mask is not None else None
    singles = [t for t in (finish.scale, finish.late) if t is not None]
    if any(t.numel() != 1 or t.dtype != torch.float32 or t.device != y.device for t in singles):
        return "parts of the result have scales, or these are on another device"
    if codes is not None and not (isinstance(codes, Packed) and codes.grid is None):
        return "the clipped operand has no codes of integers"
    if y.numel() == 0 or y.is_neg():
        return "the product is empty, or negated when it is read"
    grid: Any = None
    if finish.output is not None and not raw.rounded:
        grid = parameters(finish.output)
        if grid is None:
            return f"no kernel rounds products to {finish.output.name}"
    return NO_TRITON if kernels() is None else lambda: _epilogue(raw, finish, codes, grid)


def _epilogue(raw: Raw, finish: Finish, codes: Packed | None, grid: Any) -> tuple[Tensor, Tensor | None]:
    y, singles = raw.y, [t for t in (finish.scale, finish.late) if t is not None]
    if finish.layout is not None:
        require(finish.layout.shape == y.shape, f"a product of shape {tuple(finish.layout.shape)}")
    y = finish.layout.match(y) if finish.layout is not None else y if is_dense(y) else y.contiguous()
    in_place = y.dtype == finish.dtype
    if in_place and grid is None and finish.mask is None and not singles and raw.unit == 1.0:
        return y, None
    out = y if in_place else torch.empty_like(y, dtype=finish.dtype)
    n = y.numel()
    programs = -(-n // (BLOCK * ROWS))
    clipped = torch.empty(programs, dtype=torch.float32, device=y.device) if codes is not None else None
    launch(
        kernels().epilogue_kernel,  # type: ignore[union-attr]
        programs,
        y,
        checked(y, "y", y.dtype, n, y),
        n,
        raw.unit,
        finish.scale,
        finish.late,
        None if finish.mask is None else checked(finish.mask, "mask", torch.uint8, mask_bytes(n), y).view(torch.int32),
        None if codes is None else checked(codes.data, "packed", torch.uint8, packed_bytes(n), y),
        checked(out, "out", finish.dtype, n, y),
        clipped,
        None if grid is None else table_of(finish.output, grid, y.device),  # type: ignore[arg-type]
        GRID=grid,
        KEEP_INFINITE=finish.keep_infinite,
        SIGNED=codes is not None and codes.signed,
        ROWS=ROWS,
        num_warps=8,
    )
    return out, None if clipped is None else clipped.sum()
