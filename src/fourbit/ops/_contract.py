"""The one place where quantized products are computed and differentiated.

    forward     y  = out(x_fprop * w_fprop)
    backward    dx = out(g_dgrad * w_dgrad) / s     masked, and PACT's alpha gradient taken from what the mask removes
                dw = out(g_wgrad * x_wgrad) / s

`out` rounds to `spec.output`; s is GradScale's power of two, taken out after that rounding, as the hardware would. What a
4-bit operand leaves for backward is its packed codes, two to the byte, and one mask bit per element.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.errors import UserError
from fourbit.ops._contraction import Contraction
from fourbit.ops._handover import OperandHandover, ResultHandover
from fourbit.ops._node import Node
from fourbit.ops._pending import Pending, numbers_of, settle_all
from fourbit.ops._product import Finish, Gemm, Layout, Operand, Raw, finish, multiply, product
from fourbit.ops._restore import restored
from fourbit.ops._second import differentiable_dgrad, refuse_forward_mode, refuse_transforms, refused
from fourbit.ops._spec import REUSE, LayerSpec
from fourbit.ops._state import LayerState, along
from fourbit.ops._stored import is_shard
from fourbit.ops._watch import computing
from fourbit.quantizers import Packed, Quantized, QuantSpec


def contract(
    x: Tensor,
    w: Tensor,
    contraction: Contraction,
    spec: LayerSpec,
    state: LayerState,
    over: OperandHandover | None = None,
    result: ResultHandover | None = None,
) -> Tensor:
    """y = x * w under `spec`, differentiable in x, w and the clip values.

    Args:
        x, w: operands of `contraction`, any floating dtypes. The products are computed in float32 (float64 if x is).
        state: the layer's memory; it is updated in training mode.
        over: x, quantized by the node before.
        result: takes the product for a node that finishes it.

    Returns:
        y in the dtype of x, or autocast's where autocast is on; with `result`, the Pending tensor that stands for y.

    Raises:
        UserError: a tensor on the meta device.
    """
    if over is None:
        settle_all((x, w), "a layer")
    if w.is_meta or (over is None and x.is_meta):
        raise UserError("a tensor on the meta device has no numbers to quantize: move layer and input to a real device")
    device = w.device.type
    if over is not None:
        dtype, num_elements, x_alpha = torch.float32, over.layout.shape.numel(), None
    else:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        num_elements, x_alpha = x.numel(), state.x_alpha
    state.with_gradients = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        from fourbit.ops._compiled import compiled_contract

        assert over is None and result is None
        return compiled_contract(x, w, x_alpha, state.w_alpha, contraction, state, dtype)
    refuse_transforms()
    if is_shard(w):
        raise UserError(
            "the weight of a quantized layer is a DTensor, of which this process has a part: call the module that fully_shard "
            "was applied to, which gathers it"
        )
    with full_precision(device), computing(state, num_elements):
        return _Contract.apply(x, w, x_alpha, state.w_alpha, (contraction, spec, state, dtype, over, result))


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Without autocast; where there is none, nothing costs nothing."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


@dataclass(frozen=True)
class Weight:
    """A weight, quantized once for any number of products: for fprop, as kept for dgrad, the codes of fprop, and its mask."""

    fprop: Operand
    saved: Operand
    codes: Operand
    mask: Tensor | None
    layout: Layout


@dataclass
class Saved:
    """What a forward pass leaves for backward. `x` and `w` enter wgrad and dgrad; `x_codes` and `w_codes` are those of fprop,
    where a clip value is learned; the masks are of the straight-through gradients."""

    x: Operand
    w: Operand
    x_codes: Operand | None
    w_codes: Operand | None
    x_mask: Tensor | None
    w_mask: Tensor | None
    x_layout: Layout
    w_layout: Layout


class _Contract(Node):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        x_alpha: Tensor | None,
        w_alpha: Tensor | None,
        call: tuple[Contraction, LayerSpec, LayerState, torch.dtype, OperandHandover | None, ResultHandover | None],
    ) -> Tensor:
        contraction, spec, state, dtype, over, result = call
        if result is not None:
            result.needs = needs_of(ctx.needs_input_grad)
        y, saved = run_forward(
            numbers_of(x),
            numbers_of(w),
            contraction,
            spec,
            state,
            dtype,
            (x_alpha is not None, w_alpha is not None),
            over,
            result,
        )
        tensors, ctx.outline = flatten(saved)
        ctx.save_for_backward(*tensors)
        ctx.contraction, ctx.spec, ctx.state = contraction, spec, state
        ctx.over, ctx.result = over, result
        ctx.dtypes = (torch.float32 if over is not None else x.dtype, w.dtype)
        ctx.weight = weakref.ref(w)  # saved, it would count as memory and forbid changes
        ctx.set_materialize_grads(False)
        return y

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        g, result, quantized, amax = grads[0], ctx.result, None, None
        if g is None and result is not None:
            (g, amax), quantized = result.g.take() or (None, None), result.quantized.take()
        if g is None and quantized is None:
            return (None,) * 5
        if not torch.is_grad_enabled():
            return (*_backward(ctx, g, quantized, amax=amax), None)
        rounded: list[Tensor] = []
        with torch.no_grad():
            dx, *others = _backward(ctx, g, quantized, rounded, amax)
        if ctx.over is not None or ctx.result is not None:
            what, remedy = "a gradient of a fused chain", "convert with fuse=False"
            return (*(refused(t, what, remedy) for t in (dx, *others)), None)
        if dx is not None and g is not None:
            saved = unflatten(ctx.outline, ctx.saved_tensors)
            w = _numbers(saved.w, rounded[0].dtype, saved.w_layout)
            masks = saved.x_mask, saved.w_mask
            weight, pair = ctx.weight(), (rounded[0], w)
            dx = differentiable_dgrad(dx, g, weight, ctx.state.w_alpha, ctx.contraction, pair, masks)
        what = "the gradient of a quantized layer's weight or clip value"
        remedy = "take the penalty from gradients of inputs only, or call restore(model) first"
        return (dx, *(refused(t, what, remedy) for t in others), None)


def _backward(
    ctx: Any,
    g: Tensor | None,
    quantized: tuple[Quantized | None, Quantized | None] | None,
    rounded: list[Tensor] | None = None,
    amax: float | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dw and the gradients of the clip values; see `run_backward`."""
    saved, needs = unflatten(ctx.outline, ctx.saved_tensors), ctx.needs_input_grad
    with full_precision(saved.x.device.type):
        dx, dw, dx_alpha, dw_alpha = run_backward(
            g,
            saved,
            ctx.contraction,
            ctx.spec,
            ctx.state,
            ctx.dtypes,
            needs_of(needs),
            ctx.over,
            quantized,
            rounded,
            amax,
        )
    return dx if needs[0] else None, dw if needs[1] else None, clip_gradient(dx_alpha), clip_gradient(dw_alpha)


