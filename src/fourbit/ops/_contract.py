"""The one place where quantized products are computed and differentiated.

    forward     y  = out(x_fprop * w_fprop)
    backward    dx = out(g_dgrad * w_dgrad) / s     masked, and PACT's alpha gradient taken from what the mask removes
                dw = out(g_wgrad * x_wgrad) / s

`out` rounds to `spec.output`; s is GradScale's power of two, taken out after that rounding, as the hardware would. The
operands enter the products as grid values with their scales factored out, so that a product of two 4-bit operands is
exact, and so is a sum of them while it fits the 24 bits of float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourbit.formats import Format
from fourbit.ops._contraction import Contraction
from fourbit.ops._spec import REUSE, LayerSpec
from fourbit.ops._state import LayerState, along
from fourbit.quantizers import TINY, QuantSpec, Sawb, round_to_format

Operand = tuple[Tensor, Tensor | None]
"""Numbers, and a 0-d scale still to be multiplied (None: 1)."""


def contract(x: Tensor, w: Tensor, contraction: Contraction, spec: LayerSpec, state: LayerState) -> Tensor:
    """y = x * w under `spec`, differentiable in x, w and the clip values.

    Args:
        x, w: operands of `contraction`, any floating dtypes. The products are computed in float32 (float64 if x is).
        state: the layer's memory; it is updated in training mode.

    Returns:
        y in the dtype of x, or autocast's where autocast is on.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        state.begin()
        return _Contract.apply(x, w, state.x_alpha, state.w_alpha, contraction, spec, state, dtype)


class _Contract(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        x_alpha: Tensor | None,
        w_alpha: Tensor | None,
        contraction: Contraction,
        spec: LayerSpec,
        state: LayerState,
        dtype: torch.dtype,
    ) -> Tensor:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        x_axis = _axis(contraction, "x", spec, "x_fprop", "x_wgrad")
        w_axis = _axis(contraction, "w", spec, "w_fprop", "w_dgrad")
        x_fprop, x_mask = _forward_operand("x_fprop", x, spec.x_fprop, state, x_axis, compute)
        w_fprop, w_mask = _forward_operand("w_fprop", w, spec.w_fprop, state, w_axis, compute)
        y = _product(contraction.fprop, x_fprop, w_fprop, spec.output)
        x_wgrad, w_dgrad = x_fprop, w_fprop
        if spec.x_wgrad is not REUSE:
            x_wgrad, _ = _forward_operand("x_wgrad", x, spec.x_wgrad, state, x_axis, compute)
        if spec.w_dgrad is not REUSE:
            w_dgrad, _ = _forward_operand("w_dgrad", w, spec.w_dgrad, state, w_axis, compute)
        ctx.save_for_backward(*x_wgrad, *w_dgrad, x_mask, w_mask, *_signs(x_fprop, w_fprop, x_alpha, w_alpha))
        ctx.contraction, ctx.spec, ctx.state, ctx.compute = contraction, spec, state, compute
        ctx.dtypes = (x.dtype, w.dtype)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        spec, state, contraction = ctx.spec, ctx.state, ctx.contraction
        x, x_scale, w, w_scale, x_mask, w_mask, x_sign, w_sign = ctx.saved_tensors
        need_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        need_w = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        dx = dw = dx_alpha = dw_alpha = None
        with torch.autocast(x.device.type, enabled=False):
            g = grads[0].to(ctx.compute)
            axis = contraction.channel_axis("g")
            exponent = state.see_gradient(g, axis)
            reuse = spec.g_wgrad is REUSE
            g_dgrad = _gradient("g_dgrad", g, spec.g_dgrad, state, axis, exponent) if need_x or reuse else None
            if need_x and g_dgrad is not None:
                dx = _product(
                    lambda a, b: contraction.dgrad(a, b, x), g_dgrad[0], (w, w_scale), spec.output, g_dgrad[1]
                )
                dx, dx_alpha = _straight_through(dx, x_mask, x_sign)
                dx = dx.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
            if need_w:
                g_wgrad = g_dgrad
                if not reuse:
                    late = (_axis(contraction, "w", spec, "g_wgrad"), w.dim())
                    g_wgrad = _gradient("g_wgrad", g, spec.g_wgrad, state, axis, exponent, late)
                assert g_wgrad is not None
                dw = _product(
                    lambda a, b: contraction.wgrad(a, b, w), g_wgrad[0], (x, x_scale), spec.output, g_wgrad[1]
                )
                dw, dw_alpha = _straight_through(dw, w_mask, w_sign)
                dw = dw.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
        return dx, dw, dx_alpha, dw_alpha, None, None, None, None


