"""Matrix products on the CPU.

    operands                               Linear                         2-d convolutions
    int8 x int8 (forward)                  _int_mm, exact                 ours, or oneDNN's int8 convolution, exact
    gradient in one int8 x int8            _int_mm, exact                 as below; backward, 1x1 convolutions are as Linear
    gradient in bfloat16                   ours (float32)                 ours (float32), or oneDNN's, rounded to bfloat16
    where ours does not run:
    gradient in two int8 x int8            two _int_mm, exact             oneDNN's, rounded to bfloat16
    other gradients that bfloat16 holds    bfloat16, rounded to it        oneDNN's, rounded to bfloat16

Ours needs AVX512-BF16; its sums are float32. A gradient goes in two int8 where every number of its format is 256 high + low
in units of the smallest magnitude: radix-4 FP4 does. What is rounded to bfloat16 is so only where products are "fast";
"exact" leaves it to the reference, which multiplies in float32. Everything else (grouped, dilated, transposed, 1-d and 3-d
convolutions, wide formats) is the reference's anyway.
"""

from __future__ import annotations

import ctypes
import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.formats import Format
from fourbit.kernels.cpu import _library as c
from fourbit.kernels.cpu._quantize import float_grid, is_half, kernels
from fourbit.ops import Convolution, Finish, Gemm, Layout, LinearMap, Operand, Raw
from fourbit.quantizers import Packed, carrier_dtype, is_dense


@lru_cache(maxsize=1)
def _has_bfloat16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=1)
def _has_int8() -> bool:
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


@backends.register("gemm", "cpu")
def gemm(g: Gemm) -> Raw | None:
    """The product without scale and rounding, or None."""
    if g.a.device.type != "cpu" or g.a.format is None or g.b.format is None:
        return None
    if carrier_dtype(g.b.format).itemsize != 1 or (isinstance(g.b.q, torch.Tensor) and g.b.q.is_floating_point()):
        return None
    con = g.contraction
    if isinstance(con, LinearMap):
        return _matrices(g)
    if not isinstance(con, Convolution) or con.transposed or con.groups != 1 or len(con.stride) != 2:
        return None
    if g.which == "fprop":
        return _convolve(g, con)
    pointwise = con.stride == (1, 1) and con.padding == (0, 0) and g.layout is not None
    if pointwise and (g.which == "wgrad" or g.layout.shape[2:] == g.a.q.shape[2:]):  # type: ignore[union-attr]
        kernel = (g.layout if g.which == "wgrad" else g.b.q).shape[2:]  # type: ignore[union-attr]
        if tuple(kernel) == (1, 1):
            found = _pointwise(g)
            if found is not None:
                return found
    return _convolve_backward(g, con)


def _matrices(g: Gemm) -> Raw | None:
    a, b = g.a, g.b
    if g.which == "fprop":
        return _multiply(a, _int8(b).t(), g, lambda t: t)
    if g.which == "dgrad":
        return _multiply(a, _int8(b), g, lambda t: t)
    return _multiply(a, _rows(_int8(b)), g, lambda t: t.t())


def _int8(operand: Operand) -> Tensor:
    """int8 numbers; unsigned ones are 4-bit here, or refused."""
    return operand.to(torch.int8)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _multiply(a: Operand, right: Tensor, g: Gemm, turn) -> Raw | None:
    """turn(rows of a) @ right."""
    q = a.q
    assert isinstance(q, Tensor) or g.which == "fprop"
    left = a.to(torch.int8) if isinstance(q, Packed) else q
    if left.numel() == 0 or right.numel() == 0 or g.b.format.max > 127:  # type: ignore[union-attr]
        return None
    shape = (*left.shape[:-1], right.shape[-1]) if g.which != "wgrad" else (left.shape[-1], right.shape[-1])
    rows = _rows(left)
    depth = rows.shape[0] if g.which == "wgrad" else rows.shape[1]
    if left.dtype in (torch.int8, torch.uint8):
        if not _has_int8() or depth * 128 * 128 >= 2**31 or a.format.max > 127:  # type: ignore[union-attr]
            return None
        return Raw(_int_mm(turn(rows.view(torch.int8)), right).view(shape))
    if left.dtype == torch.bfloat16:
        found = _own_multiply(rows, right, g.which == "wgrad", None, g.b.cache)
        if found is not None:
            return Raw(found[0].view(shape))
    unit = _halves(a.format)
    if left.dtype == torch.bfloat16 and unit is not None and _has_int8() and depth * 128 * 128 < 2**31:
        high, low = _split(rows, unit)
        high, low = _int_mm(turn(high), right), _int_mm(turn(low), right)
        return Raw(low.view(shape), high.view(shape), 1.0 / unit)
    if left.dtype == torch.bfloat16 and g.products == "fast" and _has_bfloat16():
        return Raw((turn(rows) @ right.to(torch.bfloat16)).view(shape), rounded=True)
    return None


