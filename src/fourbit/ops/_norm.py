"""Batch normalization with what surrounds it in a 4-bit network, as one node:

    v = round(scale * y)           y: the product of the layer before, which left its rounding to this node
    t = gamma (v - mean) / std + beta (+ residual)
    o = act(t)                     act: identity, or min(max(t, 0), cap)
    q = codes of o                 for the layer behind, packed, with the mask of the straight-through gradient

and backward, with both gradients of o in, down to the 4-bit gradients of the layer before:

    g  = act'(t) (do + mask dq),   dalpha = sum of dq where q was clipped
    dv = gamma / std (g - mean g - (v - mean) / std^2 mean(g (v - mean)))
    codes of dv for dgrad and wgrad, and its largest magnitude for GradScale's vote

The arithmetic is a kernel of a backend ("norm_forward", "norm_backward"). There is no reference: without a kernel, the
modules themselves run, one after the other, and they are what the kernels are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.formats import Format
from fourbit.ops._handover import GradientReturn, OperandHandover, ResultHandover
from fourbit.ops._product import Layout
from fourbit.ops._second import once, refuse_forward_mode, refuse_transforms
from fourbit.ops._state import LayerState
from fourbit.ops._watch import computing
from fourbit.quantizers import Packed, Quantized, QuantSpec, Request


@dataclass(frozen=True)
class Norm:
    """The normalization itself: parameters and running statistics (None: not tracked), as of torch's batch norm."""

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float


@dataclass(frozen=True)
class Activation:
    """min(max(t, 0), cap), or nothing."""

    clips: bool = False
    cap: float = float("inf")


@dataclass(frozen=True)
class NormForward:
    """One forward call.

    Args:
        y: [N, C, H, W] float32, channels_last; overwritten where `own`. Or v itself in the backend's 16-bit codes of `output`.
        scale, output: v = round(scale y) to `output` (None: not rounded).
        residual: added before the activation, like y.
        request: how the layer behind takes o; None: not at all.
        want_out: whether o itself is wanted.
        own: whether the memory of y is the node's own.
    """

    y: Tensor
    scale: float
    output: Format | None
    norm: Norm
    act: Activation
    residual: Tensor | None
    request: Request | None
    want_out: bool
    own: bool


@dataclass(frozen=True)
class Kept:
    """What backward needs: v (as float32 or 16-bit codes of `format`), statistics, the bits where the activation passes
    (None: everywhere, or where mask or code says so), and whether what it caps is clipped by the layer behind as well."""

    v: Tensor
    format: Format | None
    mean: Tensor
    inv_std: Tensor
    passes: Tensor | None
    cap_clips: bool


@dataclass(frozen=True)
class NormBackward:
    """One backward call.

    Args:
        kept: from forward.
        gamma, act, layout: of the normalization, the activation, and y.
        dq, dq_scale: gradient of the codes (times a scale), bfloat16 or float32; None if there is none.
        packed, mask: of the codes.
        do: gradient of o, float32; None if there is none.
        want_residual: whether the gradient of the residual is wanted.
        specs, exponent: quantizations of dv, and the scale's exponent; (): dv itself.
    """

    kept: Kept
    gamma: Tensor | None
    act: Activation
    layout: Layout
    dq: Tensor | None
    dq_scale: float
    packed: Packed | None
    mask: Tensor | None
    do: Tensor | None
    want_residual: bool
    specs: tuple[QuantSpec, ...]
    exponent: Tensor | None


def can_normalize(y: Tensor) -> bool:
    """Whether some backend has these kernels for tensors like y."""
    return y.dim() == 4 and y.dtype == torch.float32 and backends.dispatch("norm_supported", y, None) is not None


def normalize(
    y: Tensor | ResultHandover,
    token: Tensor | None,
    norm: Norm,
    act: Activation,
    residual: Tensor | None,
    before: LayerState | None,
    behind: LayerState | None,
    want_out: bool,
) -> tuple[Tensor | None, OperandHandover | None]:
    """o, if it is wanted or there is nothing else, and the operand for the layer behind, if it takes one.

    Args:
        y: the input, or what the layer before left of it, with its `token`.
        before, behind: the layers' states; None where there is no quantized layer, or it takes a float tensor.
    """
    refuse_transforms()
    result, start = (y, token) if isinstance(y, ResultHandover) else (None, y)
    request = None if behind is None else behind.operand_request(y.raw.y if isinstance(y, ResultHandover) else y)
    call = _Call(result, norm, act, before, behind, request, want_out or request is None)
    alpha = None if behind is None or request is None else behind.x_alpha
    assert start is not None
    with computing("normalization, fused", start.numel()):
        out, operand_token = _Normalize.apply(start, norm.gamma, norm.beta, residual, alpha, call)
    quantized, call.quantized = call.quantized, None
    if quantized is None:
        return out, None
    return out, OperandHandover(operand_token, call.layout, quantized, call.back)


