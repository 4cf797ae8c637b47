"""Convolutions in two dimensions: ours, oneDNN's, and 1x1 ones as products of matrices."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fourbit.kernels._check import CHANNELS_LAST, pointer
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._matrices import has_bfloat16, has_int8, int8, integers_of, multiply
from fourbit.kernels.cpu._quantize import float_grid, is_half, kernels
from fourbit.ops import Convolution, Gemm, Layout, Operand, Raw
from fourbit.quantizers import Packed, carrier_dtype


def pointwise(g: Gemm) -> Raw | None:
    """A 1x1 convolution as a product of matrices: channels_last makes its pixels the rows."""
    a = Operand(_channels_last_rows(g.a.q), g.a.scale, g.a.format)
    if g.which == "dgrad":
        w = int8(g.b).flatten(1)
        raw = multiply(a, w, g, lambda t: t)
        if raw is None:
            return None
        n, _, h, width = g.layout.shape  # type: ignore[union-attr]
        return raw._replace(
            y=_image(raw.y, n, h, width), high=None if raw.high is None else _image(raw.high, n, h, width)
        )
    x = _channels_last_rows(int8(g.b))
    raw = multiply(a, x, g, lambda t: t.t())
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


def convolve(g: Gemm, con: Convolution) -> Raw | None:
    """Ours, or oneDNN's int8 convolution: unsigned activations, or signed ones with a zero point; float32 out, sums exact."""
    if g.a.format is None or carrier_dtype(g.a.format).itemsize != 1 or not (has_int8() or kernels().has_products):
        return None
    x, w = g.a.q, g.b.q
    if not isinstance(x, Tensor) or x.is_floating_point() or x.numel() == 0:
        return None
    if x.dim() != 4 or len(w.shape) != 4 or min(con.stride) < 1 or min(con.padding) < 0:
        return None
    if g.b.format.max > 127 or w.shape[1:].numel() * 255 * 128 >= 2**31:  # type: ignore[union-attr]
        return None
    w = int8(g.b)
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], con.padding, con.dilation, w.shape[2:], con.stride, strict=True)
    ]
    if w.shape[1] != x.shape[1] or min(size) < 1:
        return None  # the reference says what is wrong; oneDNN does not always
    found = _own_forward(g, con, x, w, size)
    if found is not None or not has_int8():
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


def _geometry_fits(con: Convolution, kernel: Sequence[int]) -> bool:
    """Whether the loops of the library assume nothing else of stride, padding and kernel."""
    pairs = zip(con.padding, kernel, strict=True)
    if kernels().has_dot_product and any(p >= k for p, k in pairs):
        return False
    return min(con.stride) >= 1 and min(con.padding) >= 0


def _geometry(con: Convolution, x: Sequence[int], w: Sequence[int], out: Sequence[int]) -> dict[str, int]:
    """The fields of a structure that say how x [N, C, H, W] and w [O, C, Y, X] become images of size `out`."""
    num, in_channels, height, width = x
    out_channels, _, kernel_height, kernel_width = w
    return {
        "num": num,
        "height": height,
        "width": width,
        "in_channels": in_channels,
        "out_height": out[0],
        "out_width": out[1],
        "out_channels": out_channels,
        "kernel_height": kernel_height,
        "kernel_width": kernel_width,
        "pad_height": con.padding[0],
        "pad_width": con.padding[1],
        "stride_height": con.stride[0],
        "stride_width": con.stride[1],
    }


def _own_forward(g: Gemm, con: Convolution, x: Tensor, w: Tensor, size: list[int]) -> Raw | None:
    """Scaled, rounded and in 16-bit codes where the taker knows them. Where bfloat16 is multiplied: unsigned activations."""
    num, in_channels, *_ = x.shape
    out_channels, _, *kernel = w.shape
    of = integers_of(g.a.format, g.b.format, x.dtype)
    if of is None:
        if not kernels().has_dot_product or x.dtype != torch.uint8 or in_channels % 4 or out_channels % 16:
            return None
        if num < torch.get_num_threads():  # which share the images
            return None
    if con.dilation != (1, 1) or w.numel() == 0:
        return None
    if not _geometry_fits(con, kernel) or (g.scale is not None and g.scale.numel() != 1):
        return None
    scale = 1.0 if g.scale is None else float(g.scale)
    halves = is_half(g.output) and math.isfinite(scale)
    y = Layout.channels_last((num, out_channels, *size)).empty(torch.int16 if halves else torch.float32, x.device)
    x, w = (t.contiguous(memory_format=CHANNELS_LAST) for t in (x, w))
    arguments = c.ConvFprop(
        x=pointer(x, "x", x.dtype, x.numel(), CHANNELS_LAST),
        w=pointer(w, "w", torch.int8, w.numel(), CHANNELS_LAST),
        out=pointer(y, "out", y.dtype, num * out_channels * math.prod(size), CHANNELS_LAST),
        halves=halves,
        scale=scale if halves else 1.0,
        grid=float_grid(g.output) if halves else c.FloatGrid(),
        of=of or c.Integers(),
        **_geometry(con, x.shape, w.shape, size),
    )
    return Raw(y, rounded=halves) if kernels().conv_fprop(ctypes.byref(arguments)) else None