def _own_multiply(
    left: Tensor, right: Tensor, turned: bool, finish: Finish | None = None, cache: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """The product, finished, in float32; `turned`: of the transposed `left`. And the sum of what was clipped. `cache`: of the
    right operand, whose panels are packed once."""
    left, right = left.contiguous(), right.contiguous()
    depth, columns = right.shape
    num_rows = left.shape[1] if turned else left.shape[0]
    y = left.new_empty(num_rows, columns, dtype=torch.float32)
    arguments: Any = c.MatMul(
        left.data_ptr(), turned, right.data_ptr(), y.data_ptr(), num_rows, columns, depth, scale=1.0, post=1.0
    )
    if cache is not None:
        arguments.panels = panels(arguments, cache).data_ptr()
    codes = None
    if finish is not None:
        grid = None if finish.output is None else float_grid(finish.output)
        arguments.scale = 1.0 if finish.scale is None else float(finish.scale)
        arguments.post = 1.0 if finish.late is None else float(finish.late)
        arguments.rounds = grid is not None
        if grid is not None:
            arguments.grid = grid
        if finish.mask is not None:
            arguments.mask = finish.mask.data_ptr()
            codes = finish.codes if isinstance(finish.codes, Packed) else None
        if codes is not None:
            arguments.packed, arguments.is_signed = codes.data.data_ptr(), codes.signed
    if not kernels().multiply(ctypes.byref(arguments)):
        return None
    return y, None if codes is None else torch.tensor(arguments.clipped, dtype=torch.float32)


@lru_cache(maxsize=1)
def multiplies_bfloat16() -> bool:
    """Whether the library has products of matrices on this machine."""
    return bool(kernels().panel_count(ctypes.byref(c.MatMul(rows=1, columns=1, depth=1))))


def multiplies_integers(w: Tensor) -> bool:
    """Whether it multiplies small integers by this weight [N, K] exactly, in 32 bits."""
    return multiplies_bfloat16() and w.shape[1] * 255 * 128 < 2**31


def _own_integers(g: Gemm, finish: Finish, cache: dict[str, Any]) -> tuple[Tensor, None] | None:
    """A forward product of small integers with a weight that is multiplied several times: exact, finished at once."""
    x, w = g.a.q, g.b.q
    if (
        not isinstance(x, Tensor)
        or not isinstance(w, Tensor)
        or x.device.type != "cpu"
        or not x.numel()
        or not w.numel()
    ):
        return None
    if x.dtype not in (torch.int8, torch.uint8) or w.dtype != torch.int8 or not multiplies_integers(w):
        return None
    if finish.dtype != torch.float32 or finish.keep_infinite or finish.late is not None or finish.mask is not None:
        return None
    grid = None if finish.output is None else float_grid(finish.output)
    if finish.output is not None and grid is None:
        return None
    x, w = x.contiguous(), w.contiguous()
    y = torch.empty(*x.shape[:-1], w.shape[0], dtype=torch.float32)
    sizes = x.shape[:-1].numel(), w.shape[0], w.shape[1]
    arguments: Any = c.MatMul(x.data_ptr(), 0, w.data_ptr(), y.data_ptr(), *sizes, scale=1.0, post=1.0)
    arguments.integers, arguments.is_unsigned = True, x.dtype == torch.uint8
    arguments.scale = 1.0 if finish.scale is None else float(finish.scale)
    arguments.rounds = grid is not None
    if grid is not None:
        arguments.grid = grid
    arguments.panels = panels(arguments, cache).data_ptr()
    return (y, None) if kernels().multiply(ctypes.byref(arguments)) else None


def panels(arguments: Any, cache: dict[str, Any]) -> Tensor:
    """The right operand of a product as the library multiplies it, made once."""
    if "panels" not in cache:
        cache["panels"] = torch.empty(kernels().panel_count(ctypes.byref(arguments)), dtype=torch.int32)
        kernels().pack_panels(ctypes.byref(arguments), cache["panels"].data_ptr())
    return cache["panels"]


@backends.register("product", "cpu")
def product(g: Gemm, finish: Finish) -> tuple[Tensor, Tensor | None] | None:
    """The gradients of Linear, finished before they are written for the first time."""
    a, b, layout = g.a, g.b, finish.layout
    if isinstance(g.contraction, LinearMap) and g.which == "fprop" and b.cache is not None:
        return _own_integers(g, finish, b.cache)
    if not isinstance(g.contraction, LinearMap) or g.which == "fprop" or layout is None:
        return None
    if not isinstance(a.q, Tensor) or a.q.device.type != "cpu" or a.q.dtype != torch.bfloat16 or a.q.numel() == 0:
        return None
    if a.format is None or b.format is None or b.format.max > 127 or carrier_dtype(b.format).itemsize != 1:
        return None
    if isinstance(b.q, Tensor) and b.q.is_floating_point():  # multiplied by scales per channel, or averaged
        return None
    if finish.dtype != torch.float32 or finish.keep_infinite or not layout.is_contiguous():
        return None
    if finish.late is not None and finish.late.numel() != 1:
        return None
    if finish.output is not None and float_grid(finish.output) is None:
        return None
    integers = isinstance(finish.codes, Packed) and finish.codes.grid is None
    if finish.mask is not None and (layout.shape[-1] % 16 or (finish.codes is not None and not integers)):
        return None
    right = _int8(b) if g.which == "dgrad" else _rows(_int8(b))
    found = None if right.numel() == 0 else _own_multiply(_rows(a.q), right, g.which == "wgrad", finish, b.cache)
    return None if found is None else (found[0].view(layout.shape), found[1])


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """torch._int_mm. It reads wrong memory where the stride of an axis of length 1 is odd (a column, transposed)."""
    a, b = (t.reshape(-1).view(t.shape) if 1 in t.shape else t for t in (a, b))
    return torch.ops.aten._int_mm.default(a, b)


def _split(x: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    high, low = torch.empty_like(x, dtype=torch.int8), torch.empty_like(x, dtype=torch.int8)
    kernels().split(ctypes.byref(c.Split(x.data_ptr(), x.numel(), unit, high.data_ptr(), low.data_ptr())))
    return high, low


def _pointwise(g: Gemm) -> Raw | None:
    """A 1x1 convolution as a product of matrices: channels_last makes its pixels the rows."""
    a = Operand(_channels_last_rows(g.a.q), g.a.scale, g.a.format)
    if g.which == "dgrad":
        w = _int8(g.b).flatten(1)
        raw = _multiply(a, w, g, lambda t: t)
        if raw is None:
            return None
        n, _, h, width = g.layout.shape  # type: ignore[union-attr]
        return raw._replace(
            y=_image(raw.y, n, h, width), high=None if raw.high is None else _image(raw.high, n, h, width)
        )
    x = _channels_last_rows(_int8(g.b))
    raw = _multiply(a, x, g, lambda t: t.t())
    if raw is None:
        return None
    shape = g.layout.shape  # type: ignore[union-attr]
    return raw._replace(y=raw.y.view(shape), high=None if raw.high is None else raw.high.view(shape))


def _channels_last_rows(t: Tensor | Packed) -> Tensor:
    assert isinstance(t, Tensor)
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _image(rows: Tensor, n: int, h: int, w: int) -> Tensor:
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


_ONE, _ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int64)


def _convolve(g: Gemm, con: Convolution) -> Raw | None:
    """Ours, or oneDNN's int8 convolution: unsigned activations, or signed ones with a zero point; float32 out, sums exact."""
    if not _has_int8() or g.a.format is None or carrier_dtype(g.a.format).itemsize != 1:
        return None
    x, w = g.a.q, g.b.q
    if not isinstance(x, Tensor) or x.is_floating_point() or x.numel() == 0:
        return None
    if g.b.format.max > 127 or w.shape[1:].numel() * 255 * 128 >= 2**31:  # type: ignore[union-attr]
        return None
    w = _int8(g.b)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], con.padding, con.dilation, w.shape[2:], con.stride, strict=True)
    ]
    if w.shape[1] != x.shape[1] or min(size) < 1:
        return None  # the reference says what is wrong; oneDNN does not always
    found = _own_forward(g, con, x, w, size)
    if found is not None:
        return found
    zero = 0
    if x.dtype == torch.int8:
        x, zero = x.view(torch.uint8) ^ 128, 128
    geometry = (list(con.stride), list(con.padding), list(con.dilation), con.groups)
    packed = torch.ops.onednn.qconv_prepack(w, _ONE, 1.0, zero, *geometry, list(x.shape))
    y = torch.ops.onednn.qconv_pointwise(
        x, 1.0, zero, packed, _ONE, _ZERO, None, *geometry, 1.0, 0, torch.float32, "none", [], ""
    )
    return Raw(y)


