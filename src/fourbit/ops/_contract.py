"""The one place where quantized products are computed and differentiated.

    forward     y  = out(x_fprop * w_fprop)
    backward    dx = out(g_dgrad * w_dgrad) / s     masked, and PACT's alpha gradient taken from what the mask removes
                dw = out(g_wgrad * x_wgrad) / s

`out` rounds to `spec.output`; s is GradScale's power of two, taken out after that rounding, as the hardware would. What a
4-bit operand leaves for backward is its packed codes, two to the byte, and one mask bit per element.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourbit.ops._contraction import Contraction
from fourbit.ops._product import Gemm, Layout, Operand, product
from fourbit.ops._spec import REUSE, LayerSpec
from fourbit.ops._state import LayerState, along
from fourbit.quantizers import Packed, Quantized, QuantSpec


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
        x, w = contraction.prepare(x.detach(), "x"), contraction.prepare(w.detach(), "w")
        x_axis = _axis(contraction, "x", spec, "x_fprop", "x_wgrad")
        w_axis = _axis(contraction, "w", spec, "w_fprop", "w_dgrad")
        x_fprop, x_saved, x_mask = _forward_operand("x_fprop", x, spec.x_fprop, state, x_axis)
        w_fprop, w_saved, w_mask = _forward_operand("w_fprop", w, spec.w_fprop, state, w_axis)
        gemm = Gemm("fprop", contraction, x_fprop, w_fprop, None, compute, state.products)
        y, _ = product(gemm, spec.output, dtype)
        x_codes, w_codes = x_saved, w_saved
        if spec.x_wgrad is not REUSE:
            _, x_saved, _ = _forward_operand("x_wgrad", x, spec.x_wgrad, state, x_axis)
        if spec.w_dgrad is not REUSE:
            _, w_saved, _ = _forward_operand("w_dgrad", w, spec.w_dgrad, state, w_axis)
        saved = [x_saved, w_saved, x_codes if x_alpha is not None else None, w_codes if w_alpha is not None else None]
        ctx.save_for_backward(*(t for kept in saved for t in _tensors(kept)), x_mask, w_mask)
        ctx.kept = [_outline(kept) for kept in saved]
        ctx.layouts = Layout.of(x), Layout.of(w)
        ctx.contraction, ctx.spec, ctx.state, ctx.compute = contraction, spec, state, compute
        ctx.dtypes = (x.dtype, w.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        spec, state, contraction = ctx.spec, ctx.state, ctx.contraction
        *data, x_mask, w_mask = ctx.saved_tensors
        x, w, x_codes, w_codes = (_restore(outline, data[2 * i : 2 * i + 2]) for i, outline in enumerate(ctx.kept))
        assert x is not None and w is not None
        need_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        need_w = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        dx = dw = dx_alpha = dw_alpha = None
        with torch.autocast(grads[0].device.type, enabled=False):
            g = contraction.prepare(grads[0], "g")
            axis = contraction.channel_axis("g") if spec.g_scaling or _per_channel(spec) else 0
            g_dgrad, g_wgrad = state.gradients(g, axis, need_x, need_w)
            if spec.g_wgrad is REUSE:
                g_wgrad = g_dgrad
            for slot, needed, found in (("g_dgrad", need_x, g_dgrad), ("g_wgrad", need_w, g_wgrad)):
                if needed and found is None:
                    state.count_nonfinite(slot, g)
            if need_x:
                a, late = _gradient(g, g_dgrad, spec.resolved("g_dgrad"))
                gemm = Gemm("dgrad", contraction, a, w, ctx.layouts[0], ctx.compute, state.products)
                dx, dx_alpha = product(gemm, spec.output, ctx.dtypes[0], late, x_mask, _codes(x_codes))
            if need_w:
                after = (_axis(contraction, "w", spec, "g_wgrad"), len(ctx.layouts[1].shape))
                a, late = _gradient(g, g_wgrad, spec.resolved("g_wgrad"), after)
                gemm = Gemm("wgrad", contraction, a, x, ctx.layouts[1], ctx.compute, state.products)
                dw, dw_alpha = product(gemm, spec.output, ctx.dtypes[1], late, w_mask, _codes(w_codes))
        needs = ctx.needs_input_grad
        return dx if needs[0] else None, dw if needs[1] else None, dx_alpha, dw_alpha, None, None, None, None


def _per_channel(spec: LayerSpec) -> bool:
    return any(s and s.granularity == "channel" for s in map(spec.resolved, ("g_dgrad", "g_wgrad")))


def _axis(contraction: Contraction, operand: str, spec: LayerSpec, *slots: str) -> int:
    """The channel axis of an operand if any of `slots` has scales per channel (some layers have no such axis), else 0."""
    channel = any(s and s.granularity == "channel" for s in map(spec.resolved, slots))
    return contraction.channel_axis(operand) if channel else 0


def _forward_operand(
    slot: str, t: Tensor, spec: QuantSpec | None, state: LayerState, axis: int
) -> tuple[Operand, Operand, Tensor | None]:
    """The operand for a product, as it is saved for backward, and the mask where clipping needs one."""
    if spec is None:
        state.count_nonfinite(slot, t)
        return Operand(t), Operand(t), None
    (q, scale, format), _, packed, mask = state.quantize(slot, t, spec, axis, save=True)
    if scale.numel() > 1:
        q, packed = q.to(torch.float32) * scale, None
        operand = Operand(q, None, format)
    else:
        operand = Operand(q, scale.view(()), format, spec.samples == 1)
    return operand, operand if packed is None else operand._replace(q=packed), mask


def _tensors(kept: Operand | None) -> tuple[Tensor | None, Tensor | None]:
    if kept is None:
        return None, None
    return (kept.q.data if isinstance(kept.q, Packed) else kept.q), kept.scale


def _outline(kept: Operand | None) -> Operand | None:
    """What is left of a saved operand without its tensors."""
    if kept is None:
        return None
    return kept._replace(q=replace(kept.q, data=_NOTHING) if isinstance(kept.q, Packed) else _NOTHING, scale=None)


_NOTHING = torch.empty(0)


def _restore(outline: Operand | None, tensors: Sequence[Tensor]) -> Operand | None:
    if outline is None:
        return None
    q = replace(outline.q, data=tensors[0]) if isinstance(outline.q, Packed) else tensors[0]
    return outline._replace(q=q, scale=tensors[1])


def _codes(kept: Operand | None) -> Packed | Tensor | None:
    return None if kept is None else kept.q


def _gradient(
    g: Tensor, quantized: Quantized | None, spec: QuantSpec | None, after: tuple[int, int] | None = None
) -> tuple[Operand, Tensor | None]:
    """The gradient operand, and the scale to be taken out after the product was rounded.

    Scales per channel come out as they are where the product keeps the channels (`after`: their axis in the result, and its
    number of dimensions). Where it sums over them, what the channels differ by goes in before, and the largest comes out.
    """
    if quantized is None:
        return Operand(g), None
    q, scale, format = quantized.tensor
    on_grid = spec is not None and spec.samples == 1
    if scale.numel() == 1:
        scale = scale.view(())
    elif after is not None:
        scale = along(scale.flatten(), *after)
    else:
        largest = scale.max()
        q, scale, on_grid = q.to(torch.float32) * (scale / largest), largest, False
    return Operand(q, None, format, on_grid), scale