def _axis(contraction: Contraction, operand: str, spec: LayerSpec, *slots: str) -> int:
    """The channel axis of an operand if any of `slots` has scales per channel (some layers have no such axis), else 0."""
    channel = any(s and s.granularity == "channel" for s in map(spec.resolved, slots))
    return contraction.channel_axis(operand) if channel else 0


def _forward_operand(
    slot: str, t: Tensor, spec: QuantSpec | None, state: LayerState, axis: int, dtype: torch.dtype
) -> tuple[Operand, Tensor | None]:
    """The operand for a product, and the mask (True: the straight-through gradient passes) where clipping needs one."""
    if spec is None:
        state.count_nonfinite(slot, t)
        return (t.detach().to(dtype), None), None
    quantized, alpha = state.quantize(slot, t, spec, axis)
    mask = None
    if alpha is not None:
        t, alpha = t.to(torch.float32), alpha.detach().clamp_min(TINY)
        mask = (t < alpha) & (t > -alpha if quantized.format.signed else t >= 0)
    elif isinstance(spec.scaling, Sawb) and spec.scaling.clipped:
        mask = t.abs() <= quantized.scale * quantized.format.max
    if quantized.scale.numel() > 1:
        return (quantized.dequantize().to(dtype), None), mask
    return (quantized.q.to(dtype), quantized.scale.view(())), mask


def _gradient(
    slot: str,
    g: Tensor,
    spec: QuantSpec | None,
    state: LayerState,
    axis: int,
    exponent: Tensor | None,
    late: tuple[int, int] | None = None,
) -> tuple[Operand, Tensor | None]:
    """The gradient operand, and the scale to be taken out after the product was rounded.

    Scales per channel come out as they are where the product keeps the channels (`late`: their axis in the result, and its
    number of dimensions). Where it sums over them, what the channels differ by goes in before, and the largest comes out.
    """
    if spec is None:
        state.count_nonfinite(slot, g)
        return (g, None), None
    quantized, _ = state.quantize(slot, g, spec, axis, exponent)
    q, scale = quantized.q, quantized.scale
    if scale.numel() == 1:
        scale = scale.view(())
    elif late is not None:
        scale = along(scale.flatten(), *late)
    else:
        largest = scale.max()
        q, scale = q * (scale / largest), largest
    return (q.to(g.dtype), None), scale


def _product(
    product: Callable[[Tensor, Tensor], Tensor],
    a: Operand,
    b: Operand,
    output: Format | None,
    late: Tensor | None = None,
) -> Tensor:
    """late * out(scale_a scale_b (a * b))."""
    y = product(a[0], b[0])
    scale = a[1] if b[1] is None else b[1] if a[1] is None else a[1] * b[1]
    if scale is not None:
        y = y.mul_(scale)
    if output is not None:
        rounded = round_to_format(y, output).to(y.dtype)
        # NaN in a scale passes through; infinity in an operand in full precision must not be saturated away.
        y = rounded if a[1] is not None and b[1] is not None else torch.where(y.isfinite(), rounded, y)
    return y if late is None else y.mul_(late)


def _signs(
    x: Operand, w: Operand, x_alpha: Tensor | None, w_alpha: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What the clip values' gradients need: the sign of each clipped number is the sign of its code."""
    return (x[0] if x_alpha is not None else None), (w[0] if w_alpha is not None else None)


def _straight_through(d: Tensor, mask: Tensor | None, q: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradient inside the clip range, and d(clip value) = sum over what was clipped of sign(q) * gradient.

    sign(q) is that of the clip value that a number was clipped to, and 0 for numbers below an unsigned range.
    """
    if mask is None:
        return d, None
    inside = d.masked_fill(mask.logical_not(), 0.0)
    if q is None:
        return inside, None
    return inside, d.sub_(inside).mul_(q.sign()).sum(dtype=torch.float32)