def _own_forward(g: Gemm, con: Convolution, x: Tensor, w: Tensor, size: list[int]) -> Raw | None:
    """Unsigned activations; scaled, rounded and in 16-bit codes where the taker knows them."""
    num, in_channels, height, width = x.shape
    out_channels, _, *kernel = w.shape
    if x.dtype != torch.uint8 or con.dilation != (1, 1) or in_channels % 4 or out_channels % 16:
        return None
    if num < torch.get_num_threads():  # which share the images
        return None
    if any(p >= k for p, k in zip(con.padding, kernel, strict=True)):
        return None
    scale = 1.0 if g.scale is None else float(g.scale)
    halves = is_half(g.output) and math.isfinite(scale)
    y = Layout.channels_last((num, out_channels, *size)).empty(torch.int16 if halves else torch.float32, x.device)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    arguments = c.ConvFprop(
        x.data_ptr(),
        w.data_ptr(),
        y.data_ptr(),
        halves,
        scale if halves else 1.0,
        float_grid(g.output) if halves else c.FloatGrid(),
        *(num, height, width, in_channels, *size, out_channels, *kernel, *con.padding, *con.stride),
    )
    return Raw(y, rounded=halves) if kernels().conv_fprop(ctypes.byref(arguments)) else None


FEW_CHANNELS = 64
"""Up to here our own wgrad is at least as fast as oneDNN's (measured on Zen 4)."""