def _numbers(kept: Operand, dtype: torch.dtype, layout: Layout) -> Tensor:
    """An operand in full precision, in its layout."""
    numbers = kept.to(dtype)
    return layout.match(numbers if kept.scale is None else numbers * kept.scale)


def clip_gradient(total: Tensor | None) -> Tensor | None:
    """The gradient of a clip value, in its shape [1]."""
    return None if total is None else total.view(1)


def needs_of(needs: Sequence[bool]) -> tuple[bool, bool]:
    """Whether dgrad and wgrad are needed, from which of x, w and the clip values need a gradient."""
    return needs[0] or needs[2], needs[1] or needs[3]


def run_forward(
    x: Tensor,
    w: Tensor | Weight,
    contraction: Contraction,
    spec: LayerSpec,
    state: LayerState,
    dtype: torch.dtype,
    learned: tuple[bool, bool] = (False, False),
    over: OperandHandover | None = None,
    result: ResultHandover | None = None,
) -> tuple[Tensor, Saved]:
    """y, and what backward needs.

    Args:
        w: the weight itself, or quantized already; then the caller has begun the state's forward pass.
        learned: whether the clip values of x and w are to get gradients.
    """
    if isinstance(w, Tensor):
        state.begin(keeps_positive=over is None)
    compute = torch.float64 if over is None and x.dtype == torch.float64 else torch.float32
    x_axis = _axis(contraction, "x", spec, "x_fprop", "x_wgrad")
    if over is None:
        x = contraction.prepare(x.detach(), "x")
        x_fprop, x_saved, x_mask = _forward_operand("x_fprop", x, spec.x_fprop, state, x_axis)
    else:
        quantized = over.take()
        x_fprop, x_saved, x_mask = *_kept(quantized, spec.x_fprop), quantized.mask
    weight = quantize_weight(w, contraction, spec, state) if isinstance(w, Tensor) else w
    sums = (spec.accumulation, state.sum_key("fprop"))
    takes_codes = result is not None and x_fprop.format is not None and weight.fprop.format is not None
    output = spec.output if takes_codes else None
    gemm = Gemm("fprop", contraction, x_fprop, weight.fprop, None, compute, state.products, *sums, output)
    if result is None:
        y, _ = product(gemm, spec.output, dtype)
    else:
        y = _hand_over(gemm, spec, result)
    x_codes = x_saved
    if spec.x_wgrad is not REUSE and over is None:
        _, x_saved, _ = _forward_operand("x_wgrad", x, spec.x_wgrad, state, x_axis)
    if isinstance(w, Weight):
        state.next_piece()
    x_layout = over.layout if over is not None else Layout.of(x)
    codes = x_codes if learned[0] or over is not None else None, weight.codes if learned[1] else None
    return y, Saved(x_saved, weight.saved, *codes, x_mask, weight.mask, x_layout, weight.layout)