FEW_CHANNELS = 64
"""Up to here our own wgrad is at least as fast as oneDNN's (measured on Zen 4)."""


def convolve_backward(g: Gemm, con: Convolution) -> Raw | None:
    """Our own convolution, with float32 results, or oneDNN's in bfloat16, which rounds its results to that."""
    found = _own_backward(g, con)
    if found is not None:
        return found
    if g.products != "fast" or not has_bfloat16() or g.a.format is None or g.layout is None:
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
    fast = g.products == "fast" and has_bfloat16()
    if not kernels().has_dot_product or con.stride != (1, 1) or (fast and g.which == "dgrad"):
        return None
    if not isinstance(g.a.q, Tensor) or g.a.q.dtype != torch.bfloat16:
        return None
    channels = (*g.b.q.shape[:2], *g.layout.shape[:2]) if g.layout is not None else ()
    of_both = channels[1:3] if g.which == "wgrad" else channels[:1] + channels[3:]
    if any(n % 16 for n in of_both) or (fast and max(of_both, default=0) > FEW_CHANNELS):
        return None
    return _gradient(g, con, c.Integers())


def integer_gradient(g: Gemm, con: Convolution) -> Raw | None:
    """Where both operands are integers, in units of the gradient's smallest magnitude: any channels, any stride, exact."""
    if not isinstance(g.a.q, Tensor):
        return None
    of = integers_of(g.a.format, g.b.format, g.a.q.dtype)
    return None if of is None else _gradient(g, con, of)


def _gradient(g: Gemm, con: Convolution, of: Any) -> Raw | None:
    """A gradient by the library, which takes these operands and channels."""
    if con.dilation != (1, 1) or g.layout is None or g.b.format is None or g.b.format.max > 127:
        return None
    other = g.b.q.shape
    if len(other) != 4 or len(g.layout.shape) != 4 or not isinstance(g.a.q, Tensor):
        return None
    x_shape, w_shape = (g.layout.shape, other) if g.which == "dgrad" else (other, g.layout.shape)
    num, in_channels, *pixels = x_shape
    out_channels, _, *kernel = w_shape
    if not _geometry_fits(con, kernel) or w_shape[1] != in_channels:
        return None
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(pixels, con.padding, kernel, con.stride, strict=True)]
    shape = (num, out_channels, *size)
    if min(*shape, *x_shape) < 1 or tuple(g.a.q.shape) != shape:
        return None  # the reference says what is wrong
    gradient = g.a.q.contiguous(memory_format=CHANNELS_LAST)
    operand = int8(g.b).contiguous(memory_format=CHANNELS_LAST)
    y = Layout.channels_last(g.layout.shape).empty(torch.float32, gradient.device)
    geometry = _geometry(con, x_shape, w_shape, size)
    at = pointer(gradient, "g", gradient.dtype, gradient.numel(), CHANNELS_LAST)
    other_at = pointer(operand, "x or w", torch.int8, other.numel(), CHANNELS_LAST)
    out = pointer(y, "out", torch.float32, g.layout.shape.numel(), CHANNELS_LAST)
    if g.which == "dgrad":
        arguments = c.ConvDgrad(g=at, w=other_at, out=out, out_dtype=c.CODES[torch.float32], of=of, **geometry)
        done = kernels().conv_dgrad(ctypes.byref(arguments))
    else:
        done = kernels().conv_wgrad(ctypes.byref(c.ConvWgrad(x=other_at, g=at, dw=out, of=of, **geometry)))
    return Raw(y) if done else None