def _convolve_backward(g: Gemm, con: Convolution) -> Raw | None:
    """Our own convolution, with float32 results, or oneDNN's in bfloat16, which rounds its results to that."""
    found = _own_backward(g, con)
    if found is not None:
        return found
    if g.products != "fast" or not _has_bfloat16() or g.a.format is None or g.layout is None:
        return None
    if not carrier_dtype(g.a.format).itemsize <= 2 or g.a.q.shape.numel() == 0:
        return None
    if isinstance(g.a.q, Tensor) and g.a.q.dtype == torch.float32:
        return None
    gradient, other = g.a.to(torch.bfloat16), g.b.to(torch.bfloat16)
    like = Layout(*g.layout).empty(torch.bfloat16, gradient.device)
    multiply = con.dgrad if g.which == "dgrad" else con.wgrad
    return Raw(multiply(gradient, other, like), rounded=True)


def _own_backward(g: Gemm, con: Convolution) -> Raw | None:
    """Stride 1 and channels in sixteens: exact wherever it is asked for, and where it costs no time."""
    if con.stride != (1, 1) or con.dilation != (1, 1) or g.layout is None or not isinstance(g.a.q, Tensor):
        return None
    if g.b.format is None or g.b.format.max > 127:
        return None
    fast = g.products == "fast" and _has_bfloat16()
    if g.a.q.dtype != torch.bfloat16 or g.a.q.numel() == 0 or (fast and g.which == "dgrad"):
        return None
    other = g.b.q.shape
    x_shape, w_shape = (g.layout.shape, other) if g.which == "dgrad" else (other, g.layout.shape)
    num, in_channels, height, width = x_shape
    out_channels, _, *kernel = w_shape
    if in_channels % 16 or out_channels % 16 or (fast and max(in_channels, out_channels) > FEW_CHANNELS):
        return None
    if any(p >= k for p, k in zip(con.padding, kernel, strict=True)):
        return None
    gradient = g.a.q.contiguous(memory_format=torch.channels_last)
    operand = _int8(g.b).contiguous(memory_format=torch.channels_last)
    y = Layout.channels_last(g.layout.shape).empty(torch.float32, gradient.device)
    out_height, out_width = gradient.shape[2:]
    geometry = (num, height, width, in_channels, out_height, out_width, out_channels, *kernel, *con.padding)
    if g.which == "dgrad":
        arguments = c.ConvDgrad(
            gradient.data_ptr(), operand.data_ptr(), y.data_ptr(), c.CODES[torch.float32], *geometry
        )
        done = kernels().conv_dgrad(ctypes.byref(arguments))
    else:
        done = kernels().conv_wgrad(
            ctypes.byref(c.ConvWgrad(operand.data_ptr(), gradient.data_ptr(), y.data_ptr(), *geometry))
        )
    return Raw(y) if done else None