def quantize_weight(w: Tensor, contraction: Contraction, spec: LayerSpec, state: LayerState) -> Weight:
    """The weight as the products of one forward and backward pass take it."""
    w = contraction.prepare(w.detach(), "w")
    axis = _axis(contraction, "w", spec, "w_fprop", "w_dgrad")
    fprop, saved, mask = _forward_operand("w_fprop", w, spec.w_fprop, state, axis)
    codes = saved
    if spec.w_dgrad is not REUSE:
        _, saved, _ = _forward_operand("w_dgrad", w, spec.w_dgrad, state, axis)
    return Weight(fprop, saved, codes, mask, Layout.of(w))


def run_backward(
    g: Tensor | None,
    saved: Saved,
    contraction: Contraction,
    spec: LayerSpec,
    state: LayerState,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
    over: OperandHandover | None = None,
    quantized: tuple[Quantized | None, Quantized | None] | None = None,
    rounded: list[Tensor] | None = None,
    amax: float | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dw and the gradients of their clip values.

    Args:
        rounded: takes the gradient as dgrad has it, in full precision.
        amax: max|g|, where the node behind knows it.
    """
    need_x, need_w = needs
    compute = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    dx = dw = dx_alpha = dw_alpha = None
    if g is None:
        assert quantized is not None
        g_dgrad, g_wgrad = quantized
    else:
        g = contraction.prepare(g, "g")
        needs_axis = spec.g_scaling or spec.restores or not spec.per_channel.isdisjoint(("g_dgrad", "g_wgrad"))
        axis = contraction.channel_axis("g") if needs_axis else 0
        g_dgrad, g_wgrad = state.gradients(g, axis, need_x, need_w)
        if spec.restores:
            g_dgrad = restored(g, g_dgrad, spec.resolved("g_dgrad"), axis)
            g_wgrad = restored(g, g_wgrad, spec.resolved("g_wgrad"), axis)
    if spec.g_wgrad is REUSE:
        g_wgrad = g_dgrad
    if g is not None and ((need_x and g_dgrad is None) or (need_w and g_wgrad is None)):
        state.count_nonfinite("g_dgrad", g if amax is None else amax)
    if rounded is not None and g is not None:
        rounded.append((g if g_dgrad is None else g_dgrad.tensor.dequantize()).to(compute))
    if need_x:
        a, late = _gradient(g, g_dgrad, spec.resolved("g_dgrad"))
        sums = (spec.accumulation, state.sum_key("dgrad"))
        gemm = Gemm("dgrad", contraction, a, _operand(saved.w), saved.x_layout, compute, state.products, *sums)
        if over is None or over.link.is_visible():
            mask, codes = saved.x_mask, _codes(saved.x_codes)
            if over is not None and mask is not None and isinstance(codes, Packed):
                mask = over.inside(mask, codes)
            dx, dx_alpha = product(gemm, spec.output, dtypes[0], late, mask, codes)
            if over is not None:  # the clip value is an input of the node before
                over.back.clipped.leave(clip_gradient(dx_alpha))
                dx_alpha = None
        else:
            _give_back(gemm, spec, late, over)
    if need_w:
        after = (_axis(contraction, "w", spec, "g_wgrad"), len(saved.w_layout.shape))
        a, late = _gradient(g, g_wgrad, spec.resolved("g_wgrad"), after)
        sums = (spec.accumulation, state.sum_key("wgrad"))
        gemm = Gemm("wgrad", contraction, a, _operand(saved.x), saved.w_layout, compute, state.products, *sums)
        dw, dw_alpha = product(gemm, spec.output, dtypes[1], late, saved.w_mask, _codes(saved.w_codes))
    return dx, dw, dx_alpha, dw_alpha


def _hand_over(gemm: Gemm, spec: LayerSpec, result: ResultHandover) -> Tensor:
    """Leave the product to the node behind; what it cannot take is finished here."""
    raw = multiply(gemm)
    scale = raw.unit if gemm.scale is None else raw.unit * float(gemm.scale)
    rounds = not (raw.rounded or gemm.keep_infinite) and raw.high is None
    if raw.y.dtype == torch.int16:
        scale = 1.0
    elif not rounds or backends.dispatch("norm_supported", raw.y, spec.output) is None:
        y, _ = finish(raw, Finish(gemm.scale, spec.output, gemm.keep_infinite, None, torch.float32))
        raw, scale = Raw(y, rounded=True), 1.0
    raw = raw._replace(y=raw.y.contiguous(memory_format=torch.channels_last))
    result.raw, result.scale, result.output = raw, scale, spec.output
    return Pending.make(raw.y.shape, raw.y.stride())


def _give_back(gemm: Gemm, spec: LayerSpec, late: Tensor | None, over: OperandHandover) -> None:
    """Leave the gradient of the operand to the node that made it, as it comes out of the multiplier where that will do."""
    raw = multiply(gemm)
    assert gemm.layout is not None
    finished = raw.rounded or spec.output is None
    if finished and raw.high is None and raw.y.dtype in (torch.bfloat16, torch.float32):
        scale = raw.unit
        for factor in (gemm.scale, late):
            scale = scale if factor is None else scale * float(factor)
        over.back.grad.leave((gemm.layout.match(raw.y), scale))
        return
    dx, _ = finish(raw, Finish(gemm.scale, spec.output, gemm.keep_infinite, late, torch.float32, gemm.layout))
    over.back.grad.leave((dx, 1.0))


def _axis(contraction: Contraction, operand: str, spec: LayerSpec, *slots: str) -> int:
    """The channel axis of an operand if any of `slots` has scales per channel (some layers have no such axis), else 0."""
    return 0 if spec.per_channel.isdisjoint(slots) else contraction.channel_axis(operand)


def _forward_operand(
    slot: str, t: Tensor, spec: QuantSpec | None, state: LayerState, axis: int
) -> tuple[Operand, Operand, Tensor | None]:
    """The operand for a product, as it is saved for backward, and the mask where clipping needs one."""
    if spec is None:
        state.count_nonfinite(slot, t)
        return Operand(t), Operand(t), None
    quantized = state.quantize(slot, t, spec, axis, save=True)
    return *_kept(quantized, spec), quantized.mask


def _kept(quantized: Quantized, spec: QuantSpec | None) -> tuple[Operand, Operand]:
    """The operand for a product, and as it is saved for backward."""
    (q, scale, format), _, packed, _ = quantized
    scale = scale.view(()) if scale.numel() == 1 else scale
    operand = Operand(q, scale, format, spec is not None and spec.samples == 1)
    return _operand(operand), operand if packed is None else operand._replace(q=packed)


def _operand(kept: Operand) -> Operand:
    """For a product; scales per channel are multiplied into the numbers."""
    if kept.scale is None or not kept.scale.dim():
        return kept
    return Operand(kept.to(torch.float32) * kept.scale, None, kept.format)


def flatten(saved: Saved) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """The tensors, for autograd to keep, and the rest."""
    kept = saved.x, saved.w, saved.x_codes, saved.w_codes
    outline = [_outline(k) for k in kept], saved.x_layout, saved.w_layout
    return [*(t for k in kept for t in _tensors(k)), saved.x_mask, saved.w_mask], outline


def unflatten(outline: tuple[Any, ...], tensors: Sequence[Tensor | None]) -> Saved:
    """What `flatten` took apart."""
    kept, x_layout, w_layout = outline
    *data, x_mask, w_mask = tensors
    x, w, x_codes, w_codes = (_restore(k, data[2 * i : 2 * i + 2]) for i, k in enumerate(kept))
    assert x is not None and w is not None
    return Saved(x, w, x_codes, w_codes, x_mask, w_mask, x_layout, w_layout)


def _tensors(kept: Operand | None) -> tuple[Tensor | None, Tensor | None]:
    if kept is None:
        return None, None
    return (kept.q.data if isinstance(kept.q, Packed) else kept.q), kept.scale


def _outline(kept: Operand | None) -> Operand | None:
    """What is left of a saved operand without its tensors."""
    if kept is None:
        return None
    q = kept.q
    bare = Packed(_NOTHING, q.shape, q.stride, q.signed, q.grid) if isinstance(q, Packed) else _NOTHING
    return Operand(bare, None, kept.format, kept.on_grid)


_NOTHING = torch.empty(0)


def _restore(outline: Operand | None, tensors: Sequence[Any]) -> Operand | None:
    if outline is None:
        return None
    q, (data, scale) = outline.q, tensors
    whole = Packed(data, q.shape, q.stride, q.signed, q.grid) if isinstance(q, Packed) else data
    return Operand(whole, scale, outline.format, outline.on_grid)


def _codes(kept: Operand | None) -> Packed | Tensor | None:
    return None if kept is None else kept.q


def _gradient(
    g: Tensor | None, quantized: Quantized | None, spec: QuantSpec | None, after: tuple[int, int] | None = None
) -> tuple[Operand, Tensor | None]:
    """The gradient operand, and the scale to be taken out after the product was rounded.

    Scales per channel come out as they are where the product keeps the channels (`after`: their axis in the result, and its
    number of dimensions). Where it sums over them, what the channels differ by goes in before, and the largest comes out.
    """
    if quantized is None:
        assert g is not None
        return Operand(g), None
    q, scale, format = quantized.tensor
    on_grid = spec is not None and spec.samples == 1 and spec.restore != "sum"
    if scale.numel() == 1:
        scale = scale.view(())
    elif after is not None:
        scale = along(scale.flatten(), *after)
    else:
        largest = scale.max()
        q, scale, on_grid = q.to(torch.float32) * (scale / largest), largest, False
    return Operand(q, None, format, on_grid), scale
