"""Products of two matrices: integers exactly, gradients in bfloat16 or as two int8."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit.backends import Plan, Reusable
from fourbit.formats import Format
from fourbit.kernels._check import bits_of, codes_of, fresh, pointer, require
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._quantize import float_grid, kernels
from fourbit.ops import Finish, Gemm, Operand, Raw
from fourbit.quantizers import Packed, carrier_dtype


@lru_cache(maxsize=1)
def has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=1)
def has_int8() -> bool:
    """Whether torch multiplies int8 faster than float32: with AVX512-VNNI, unless it was told to keep to less."""
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        return False
    supported = getattr(torch.cpu, "_is_vnni_supported", getattr(torch.cpu, "_is_avx512_vnni_supported", None))
    return supported is None or bool(supported())


@lru_cache(maxsize=64)
def _halves(format: Format | None) -> float | None:
    """1 / unit if every number of the format is unit * (256 high + low) with both in int8; None otherwise."""
    if format is None or format.bits > 8:
        return None
    for value in format.grid:
        number = value / format.smallest
        high = int(number / 256)
        low = number - 256 * high
        if number != int(number) or not (-128 <= high <= 127 and -128 <= low <= 127):
            return None
    return 1.0 / format.smallest


@lru_cache(maxsize=256)
def _ranges(a: Format | None, b: Format | None, dtype: torch.dtype) -> Any | None:
    """Both formats as integers, a's in units of its smallest magnitude where its carrier is bfloat16; None: they are not."""
    if a is None or b is None or max(a.bits, b.bits) > 8 or dtype != carrier_dtype(a) or dtype == torch.float32:
        return None
    unit = float(a.smallest) if dtype == torch.bfloat16 else 1.0
    left, right = [float(value) / unit for value in a.grid], [float(value) for value in b.grid]
    if any(n != int(n) for n in left + right) or max(map(abs, left)) > 32767:
        return None
    if min(right) < -128 or max(right) > 127:
        return None
    ends = {"a_min": min(left), "a_max": max(left), "b_min": min(right), "b_max": max(right)}
    return c.Integers(dtype=c.CODES[dtype], unit=unit, **{name: int(end) for name, end in ends.items()})


def integers_of(a: Format | None, b: Format | None, dtype: torch.dtype) -> Any | None:
    """What the library's exact products have to know of operands of these formats, the first in `dtype`; None: it has none
    for them with the instruction set in use."""
    run = kernels()
    return _ranges(a, b, dtype) if run.has_products and not run.has_dot_product else None


def bytes_of(a: Format | None, b: Format | None, dtype: torch.dtype) -> Any | None:
    """The same of convolutions of 8-bit numbers, which are multiplied as such also where bfloat16 is."""
    return _ranges(a, b, dtype) if dtype.itemsize == 1 and kernels().has_products else None


def operands_of(a: Format | None, b: Format | None, dtype: torch.dtype, forward: int = 0) -> Any | None:
    """The same of all products of two matrices, those of bfloat16 among them; `forward`: the length of the sum, if both are
    integers, with 32 bits for it."""
    if not kernels().has_dot_product:
        return integers_of(a, b, dtype)
    takes = forward * 255 * 128 < 2**31 if forward else dtype == torch.bfloat16
    return c.Integers() if takes else None


class Matrix(NamedTuple):
    """An operand of a product as a matrix, which is made when the product is: unpacked, and copied where its axes demand it."""

    shape: tuple[int, int]
    make: Callable[[], Tensor]

    @staticmethod
    def of(operand: Operand) -> Matrix:
        """int8 numbers, or those of a gradient: the last axis, and all before it as rows."""
        *leading, columns = operand.q.shape
        shape = math.prod(leading), columns
        return Matrix(shape, lambda: (int8(operand) if isinstance(operand.q, Packed) else operand.q).reshape(shape))