@backends.register("epilogue", "cpu")
def epilogue(raw: Raw, finish: Finish) -> tuple[Tensor, Tensor | None] | None:
    """Scale, round, mask, and sum what was clipped: one pass."""
    y, out_dtype = raw.y, finish.dtype
    if y.device.type != "cpu" or y.dtype not in c.CODES or out_dtype not in (torch.float32, torch.bfloat16):
        return None
    if finish.late is not None and finish.late.numel() != 1:
        return None
    integers = isinstance(finish.codes, Packed) and finish.codes.grid is None
    if finish.mask is not None and finish.codes is not None and not integers:
        return None
    grid = None
    if finish.output is not None and not raw.rounded:
        grid = float_grid(finish.output)
        if grid is None:
            return None
    if finish.layout is not None:
        y = finish.layout.match(y)
    elif not is_dense(y):
        y = y.contiguous()
    high = None if raw.high is None else (raw.high if finish.layout is None else finish.layout.match(raw.high))
    in_place = y.dtype == out_dtype
    out = y.view(out_dtype) if y.element_size() == out_dtype.itemsize else torch.empty_like(y, dtype=out_dtype)
    scale = raw.unit * (1.0 if finish.scale is None else float(finish.scale))
    if in_place and grid is None and finish.mask is None and high is None and scale == 1.0 and finish.late is None:
        return y, None
    codes = finish.codes if isinstance(finish.codes, Packed) and finish.mask is not None else None
    clipped = kernels().epilogue(
        ctypes.byref(
            c.Epilogue(
                y.data_ptr(),
                c.CODES[y.dtype],
                y.numel(),
                None if high is None else high.data_ptr(),
                scale,
                grid is not None,
                finish.keep_infinite,
                grid or c.FloatGrid(),
                1.0 if finish.late is None else float(finish.late),
                None if finish.mask is None else finish.mask.data_ptr(),
                None if codes is None else codes.data.data_ptr(),
                codes is not None and codes.signed,
                out.data_ptr(),
                c.CODES[out_dtype],
            )
        )
    )
    return out, torch.tensor(clipped, dtype=torch.float32) if codes is not None else None
