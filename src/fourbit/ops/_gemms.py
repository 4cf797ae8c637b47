"""The three products of a layer, each from operands that its spec quantizes.

    fprop   y  = out(x_fprop * w_fprop)
    dgrad   dx = out(g_dgrad * w_dgrad) / s     masked, and PACT's alpha gradient taken from what the mask removes
    wgrad   dw = out(g_wgrad * x_wgrad) / s

`out` rounds to `spec.output`; s is GradScale's power of two, taken out after that rounding, as the hardware would. What a
4-bit operand leaves for backward is its packed codes, two to the byte, and one mask bit per element. Nothing here knows of
autograd: its nodes (a layer's, a recurrent sweep's, a mixture's, a compiled operator's) call these functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.ops._compensate import compensated
from fourbit.ops._contraction import Contraction
from fourbit.ops._fusion_handovers import NORM_SUPPORTED, OperandHandover, ResultHandover
from fourbit.ops._leverage import sampled
from fourbit.ops._orientation import Orientation
from fourbit.ops._pending import Pending
from fourbit.ops._product import Finish, Gemm, Layout, Operand, Raw, finish, multiply, product
from fourbit.ops._quantize import quantize_gradient, quantize_operand, rotation_key, sum_key
from fourbit.ops._rotate import WHICH, oriented, turned, unrotated
from fourbit.ops._saved import Saved
from fourbit.ops._spec import REUSE, LayerSpec
from fourbit.ops._state import LayerState
from fourbit.ops._watcher import computing
from fourbit.quantizers import Packed, Quantized, QuantSpec, StepSize, amax_of, split_outliers, unpack_mask

Both = tuple[Quantized | None, Quantized | None]
"""A gradient for dgrad and for wgrad; None where it is in full precision, or not needed."""


@dataclass(slots=True, eq=False)
class Weight:
    """A weight, quantized once for any number of products: for fprop, as kept for dgrad, the codes of fprop, its mask, and what
    dw is multiplied by (None: 1)."""

    fprop: Operand
    saved: Operand
    codes: Operand
    mask: Tensor | None
    layout: Layout
    slope: Tensor | None


@dataclass(slots=True, eq=False)
class OutputGradient:
    """The gradient of y: as a tensor, with its largest magnitude where that is known, or quantized by the node behind."""

    g: Tensor | None
    amax: float | None = None
    quantized: Both | None = None


# ---- forward ----


def fprop(
    x: Tensor,
    w: Tensor | Weight,
    contraction: Contraction,
    state: LayerState,
    dtype: torch.dtype,
    learned: tuple[bool, bool] = (False, False),
    over: OperandHandover | None = None,
    result: ResultHandover | None = None,
) -> tuple[Tensor, Saved]:
    """y in `dtype`, [N, M] in a linear layer, and what backward needs.

    Args:
        x: [N, K] in a linear layer; not read with `over`.
        w: [M, K], or quantized already; then the caller has begun the state's forward pass.
        learned: whether the clip values of x and w are to get gradients.
        over: x, quantized by the node before.
        result: takes the product for a node that finishes it.
    """
    spec = state.spec
    if isinstance(w, Tensor):
        state.begin(over is not None)
    compute = torch.float64 if over is None and x.dtype == torch.float64 else torch.float32
    outliers = x_slope = None
    if over is None:
        x = inside = contraction.prepare(x.detach(), "x")
        if spec.x_fprop is not None and spec.x_fprop.outliers is not None:
            inside, outliers = _without_outliers(x, spec.x_fprop.outliers, contraction, state)
        x_fprop, x_saved, x_mask, x_slope = _forward_operand("x_fprop", inside, contraction, state)
    else:
        quantized = over.take()
        x_fprop, x_saved, x_mask = *_kept(quantized, spec.x_fprop), quantized.mask
    weight = quantize_weight(w, contraction, state) if isinstance(w, Tensor) else w
    sums = (spec.accumulation, sum_key(state, "fprop"))
    takes_codes = result is not None and x_fprop.format is not None and weight.fprop.format is not None
    output = spec.output if takes_codes else None
    gemm = Gemm("fprop", contraction, x_fprop, weight.fprop, None, compute, state.products, *sums, output, state.plans)
    if outliers is not None:
        w_numbers = weight.fprop.to(compute)
        w_numbers = w_numbers if weight.fprop.scale is None else w_numbers * weight.fprop.scale
        y = (product(gemm, None, compute)[0] + contraction.fprop(outliers.to(compute), w_numbers)).to(dtype)
    else:
        y = product(gemm, spec.output, dtype)[0] if result is None else _hand_over(gemm, spec, result)
    x_codes = x_saved
    if spec.x_wgrad is not REUSE and over is None and state.with_gradients:
        x_saved = _saved_operand("x_wgrad", x, contraction, state, x_codes)
    if isinstance(w, Weight):
        state.counter.piece += 1  # the next product with this weight draws other words
    x_layout = over.layout if over is not None else Layout.of(x)
    codes = x_codes if learned[0] or over is not None else None, weight.codes if learned[1] else None
    slopes = weight.slope, x_slope
    return y, Saved(x_saved, weight.saved, *codes, x_mask, weight.mask, x_layout, weight.layout, *slopes)


def quantize_weight(w: Tensor, contraction: Contraction, state: LayerState) -> Weight:
    """The weight as the products of one forward and backward pass take it."""
    spec, w = state.spec, contraction.prepare(w.detach(), "w")
    fprop, saved, mask, slope = _forward_operand("w_fprop", w, contraction, state)
    codes = saved
    if spec.w_dgrad is not REUSE and state.with_gradients:
        saved = _saved_operand("w_dgrad", w, contraction, state, codes)
    return Weight(fprop, saved, codes, mask, Layout.of(w), slope)


def _without_outliers(x: Tensor, quantile: float, contraction: Contraction, state: LayerState) -> tuple[Tensor, Tensor]:
    """x clamped at its outliers, and the rest."""
    orientation = contraction.orientation("fprop", "x", x.shape)
    rows = state.spec.tile("x_fprop").is_row
    inside, rest = split_outliers(orientation.of(x), quantile, (2, 3) if rows else (0, 1, 2, 3))
    state.count_nonfinite("x_fprop", amax_of(rest))
    return contraction.prepare(orientation.back(inside), "x"), contraction.prepare(orientation.back(rest), "x")


def _hand_over(gemm: Gemm, spec: LayerSpec, result: ResultHandover) -> Tensor:
    """Leave the product to the node behind; what it cannot take is finished here."""
    raw, scale = multiply(gemm), 1.0
    if raw.y.dtype != torch.int16:
        rounds = not (raw.rounded or gemm.keep_infinite) and raw.high is None
        if rounds and NORM_SUPPORTED(raw.y, spec.output) is not None:
            scale = raw.unit if gemm.scale is None else raw.unit * float(gemm.scale)
        else:
            y, _ = finish(raw, Finish(gemm.scale, spec.output, gemm.keep_infinite, None, torch.float32))
            raw = Raw(y, rounded=True)
    raw = raw._replace(y=raw.y.contiguous(memory_format=torch.channels_last))
    result.raw, result.scale, result.output = raw, scale, spec.output
    return Pending.make(raw.y.shape, raw.y.stride())


def _forward_operand(
    slot: str, t: Tensor, contraction: Contraction, state: LayerState
) -> tuple[Operand, Operand, Tensor | None, Tensor | None]:
    """The operand for a product, as it is saved for backward, the mask where clipping needs one, and the slope of its
    estimator."""
    spec = state.spec.resolved(slot)
    if spec is None:
        state.count_nonfinite(slot, amax_of(t))
        return Operand(t), Operand(t), None, None
    slope = None
    toward = state.toward if slot == "w_fprop" else None
    toward = None if toward is None else contraction.prepare(toward, "w")
    if not spec.needs_orientation:
        quantized = quantize_operand(state, slot, t, spec, save=True, toward=toward)
        if spec.estimator is not None and state.with_gradients:
            slope = spec.estimator.slope(t * quantized.tensor.scales.reciprocal(), quantized.tensor.format)
        if isinstance(spec.scaling, StepSize) and state.with_gradients:
            slope = spec.scaling.slope(t, quantized.tensor.scale, quantized.tensor.format)
        return *_kept(quantized, spec), quantized.mask, slope
    m, orientation = oriented(slot, t, contraction, state.spec)
    toward = None if toward is None else oriented(slot, toward, contraction, state.spec)[0]
    quantized = quantize_operand(state, slot, m, spec, save=True, toward=toward, contraction=contraction)
    if spec.estimator is not None and state.with_gradients:
        slope = spec.estimator.slope(m * quantized.tensor.scales.reciprocal(), quantized.tensor.format)
        slope = contraction.prepare(orientation.back(slope), slot[0])
    if isinstance(spec.scaling, StepSize) and state.with_gradients:
        turned_m = m if spec.transform is None else spec.transform.apply(m, rotation_key(state, "fprop"))
        slope = spec.scaling.slope(turned_m, quantized.tensor.scale, quantized.tensor.format)
    _, saved = _kept(quantized, spec, orientation)
    return saved._replace(q=quantized.tensor.q).natural(contraction, slot[0]), saved, quantized.mask, slope


def _saved_operand(slot: str, t: Tensor, contraction: Contraction, state: LayerState, of_fprop: Operand) -> Operand:
    """The operand of a product of the backward pass, as it is saved.

    Args:
        of_fprop: what fprop had of the operand, for a slot that quantizes that.
    """
    spec = state.spec.resolved(slot)
    if spec is None:
        state.count_nonfinite(slot, amax_of(t))
        return Operand(t)
    if spec.source == "fprop":
        kept = of_fprop.natural(contraction, slot[0])
        t = kept.to(torch.float32) if kept.scale is None else kept.to(torch.float32) * kept.scale
    if not spec.needs_orientation:
        return _kept(quantize_operand(state, slot, t, spec, save=True), spec)[1]
    m, orientation = oriented(slot, t, contraction, state.spec)
    return _kept(quantize_operand(state, slot, m, spec, save=True, carrier=False), spec, orientation)[1]


def _kept(
    quantized: Quantized, spec: QuantSpec | None, orientation: Orientation | None = None
) -> tuple[Operand, Operand]:
    """The operand for a product, and as it is saved for backward."""
    (q, scale, format, each), _, packed, _ = quantized
    scale = scale.view(()) if scale.dim() and scale.numel() == 1 else scale
    in_blocks = each is not None and not each[1].is_row  # their scales are in the numbers
    on_grid = spec is not None and spec.samples == 1 and not in_blocks
    operand = Operand(q, scale, None if in_blocks else format, on_grid, None, orientation)
    return operand, operand if packed is None else operand._replace(q=packed)


# ---- backward ----


def backward(
    gradient: OutputGradient | Tensor,
    saved: Saved,
    contraction: Contraction,
    state: LayerState,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
    over: OperandHandover | None = None,
    rounded: list[Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dw and the gradients of their clip values; None where they are not needed.

    Args:
        gradient: of y, [N, M] in a linear layer.
        dtypes: of dx and dw.
        needs: whether dgrad and wgrad are needed.
        over: takes dx, where x was quantized by the node before.
        rounded: takes the gradient as dgrad has it, in full precision.
    """
    with computing(state, 0):
        return _backward(gradient, saved, contraction, state, dtypes, needs, over, rounded)