@dataclass
class _Call:
    """What travels beside the tensors, and lives as long as the graph: it must hold no tensor of the graph."""

    result: ResultHandover | None
    norm: Norm
    act: Activation
    before: LayerState | None
    behind: LayerState | None
    request: Request | None
    want_out: bool
    back: GradientReturn = field(default_factory=GradientReturn)
    layout: Layout = Layout(torch.Size(), ())
    quantized: Quantized | None = None


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        gamma: Tensor | None,
        beta: Tensor | None,
        residual: Tensor | None,
        alpha: Tensor | None,
        call: _Call,
    ) -> tuple[Tensor | None, Tensor | None]:
        result = call.result
        if result is not None:
            y, scale, output, own = result.raw.y, result.scale, result.output, True
            if result.raw.rounded and y.dtype != torch.int16:
                output = None
            result.raw = result.raw._replace(y=y.new_empty(0))
        else:
            y, scale, output, own = y.detach(), 1.0, None, False
        y = y.contiguous(memory_format=torch.channels_last)
        residual = None if residual is None else residual.detach().contiguous(memory_format=torch.channels_last)
        request, call.request = call.request, None  # it holds y
        observed = call.behind is not None and call.behind.observer is not None
        want_out = call.want_out or observed
        forward = NormForward(y, scale, output, call.norm, call.act, residual, request, want_out, own)
        out, quantized, kept = backends.dispatch("norm_forward", forward)
        token = None
        if quantized is not None and call.behind is not None:
            call.behind.saw_operand(quantized.amax, out, quantized.tensor)
            token = y.new_zeros((), dtype=torch.float32)
            call.quantized, call.layout = quantized, Layout.of(y)
        packed = None if quantized is None else quantized.packed
        ctx.save_for_backward(
            kept.v,
            kept.mean,
            kept.inv_std,
            kept.passes,
            None if packed is None else packed.data,
            None if quantized is None else quantized.mask,
            gamma,
        )
        ctx.call, ctx.format, ctx.cap_clips, ctx.layout = call, kept.format, kept.cap_clips, Layout.of(y)
        ctx.packed = None if packed is None else (packed.shape, packed.stride, packed.signed)
        ctx.set_materialize_grads(False)
        return out if call.want_out else None, token

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    @once("a gradient of a fused chain", "convert with fuse=False")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        v, mean, inv_std, passes, data, mask, gamma = ctx.saved_tensors
        do, d_token = grads
        dq, dq_scale = (None, 1.0) if d_token is None else call.back.take()
        specs: tuple[QuantSpec, ...] = ()
        if call.result is not None and call.before is not None:
            specs = call.before.gradient_specs(*call.result.needs)
        backward = NormBackward(
            Kept(v, ctx.format, mean, inv_std, passes, ctx.cap_clips),
            gamma,
            call.act,
            ctx.layout,
            dq,
            dq_scale,
            None if ctx.packed is None else Packed(data, *ctx.packed),
            mask,
            None if do is None else do.contiguous(memory_format=torch.channels_last),
            ctx.needs_input_grad[3],
            specs,
            None if call.before is None else call.before.g_exponent,
        )
        dv, quantized, dgamma, dbeta, d_residual, clipped = backends.dispatch("norm_backward", backward)
        if call.result is not None:
            if quantized and call.before is not None and call.before.observer is not None:
                dv = backends.dispatch("norm_backward", replace(backward, specs=()))[0]
            _return_gradient(call, specs, dv, quantized)
            dv = mean.new_zeros(())
        d_alpha = mean.new_tensor([clipped]) if ctx.needs_input_grad[4] and dq is not None else None
        return (
            dv,
            dgamma if ctx.needs_input_grad[1] else None,
            dbeta if ctx.needs_input_grad[2] else None,
            d_residual,
            d_alpha,
            None,
        )


def _return_gradient(
    call: _Call, specs: tuple[QuantSpec, ...], dv: Tensor | None, quantized: tuple[Quantized, ...]
) -> None:
    """Leave the gradient of the product to the layer before."""
    result, state = call.result, call.before
    assert result is not None and state is not None
    if not quantized:
        result.g = dv
        return
    first = specs[0] is state.spec.g_dgrad
    slots = ("g_dgrad", "g_wgrad") if len(quantized) == 2 else ("g_dgrad",) if first else ("g_wgrad",)
    by_slot = dict(zip(slots, quantized, strict=True))
    amax = quantized[0].amax
    assert not isinstance(amax, Tensor)
    state.saw_gradient(amax, dv, [(slot, q.tensor) for slot, q in by_slot.items()])
    result.quantized = by_slot.get("g_dgrad"), by_slot.get("g_wgrad")
