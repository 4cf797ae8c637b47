"""Second derivatives, as penalties on a gradient need them (WGAN-GP, R1), and what is refused in their place.

A layer's dx = mask * dgrad(Q(g), Q(w)) is differentiable in g and w, straight through their rounding:

    for the gradient v of dx    g gets fprop(mask v, Q(w)),  w gets wgrad(Q(g), mask v)

These products are in full precision. Everything else is differentiated once only: dw, and all that recurrent layers and fused
chains give back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.ops._contraction import Contraction
from fourbit.quantizers import unpack_mask


def refuse_transforms() -> None:
    """Refuse vmap, grad and jvp of torch.func.

    Raises:
        UserError: one of them is at work.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:  # type: ignore[attr-defined]
        raise UserError(
            "transforms of torch.func (vmap, grad, jvp) cannot go through a quantized layer, whose state changes with every "
            "call: use torch.autograd.grad, or call restore(model) first"
        )


def refuse_forward_mode(ctx: Any, *tangents: Any) -> Any:
    """The `jvp` of our autograd functions.

    Raises:
        UserError: always.
    """
    raise UserError(
        "a quantized layer has no derivative in forward mode (torch.autograd.forward_ad): use torch.autograd.grad, or call "
        "restore(model) first"
    )


def once(what: str, remedy: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator for `backward`: what it gives cannot be differentiated again; whoever tries gets a UserError with `remedy`."""

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            return tuple(refused(t, what, remedy) for t in found)

        return run

    return decorate


def refused(t: Tensor | None, what: str, remedy: str) -> Tensor | None:
    """`t`, which raises when it is differentiated."""
    if t is None:
        return None
    link = torch.zeros((), requires_grad=True)
    return _Refused.apply(t.detach(), link, f"{what} cannot be differentiated a second time: {remedy}")


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, link: Tensor, message: str) -> Tensor:
        ctx.message = message
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UserError(ctx.message)


def differentiable_dgrad(
    dx: Tensor,
    g: Tensor,
    w: Tensor | None,
    w_alpha: Tensor | None,
    contraction: Contraction,
    rounded: tuple[Tensor, Tensor],
    masks: Sequence[Tensor | None],
) -> Tensor:
    """dx, differentiable in g, w and the clip value of w.

    Args:
        dx: as it was computed.
        g, w: what it is differentiated in; w None: it is gone, which matters only if its gradient is asked for.
        rounded: Q(g) and Q(w).
        masks: bits of the straight-through gradients of x and w, in the order of dx and Q(w).
    """
    lost = torch.zeros((), requires_grad=True) if w is None else None
    return _Dgrad.apply(dx.detach(), g, w, w_alpha, lost, contraction, rounded, masks)


class _Dgrad(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dx: Tensor,
        g: Tensor,
        w: Tensor | None,
        w_alpha: Tensor | None,
        lost: Tensor | None,
        contraction: Contraction,
        rounded: tuple[Tensor, Tensor],
        masks: Sequence[Tensor | None],
    ) -> Tensor:
        ctx.save_for_backward(*rounded, *masks)
        ctx.contraction, ctx.dtypes = contraction, (g.dtype, None if w is None else w.dtype)
        return dx.view_as(dx)

    @staticmethod
    @once("a second derivative of a quantized layer", "there is no third one")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, w, x_mask, w_mask = ctx.saved_tensors
        needs_g, needs_w, needs_alpha, needs_lost = ctx.needs_input_grad[1:5]
        if needs_lost:
            raise UserError(
                "the gradient of a quantized layer's input cannot be differentiated in a weight that was computed for the "
                "forward pass and is gone: keep a reference to the weight, or remove its parametrization"
            )
        v = ctx.contraction.prepare(grads[0].to(w.dtype), "x")
        if x_mask is not None:
            v = v.masked_fill(unpack_mask(x_mask, v).logical_not_(), 0.0)
        dg = ctx.contraction.fprop(v, w).to(ctx.dtypes[0]) if needs_g else None
        dw = d_alpha = None
        if needs_w or needs_alpha:
            dw = ctx.contraction.wgrad(g, v, w)
            if w_mask is not None:
                inside = dw.masked_fill(unpack_mask(w_mask, w).logical_not_(), 0.0)
                d_alpha = ((dw - inside) * w.sign()).sum().view(1)
                dw = inside
            dw = dw.to(ctx.dtypes[1])
        return None, dg, dw if needs_w else None, d_alpha if needs_alpha else None, None, None, None, None