def _backward(
    gradient: OutputGradient | Tensor,
    saved: Saved,
    contraction: Contraction,
    state: LayerState,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool],
    over: OperandHandover | None,
    rounded: list[Tensor] | None,
) -> tuple[Tensor | None, ...]:
    gradient = OutputGradient(gradient) if isinstance(gradient, Tensor) else gradient
    g = None if gradient.g is None else contraction.prepare(gradient.g.detach(), "g")
    if g is None:
        assert gradient.quantized is not None
        for_dgrad, for_wgrad = gradient.quantized
    else:
        for_dgrad, for_wgrad = _quantize_gradient(g, contraction, state, needs)
    if state.spec.g_wgrad is REUSE:
        for_wgrad = for_dgrad
    if g is not None and ((needs[0] and for_dgrad is None) or (needs[1] and for_wgrad is None)):
        state.count_nonfinite("g_dgrad", amax_of(g) if gradient.amax is None else gradient.amax)
    compute = torch.float64 if dtypes[0] == torch.float64 else torch.float32
    if rounded is not None and g is not None:
        rounded.append(_exact_gradient(g, for_dgrad, contraction, state).to(compute))
    dx = dw = dx_alpha = dw_alpha = None
    if needs[0]:
        dx, dx_alpha = dgrad(g, for_dgrad, saved, contraction, state, dtypes[0], compute, over)
    if needs[1]:
        dw, dw_alpha = wgrad(g, for_wgrad, saved, contraction, state, dtypes[1], compute)
    return dx, dw, dx_alpha, dw_alpha