def matrices(g: Gemm) -> Plan[Raw]:
    """A product of a linear layer."""
    a, b = g.a, g.b
    if g.which == "fprop":
        own = own_integers(g)
        if not isinstance(own, str):
            return Reusable(lambda g: Raw(own(g, None)))
    if not a.q.shape or not b.q.shape or (g.which != "wgrad" and len(b.q.shape) != 2):
        return "an operand is no matrix"
    if g.which == "wgrad":
        shape = (a.q.shape[-1], b.q.shape[-1])
    else:
        shape = (*a.q.shape[:-1], b.q.shape[0 if g.which == "fprop" else 1])
    return by_matrices(g, _sides, lambda y: y.view(shape))


def _sides(g: Gemm) -> tuple[Matrix, Matrix]:
    """The operands of a product of a linear layer."""
    b = g.b
    if g.which == "wgrad":
        right = Matrix.of(b)._replace(make=lambda: rows_of(int8(b)))
    elif g.which == "fprop":
        right = Matrix((b.q.shape[1], b.q.shape[0]), lambda: int8(b).t())
    else:
        right = Matrix((b.q.shape[0], b.q.shape[1]), lambda: int8(b))
    return Matrix.of(g.a), right


def by_matrices(g: Gemm, sides: Callable[[Gemm], tuple[Matrix, Matrix]], turn: Callable[[Tensor], Tensor]) -> Plan[Raw]:
    """A product of two matrices, which `sides` makes of the operands, brought into another shape."""
    multiply = _way(g, *sides(g))
    if isinstance(multiply, str):
        return multiply

    def run(g: Gemm) -> Raw:
        raw = multiply(*sides(g), g.b.cache)
        return raw._replace(y=turn(raw.y), high=None if raw.high is None else turn(raw.high))

    return Reusable(run)


def int8(operand: Operand) -> Tensor:
    """int8 numbers; unsigned ones are 4-bit here, or refused."""
    return operand.to(torch.int8)


