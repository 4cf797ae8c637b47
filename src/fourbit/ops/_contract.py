"""`contract`: the products of a layer as one node of autograd's graph."""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from fourbit.errors import UserError
from fourbit.ops._contraction import Contraction
from fourbit.ops._fusion_handovers import OperandHandover, ResultHandover
from fourbit.ops._gemms import OutputGradient, backward, clip_gradient, exact_weight, fprop, needs_of
from fourbit.ops._pending import Pending, numbers_of, settle_all
from fourbit.ops._rotate import turned
from fourbit.ops._saved import Saved
from fourbit.ops._second_derivatives import differentiable_dgrad, refuse_forward_mode, refuse_transforms, refused
from fourbit.ops._state import LayerState
from fourbit.ops._watcher import computing
from fourbit.quantizers import is_shard


def contract(
    x: Tensor,
    w: Tensor,
    contraction: Contraction,
    state: LayerState,
    over: OperandHandover | None = None,
    result: ResultHandover | None = None,
) -> Tensor:
    """y = x * w under the spec of `state`, differentiable in x, w and the clip values.

    Args:
        x, w: operands of `contraction`, any floating dtypes. The products are computed in float32 (float64 if x is).
        state: the layer's spec and memory; it is updated in training mode.
        over: x, quantized by the node before.
        result: takes the product for a node that finishes it.

    Returns:
        y in the dtype of x, or autocast's where autocast is on; with `result`, the Pending tensor that stands for y.

    Raises:
        UserError: a tensor on the meta device.
    """
    if over is None and (isinstance(x, Pending) or isinstance(w, Pending)):
        settle_all((x, w), "a layer")
    if w.is_meta or (over is None and x.is_meta):
        raise UserError("a tensor on the meta device has no numbers to quantize: move layer and input to a real device")
    device = w.device.type
    if over is not None:
        dtype, num_elements, x_alpha = torch.float32, over.layout.shape.numel(), None
    else:
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        num_elements, x_alpha = x.numel(), state.parameter("x")
    state.with_gradients = torch.is_grad_enabled()
    if torch.compiler.is_compiling():
        from fourbit.ops._compiled import compiled_contract

        assert over is None and result is None
        return compiled_contract(x, w, x_alpha, state.parameter("w"), contraction, state, dtype)
    refuse_transforms()
    if is_shard(w):
        raise UserError(
            "the weight of a quantized layer is a DTensor, of which this process has a part: call the module that fully_shard "
            "was applied to, which gathers it"
        )
    with full_precision(device), computing(state, num_elements):
        return _Contract.apply(x, w, x_alpha, state.parameter("w"), (contraction, state, dtype, over, result))


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Without autocast; where there is none, nothing costs nothing."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _AS_IT_IS


_AS_IT_IS = nullcontext()


class Node(torch.autograd.Function):
    """torch.autograd.Function, for callers that have made sure that no transform of torch.func is at work.

    Torch's own `apply` looks for transforms and builds what they would need, which takes longer than the node itself.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """What `forward` returns, with this node as its origin; tensors that have outlived a transform are plain ones."""
        plain = [unwrap_if_dead(a) if isinstance(a, Tensor) else a for a in args]
        return super(torch.autograd.Function, cls).apply(*plain)  # type: ignore[misc]


class _Contract(Node):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        x_alpha: Tensor | None,
        w_alpha: Tensor | None,
        call: tuple[Contraction, LayerState, torch.dtype, OperandHandover | None, ResultHandover | None],
    ) -> Tensor:
        contraction, state, dtype, over, result = call
        if result is not None:
            result.needs = needs_of(ctx.needs_input_grad)
        learned = x_alpha is not None, w_alpha is not None
        y, saved = fprop(numbers_of(x), numbers_of(w), contraction, state, dtype, learned, over, result)
        ctx.save_for_backward(*saved.tensors())
        ctx.outline, ctx.contraction, ctx.state = saved.outline(), contraction, state
        ctx.over, ctx.result = over, result
        ctx.dtypes = (torch.float32 if over is not None else x.dtype, w.dtype)
        ctx.weight = weakref.ref(w)  # saved, it would count as memory and forbid changes
        ctx.set_materialize_grads(False)
        return y

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = OutputGradient(grads[0])
        if grads[0] is None and ctx.result is not None:
            g, amax = ctx.result.g.take() or (None, None)
            gradient = OutputGradient(g, amax, ctx.result.quantized.take())
        if gradient.g is None and gradient.quantized is None:
            return (None,) * 5
        if not torch.is_grad_enabled():
            return (*_gradients(ctx, gradient), None)
        return _to_be_differentiated(ctx, gradient)


def _gradients(ctx: Any, gradient: OutputGradient, rounded: list[Tensor] | None = None) -> tuple[Tensor | None, ...]:
    """dx, dw and the gradients of the clip values."""
    saved, needs = Saved.of(ctx.outline, ctx.saved_tensors), ctx.needs_input_grad
    with full_precision(saved.x.device.type):
        call = (gradient, saved, ctx.contraction, ctx.state, ctx.dtypes, needs_of(needs), ctx.over, rounded)
        dx, dw, dx_alpha, dw_alpha = backward(*call)
    return dx if needs[0] else None, dw if needs[1] else None, clip_gradient(dx_alpha), clip_gradient(dw_alpha)


def _to_be_differentiated(ctx: Any, gradient: OutputGradient) -> tuple[Tensor | None, ...]:
    """The same, in a graph: dx as a function of g and w, the others as tensors that say that they are none."""
    rounded: list[Tensor] = []
    with torch.no_grad():
        dx, *others = _gradients(ctx, gradient, rounded)
    if ctx.over is not None or ctx.result is not None:
        what, remedy = "a gradient of a fused chain", "convert with fuse=False"
        return (*(refused(t, what, remedy) for t in (dx, *others)), None)
    if dx is not None and gradient.g is not None:
        saved = Saved.of(ctx.outline, ctx.saved_tensors)
        if turned(ctx.state.spec, "dgrad", saved.x_mask) or turned(ctx.state.spec, "wgrad", saved.w_mask):
            what, remedy = "a gradient of a rotated layer", "call restore(model) first"
            return (*(refused(t, what, remedy) for t in (dx, *others)), None)
        g_dgrad = ctx.state.spec.g_dgrad
        if g_dgrad is not None and g_dgrad.leverage is not None:
            what, remedy = "a gradient of sampled rows", "call restore(model) first"
            return (*(refused(t, what, remedy) for t in (dx, *others)), None)
        w = saved.w_layout.match(exact_weight(saved.w, ctx.contraction, ctx.state).to(rounded[0].dtype))
        masks = saved.x_mask, saved.w_mask
        weight, pair = ctx.weight(), (rounded[0], w)
        dx = differentiable_dgrad(dx, gradient.g, weight, ctx.state.parameter("w"), ctx.contraction, pair, masks)
    what = "the gradient of a quantized layer's weight or clip value"
    remedy = "take the penalty from gradients of inputs only, or call restore(model) first"
    return (dx, *(refused(t, what, remedy) for t in others), None)