def _quantize_gradient(g: Tensor, contraction: Contraction, state: LayerState, needs: tuple[bool, bool]) -> Both:
    """g for dgrad and for wgrad."""
    spec = state.spec
    for_dgrad, for_wgrad = quantize_gradient(state, g, contraction, *needs)
    if spec.compensates:
        for_dgrad = compensated(g, for_dgrad, spec.resolved("g_dgrad"), contraction)
        for_wgrad = compensated(g, for_wgrad, spec.resolved("g_wgrad"), contraction)
    return for_dgrad, for_wgrad


def dgrad(
    g: Tensor | None,
    quantized: Quantized | None,
    saved: Saved,
    contraction: Contraction,
    state: LayerState,
    dtype: torch.dtype,
    compute: torch.dtype,
    over: OperandHandover | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = g w, [N, K] in a linear layer, and the gradient of the clip value of x; with `over`, the node before gets them."""
    spec = state.spec
    a, late = _gradient("g_dgrad", g, quantized, contraction, spec, saved.x_layout)
    resolved = spec.resolved("g_dgrad")
    if resolved is not None and resolved.leverage is not None:
        a = sampled(a, contraction, resolved.leverage, state.counter.row_key("dgrad"), None)
    sums = (spec.accumulation, sum_key(state, "dgrad"))
    w = saved.w.natural(contraction, "w")
    gemm = Gemm("dgrad", contraction, a, w, saved.x_layout, compute, state.products, *sums, None, state.plans)
    if over is not None and not over.link.is_visible():
        _give_back(gemm, spec, late, over)
        return None, None
    mask, codes = saved.x_mask, _codes(saved.x_codes)
    if over is not None and mask is not None and isinstance(codes, Packed):
        mask = over.inside(mask, codes)
    if turned(spec, "dgrad", mask):
        dx, _ = product(gemm, spec.output, compute, late)
        key = rotation_key(state, "fprop")
        return unrotated("dgrad", dx, mask, codes, contraction, spec, key, saved.x_layout, dtype, saved.x_slope)
    if saved.x_slope is not None:
        dx = product(gemm, spec.output, compute, late)[0]
        return _with_step(dx, saved.x_slope, mask, saved.x_layout, dtype)
    dx, dx_alpha = product(gemm, spec.output, dtype, late, mask, codes)
    if over is not None:  # the clip value is an input of the node before
        over.back.clipped.leave(clip_gradient(dx_alpha))
        dx_alpha = None
    return dx, dx_alpha


def wgrad(
    g: Tensor | None,
    quantized: Quantized | None,
    saved: Saved,
    contraction: Contraction,
    state: LayerState,
    dtype: torch.dtype,
    compute: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """dw = g^T x, [M, K] in a linear layer, and the gradient of the clip value of w."""
    spec = state.spec
    a, late = _gradient("g_wgrad", g, quantized, contraction, spec, saved.w_layout)
    sums, x = (spec.accumulation, sum_key(state, "wgrad")), saved.x.natural(contraction, "x")
    resolved = spec.resolved("g_wgrad")
    if resolved is not None and resolved.leverage is not None:
        a = sampled(a, contraction, resolved.leverage, state.counter.row_key("wgrad"), x)
    gemm = Gemm("wgrad", contraction, a, x, saved.w_layout, compute, state.products, *sums, None, state.plans)
    if turned(spec, "wgrad", saved.w_mask):
        dw, _ = product(gemm, spec.output, compute, late)
        mask, codes, key = saved.w_mask, _codes(saved.w_codes), rotation_key(state, "fprop")
        return unrotated("wgrad", dw, mask, codes, contraction, spec, key, saved.w_layout, dtype, saved.w_slope)
    if saved.w_slope is not None:
        dw = product(gemm, spec.output, compute, late)[0]
        if saved.w_mask is not None:
            return _with_step(dw, saved.w_slope, saved.w_mask, saved.w_layout, dtype)
        return saved.w_layout.match((dw * saved.w_slope).to(dtype)), None
    return product(gemm, spec.output, dtype, late, saved.w_mask, _codes(saved.w_codes))


def _with_step(
    result: Tensor, slope: Tensor, mask: Tensor | None, layout: Layout, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx or dw, masked, and the gradient of the step size."""
    result = layout.match(result)
    total = (result * slope).sum(dtype=torch.float32)
    if mask is not None:
        result = result.masked_fill(unpack_mask(mask, result).logical_not_(), 0.0)
    return result.to(dtype), total


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


def needs_of(needs: Sequence[bool]) -> tuple[bool, bool]:
    """Whether dgrad and wgrad are needed, from which of x, w and the clip values need a gradient."""
    return needs[0] or needs[2], needs[1] or needs[3]


def clip_gradient(total: Tensor | None) -> Tensor | None:
    """The gradient of a clip value, in its shape [1]."""
    return None if total is None else total.view(1)


def _codes(kept: Operand | None) -> Packed | Tensor | None:
    return None if kept is None else kept.q


def _gradient(
    slot: str, g: Tensor | None, quantized: Quantized | None, contraction: Contraction, spec: LayerSpec, result: Layout
) -> tuple[Operand, Tensor | None]:
    """The gradient operand, and the scale to be taken out after the product was rounded: of the tensor, or of each row of g,
    which are rows of the result too."""
    if quantized is None:
        assert g is not None
        return Operand(g), None
    resolved = spec.resolved(slot)
    on_grid = resolved is not None and resolved.samples == 1 and resolved.compensate != "sum"
    q, scale, format, each = quantized.tensor
    if resolved is None or not resolved.needs_orientation:
        return Operand(q, None, format, on_grid), scale.view(()) if scale.dim() else scale
    assert g is not None
    origin = "g_dgrad" if getattr(spec, slot) is REUSE else slot
    which = WHICH[slot]
    if scale.numel() == 1:
        late = scale.view(())
    elif contraction.keeps_rows:
        late = contraction.orientation("fprop", "x" if which == "dgrad" else "w", result.shape).spread(scale)
    else:
        late = scale.max()
        q, on_grid = q.to(torch.float32) * (scale / late), False
    in_blocks = each is not None and not each[1].is_row
    orientation = contraction.orientation(WHICH[origin], "g", g.shape)
    a = Operand(q, None, None if in_blocks else format, on_grid and not in_blocks, None, orientation)
    return a.natural(contraction, "g"), late


def _exact_gradient(g: Tensor, quantized: Quantized | None, contraction: Contraction, state: LayerState) -> Tensor:
    """The gradient as dgrad has it, in full precision, not rotated."""
    if quantized is None:
        return g
    spec = state.spec.resolved("g_dgrad")
    numbers = quantized.tensor.dequantize()
    if spec is None or not spec.needs_orientation:
        return numbers
    if spec.transform is not None:
        numbers = spec.transform.undo(numbers, rotation_key(state, "dgrad"))
    return contraction.prepare(contraction.orientation("dgrad", "g", g.shape).back(numbers), "g")


def exact_weight(kept: Operand, contraction: Contraction, state: LayerState) -> Tensor:
    """The weight as dgrad has it, in full precision, not rotated."""
    if kept.orientation is None:
        numbers = kept.to(torch.float32)
        return numbers if kept.scale is None else numbers * kept.scale
    slot = "w_fprop" if state.spec.w_dgrad is REUSE else "w_dgrad"
    numbers = kept.to(torch.float32) if kept.scale is None else kept.to(torch.float32) * kept.scale
    transform = state.spec.transform(slot)
    if transform is not None:
        numbers = transform.undo(numbers, rotation_key(state, WHICH[slot]))
    return contraction.prepare(kept.orientation.back(numbers), "w")