def rows_of(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


_Way = Callable[[Matrix, Matrix, dict[str, Any] | None], Raw]


def _way(g: Gemm, left: Matrix, right: Matrix) -> _Way | str:
    """How left right, or in wgrad left^T right, is computed, the left matrix in the carrier of its format."""
    a, b, turned = g.a, g.b, g.which == "wgrad"
    assert a.format is not None and b.format is not None
    dtype = torch.int8 if isinstance(a.q, Packed) else a.q.dtype
    if 0 in left.shape or 0 in right.shape:
        return "an operand is empty"
    if b.format.max > 127:
        return f"{b.format.name} does not fit int8"
    of = operands_of(a.format, b.format, dtype)
    if of is not None and g.which != "fprop":
        return lambda left, right, cache: Raw(own_multiply(left.make(), right.make(), turned, of, None, cache)[0])

    def rows(left: Matrix) -> Tensor:
        t = left.make()
        return t.t() if turned else t

    fits = left.shape[0 if turned else 1] * 128 * 128 < 2**31
    if dtype in (torch.int8, torch.uint8):
        if not has_int8():
            return "torch multiplies int8 no faster than float32 on this processor"
        if not fits or a.format.max > 127:
            return f"{a.format.name} does not fit int8, or the sums of this size do not fit 32 bits"
        return lambda left, right, _: Raw(_int_mm(rows(left).view(torch.int8), right.make()))
    if dtype != torch.bfloat16:
        return f"{a.format.name} is multiplied in {dtype}"
    unit = _halves(a.format)
    if unit is not None and has_int8() and fits:
        return lambda left, right, _: _multiply_halves(left, right, turned, unit)
    if g.products == "fast" and has_bfloat16():
        return lambda left, right, _: Raw(rows(left) @ right.make().to(torch.bfloat16), rounded=True)
    return f"{kernels().isa} has no exact product of {a.format.name} and {b.format.name}, nor torch a fast one"


def _multiply_halves(left: Matrix, right: Matrix, turned: bool, unit: float) -> Raw:
    other = right.make()
    high, low = (_int_mm(t.t() if turned else t, other) for t in _split(left.make(), unit))
    return Raw(low, high, 1.0 / unit)


MOST_TURNED = (1 << 31) // 16 - 1
"""The longest sum of a product with a right matrix in bfloat16 that is given as its transpose."""


def own_multiply(
    left: Tensor,
    right: Tensor,
    turned: bool,
    of: Any,
    finish: Finish | None = None,
    cache: dict[str, Any] | None = None,
    right_turned: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The product, finished, in float32; `turned`: of the transposed `left`. And the sum of what was clipped.

    Args:
        right: int8; or bfloat16, where the library multiplies such numbers.
        of: of the operands, as by `operands_of`, which says that there is such a product.
        cache: of the right operand, whose panels are packed once.
        right_turned: `right`, in bfloat16, is given as its transpose.
    """
    left, right = left.contiguous(), right.contiguous()
    depth, columns = right.shape[::-1] if right_turned else right.shape
    num_rows = left.shape[1] if turned else left.shape[0]
    require(left.shape[0 if turned else 1] == depth, "a matrix with as many columns as the other has rows")
    y = torch.empty(num_rows, columns, dtype=torch.float32)
    n = num_rows * columns
    arguments: Any = c.MatMul(
        a=pointer(left, "a", left.dtype, num_rows * depth, torch.contiguous_format),
        turned=turned,
        b_turned=right_turned,
        out=fresh(y),
        rows=num_rows,
        columns=columns,
        depth=depth,
        scale=1.0,
        post=1.0,
        of=of,
    )
    at = pointer(right, "b", right.dtype, depth * columns, torch.contiguous_format)
    if right.dtype == torch.bfloat16:
        arguments.b16 = at
    else:
        require(right.dtype == torch.int8 and not right_turned, "int8 or bfloat16 numbers")
        arguments.b = at
    if cache is not None:
        arguments.panels = panels(arguments, cache)
    codes = None
    if finish is not None:
        grid = None if finish.output is None else float_grid(finish.output)
        arguments.scale = 1.0 if finish.scale is None else float(finish.scale)
        arguments.post = 1.0 if finish.late is None else float(finish.late)
        arguments.rounds = grid is not None
        if grid is not None:
            arguments.grid = grid
        if finish.mask is not None:
            arguments.mask = bits_of(finish.mask, "mask", n)
            require(columns % 16 == 0, "a masked product with columns in sixteens")
            codes = finish.codes if isinstance(finish.codes, Packed) else None
        if codes is not None:
            arguments.packed = codes_of(codes.data, n)
            arguments.is_signed = codes.signed
    require(bool(kernels().multiply(ctypes.byref(arguments))), "an instruction set with products")
    return y, None if codes is None else torch.tensor(arguments.clipped, dtype=torch.float32)


def own_integers(g: Gemm, finish: Finish | None = None) -> Callable[[Gemm, Finish | None], Tensor] | str:
    """A forward product of small integers: exact, and finished at once. Or why there is none.

    Where bfloat16 is multiplied too, only with a weight that is multiplied several times: for others `_int_mm` is as fast.
    """
    x, w, cache = g.a.q, g.b.q, g.b.cache
    if isinstance(x, Packed) or not x.is_cpu or x.dtype not in _INTEGERS:
        return "the input is not int8 or uint8 numbers on the CPU"
    if not x.numel() or not w.shape.numel() or len(w.shape) != 2 or x.shape[-1:] != w.shape[1:]:
        return "an operand is empty, or the sizes do not go together"
    if (isinstance(w, Tensor) and w.dtype not in _INTEGERS) or g.b.format is None or g.b.format.max > 127:
        return "the weight does not fit int8"
    of = operands_of(g.a.format, g.b.format, x.dtype, w.shape[1])
    if of is None:
        return f"{kernels().isa} has no product of these formats and this size"
    if cache is None and kernels().has_dot_product:
        return "torch multiplies int8 as fast"
    if finish is not None and (declined := why_not_finished(finish)):
        return declined
    if finish is not None and (finish.late is not None or finish.mask is not None):
        return "a forward product has no mask, and no scale behind the rounding"
    grid = None if finish is None or finish.output is None else float_grid(finish.output)
    shape = (*x.shape[:-1], w.shape[0])
    known = c.MatMul(
        rows=x.shape[:-1].numel(),
        columns=w.shape[0],
        depth=w.shape[1],
        scale=1.0,
        rounds=grid is not None,
        grid=grid or c.FloatGrid(),
        post=1.0,
        integers=True,
        is_unsigned=x.dtype == torch.uint8,
        of=of,
    )

    dtype, num_x, num_w = x.dtype, x.numel(), w.shape.numel()

    def run(g: Gemm, finish: Finish | None) -> Tensor:
        x, w = g.a.q.contiguous(), int8(g.b).contiguous()  # type: ignore[union-attr]
        y = torch.empty(shape, dtype=torch.float32)
        arguments = c.MatMul.from_buffer_copy(known)
        arguments.a = pointer(x, "a", dtype, num_x, torch.contiguous_format)
        arguments.b = pointer(w, "b", torch.int8, num_w, torch.contiguous_format)
        arguments.out = fresh(y)
        if finish is not None and finish.scale is not None:
            arguments.scale = float(finish.scale)
        if g.b.cache is not None:
            arguments.panels = panels(arguments, g.b.cache)
        require(bool(kernels().multiply(ctypes.byref(arguments))), "an instruction set with products")
        return y

    return run


_INTEGERS = (torch.int8, torch.uint8)


def why_not_finished(finish: Finish) -> str:
    """Why a product cannot be finished as it is written; "" where it can."""
    if finish.dtype != torch.float32 or (finish.keep_infinite and finish.output is not None):
        return "the result is not float32, or an operand is in full precision"
    if any(t is not None and t.numel() != 1 for t in (finish.scale, finish.late)):
        return "parts of the result have scales"
    if finish.output is not None and float_grid(finish.output) is None:
        return f"no kernel rounds products to {finish.output.name}"
    return ""


def panels(arguments: Any, cache: dict[str, Any]) -> int:
    """The address of the right operand of a product as the library multiplies it, made once and kept in `cache`. Only where
    the library multiplies at all."""
    count = kernels().panel_count(ctypes.byref(arguments))
    key = f"panels {kernels().isa} {count} {arguments.b_turned} {bool(arguments.b16)}"
    kept = cache.get(key)
    if kept is None:
        kept = torch.empty(count, dtype=torch.int32)
        packed = kernels().pack_panels(ctypes.byref(arguments), pointer(kept, "panels", torch.int32, count))
        require(bool(packed), "an instruction set with products")
        cache[key] = kept
    return pointer(kept, "panels", torch.int32, count)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch._int_mm, which is given matrices that lie in order, or whose transposes do: of others (an axis of length 1 with an
    odd stride, as of a transposed column; rows that are one row, repeated) it reads memory that is not theirs."""
    return torch.ops.aten._int_mm.default(_in_order(a), _in_order(b))


def _in_order(t: Tensor) -> Tensor:
    if 1 in t.shape:
        return t.reshape(-1).view(t.shape)
    return t if t.is_contiguous() or t.t().is_contiguous() else t.contiguous()


def _split(x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    high, low = torch.empty_like(x, dtype=torch.int8), torch.empty_like(x, dtype=torch.int8)
    n = x.numel()
    arguments = c.Split(
        x=pointer(x, "x", torch.bfloat16, n),
        n=n,
        unit=unit,
        high=pointer(high, "high", torch.int8, n, like=x),
        low=pointer(low, "low", torch.int8, n, like=x),
    )
    kernels().split(ctypes.byref(arguments))
    return high, low
