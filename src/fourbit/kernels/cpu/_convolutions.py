"""Convolutions in two dimensions: ours, oneDNN's, and 1x1 ones as products of matrices."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fourbit.backends import Plan, Reusable
from fourbit.kernels._check import CHANNELS_LAST, fresh, pointer, require
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._matrices import (
    Matrix,
    by_matrices,
    bytes_of,
    has_bfloat16,
    has_int8,
    int8,
    integers_of,
)
from fourbit.kernels.cpu._quantize import float_grid, is_half, kernels
from fourbit.ops import Convolution, Gemm, Layout, Raw, reference_product
from fourbit.quantizers import carrier_dtype


def _pointwise(g: Gemm, con: Convolution) -> Plan[Raw]:
    """A 1x1 convolution as a product of matrices: channels_last makes its pixels the rows."""
    a, b, layout = g.a.q, g.b.q, g.layout
    assert layout is not None and isinstance(a, Tensor)
    kernel = layout.shape[2:] if g.which == "wgrad" else b.shape[2:]
    if con.stride != (1, 1) or con.padding != (0, 0) or tuple(kernel) != (1, 1):
        return "the convolution is not 1x1, with stride 1 and no padding"
    if g.which == "dgrad":
        if layout.shape[2:] != a.shape[2:]:
            return "the images have another size"
        n, _, height, width = layout.shape
        return by_matrices(g, _pixels, lambda y: y.view(n, height, width, -1).permute(0, 3, 1, 2))
    shape = layout.shape
    return by_matrices(g, _pixels, lambda y: y.view(shape))


def _pixels(g: Gemm) -> tuple[Matrix, Matrix]:
    """The operands of a 1x1 convolution's gradients."""
    a, other = g.a.q, g.b
    assert isinstance(a, Tensor)
    left = Matrix((a.numel() // max(1, a.shape[1]), a.shape[1]), lambda: _channels_last_rows(a))
    b = other.q.shape
    if g.which == "dgrad":
        return left, Matrix((b[0], b[1:].numel()), lambda: int8(other).flatten(1))
    return left, Matrix((b.numel() // max(1, b[1]), b[1]), lambda: _channels_last_rows(int8(other)))


def _channels_last_rows(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


_ONE, _ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int64)


def convolve(g: Gemm, con: Convolution) -> Plan[Raw]:
    """Ours, or oneDNN's int8 convolution: unsigned activations, or signed ones with a zero point; float32 out, sums exact."""
    x, w = g.a.q, g.b.q
    assert g.a.format is not None and g.b.format is not None
    if carrier_dtype(g.a.format).itemsize != 1 or g.b.format.max > 127:
        return f"{g.a.format.name} or {g.b.format.name} does not fit 8 bits"
    if not (has_int8() or kernels().has_products):
        return "no int8 convolution is faster than float32 on this processor"
    if not isinstance(x, Tensor) or x.is_floating_point() or x.numel() == 0:
        return "the input is not 8-bit integers, or is empty"
    if x.dim() != 4 or len(w.shape) != 4 or min(con.stride) < 1 or min(con.padding) < 0:
        return "the sizes do not go together"
    if w.shape[1:].numel() * 255 * 128 >= 2**31:
        return "the sums of this size do not fit 32 bits"
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(x.shape[2:], con.padding, con.dilation, w.shape[2:], con.stride, strict=True)
    ]
    if w.shape[1] != x.shape[1] or min(size) < 1:
        return "the sizes do not go together"  # the reference says what is wrong; oneDNN does not always
    own = _own_forward(g, con, x, size)
    return own if not isinstance(own, str) or not has_int8() else Reusable(lambda g: _onednn_forward(g, con))


def _onednn_forward(g: Gemm, con: Convolution) -> Raw:
    x, zero = g.a.q, 0
    assert isinstance(x, Tensor)
    if x.dtype == torch.int8:
        x, zero = x.view(torch.uint8) ^ 128, 128
    geometry = (list(con.stride), list(con.padding), list(con.dilation), con.groups)
    packed = torch.ops.onednn.qconv_prepack(int8(g.b), _ONE, 1.0, zero, *geometry, list(x.shape))
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


def _own_forward(g: Gemm, con: Convolution, x: Tensor, size: list[int]) -> Plan[Raw]:
    """Scaled, rounded and in 16-bit codes where the taker knows them."""
    num = x.shape[0]
    out_channels, _, *kernel = g.b.q.shape
    of = bytes_of(g.a.format, g.b.format, x.dtype)
    if of is None:
        return f"{kernels().isa} has no convolution of these formats"
    if con.dilation != (1, 1) or g.b.q.shape.numel() == 0 or not _geometry_fits(con, kernel):
        return "the convolution is dilated, empty or padded by more than its kernel"
    if g.scale is not None and g.scale.numel() != 1:
        return "parts of an operand have scales"
    into, takes_codes = Layout.channels_last((num, out_channels, *size)), is_half(g.output)
    grid = float_grid(g.output) if takes_codes and g.output is not None else c.FloatGrid()
    known = c.ConvFprop(of=of, grid=grid, scale=1.0, **_geometry(con, x.shape, g.b.q.shape, size))
    dtype, num_x, num_w = x.dtype, x.numel(), g.b.q.shape.numel()

    def run(g: Gemm) -> Raw:
        scale = 1.0 if g.scale is None else float(g.scale)
        halves = takes_codes and math.isfinite(scale)
        y = torch.empty_strided(*into, dtype=torch.int16 if halves else torch.float32)
        x = g.a.q.contiguous(memory_format=CHANNELS_LAST)  # type: ignore[union-attr]
        w = int8(g.b).contiguous(memory_format=CHANNELS_LAST)
        arguments = c.ConvFprop.from_buffer_copy(known)
        arguments.x = pointer(x, "x", dtype, num_x, CHANNELS_LAST)
        arguments.w = pointer(w, "w", torch.int8, num_w, CHANNELS_LAST)
        arguments.out = fresh(y)
        if halves:
            arguments.halves, arguments.scale = True, scale
        require(bool(kernels().conv_fprop(ctypes.byref(arguments))), "an instruction set with convolutions")
        return Raw(y, rounded=halves)

    return Reusable(run)


FEW_CHANNELS = 64
"""Up to here our own wgrad is at least as fast as oneDNN's (measured on Zen 4)."""


def convolve_backward(g: Gemm, con: Convolution) -> Plan[Raw]:
    """Ours, of integers; a 1x1 convolution as a product of matrices; ours, of bfloat16; or oneDNN's, rounded to bfloat16."""
    if g.layout is None or not isinstance(g.a.q, Tensor):
        return "the gradient is no tensor"
    if not len(g.layout.shape) == len(g.b.q.shape) == g.a.q.dim() == 4:
        return _onednn_backward(g, con)
    found: Plan[Raw] = ""
    first = (_integer_gradient, _pointwise)  # with AVX512-BF16, torch's product of int8 matrices is the faster for 1x1
    for plan in (*(first[::-1] if kernels().has_dot_product else first), _own_backward, _onednn_backward):
        found = plan(g, con)
        if not isinstance(found, str):
            break
    return found


def _onednn_backward(g: Gemm, con: Convolution) -> Plan[Raw]:
    assert g.layout is not None and g.a.format is not None
    if g.products != "fast" or not has_bfloat16():
        return "no kernel computes this gradient exactly, and oneDNN's rounds to bfloat16, or is not fast here"
    if carrier_dtype(g.a.format).itemsize > 2 or g.a.q.shape.numel() == 0:
        return f"{g.a.format.name} does not fit bfloat16, or the gradient is empty"
    if isinstance(g.a.q, Tensor) and g.a.q.dtype == torch.float32:
        return "the gradient was averaged, or multiplied by scales of its parts"
    return Reusable(lambda g: _run_onednn_backward(g, con))


def _run_onednn_backward(g: Gemm, con: Convolution) -> Raw:
    assert g.layout is not None
    gradient, other = g.a.to(torch.bfloat16), g.b.to(torch.bfloat16)
    like = g.layout.empty(torch.bfloat16, gradient.device)
    multiply = con.dgrad if g.which == "dgrad" else con.wgrad
    return Raw(multiply(gradient, other, like), rounded=True)


def _own_backward(g: Gemm, con: Convolution) -> Plan[Raw]:
    """Stride 1 and channels in sixteens: exact wherever it is asked for, and where it costs no time."""
    assert g.layout is not None and isinstance(g.a.q, Tensor)
    fast = g.products == "fast" and has_bfloat16()
    if not kernels().has_dot_product or con.stride != (1, 1) or (fast and g.which == "dgrad"):
        return "bfloat16 is not multiplied, the stride is not 1, or oneDNN is faster"
    if g.a.q.dtype != torch.bfloat16:
        return "the gradient is not bfloat16"
    channels = (*g.b.q.shape[:2], *g.layout.shape[:2])
    of_both = channels[1:3] if g.which == "wgrad" else channels[:1] + channels[3:]
    if any(n % 16 for n in of_both) or (fast and max(of_both, default=0) > FEW_CHANNELS):
        return "the channels are not in sixteens, or so many that oneDNN is faster"
    return _gradient(g, con, c.Integers())


def _integer_gradient(g: Gemm, con: Convolution) -> Plan[Raw]:
    """Where both operands are integers, in units of the gradient's smallest magnitude: any channels, any stride, exact."""
    assert isinstance(g.a.q, Tensor)
    dtype = g.a.q.dtype
    of = bytes_of(g.a.format, g.b.format, dtype) or integers_of(g.a.format, g.b.format, dtype)
    return f"{kernels().isa} has no convolution of these formats" if of is None else _gradient(g, con, of)


def _gradient(g: Gemm, con: Convolution, of: Any) -> Plan[Raw]:
    """A gradient by the library, which takes these operands and channels."""
    assert g.layout is not None and g.b.format is not None and isinstance(g.a.q, Tensor)
    if con.dilation != (1, 1) or g.b.format.max > 127:
        return f"the convolution is dilated, or {g.b.format.name} does not fit int8"
    x_shape, w_shape = (g.layout.shape, g.b.q.shape) if g.which == "dgrad" else (g.b.q.shape, g.layout.shape)
    num, in_channels, *pixels = x_shape
    out_channels, _, *kernel = w_shape
    if not _geometry_fits(con, kernel) or w_shape[1] != in_channels:
        return "the sizes do not go together, or padding is more than the kernel"
    size = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(pixels, con.padding, kernel, con.stride, strict=True)]
    shape = (num, out_channels, *size)
    if min(*shape, *x_shape) < 1 or tuple(g.a.q.shape) != shape:
        return "the sizes do not go together"  # the reference says what is wrong
    into, is_dgrad = Layout.channels_last(g.layout.shape), g.which == "dgrad"
    dtype, num_g, num_other = g.a.q.dtype, g.a.q.numel(), g.b.q.shape.numel()
    structure = c.ConvDgrad if is_dgrad else c.ConvWgrad
    known: Any = structure(of=of, **_geometry(con, x_shape, w_shape, size))
    if is_dgrad:
        known.out_dtype = c.CODES[torch.float32]

    def run(g: Gemm) -> Raw:
        gradient = g.a.q.contiguous(memory_format=CHANNELS_LAST)  # type: ignore[union-attr]
        operand = int8(g.b).contiguous(memory_format=CHANNELS_LAST)
        y = torch.empty_strided(*into, dtype=torch.float32)
        arguments: Any = structure.from_buffer_copy(known)
        arguments.g = pointer(gradient, "g", dtype, num_g, CHANNELS_LAST)
        at = pointer(operand, "x or w", torch.int8, num_other, CHANNELS_LAST)
        if is_dgrad:
            arguments.w, arguments.out = at, fresh(y)
            done = kernels().conv_dgrad(ctypes.byref(arguments))
        else:
            arguments.x, arguments.dw = at, fresh(y)
            done = kernels().conv_wgrad(ctypes.byref(arguments))
        if done:
            return Raw(y)
        declined = _onednn_backward(g, con)  # the sums of more terms than any network has do not fit 32 bits
        return Raw(reference_product(g)) if isinstance(declined, str) else _run_onednn_backward(g, con)

    return Reusable(run)
