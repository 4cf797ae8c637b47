"""The nodes of a chain in autograd's graph: one for each step, with the edges that torch would have made, and one at its end.

A step's node computes nothing forward. Backward, either the end of the chain has left the gradients of all steps there, or
a gradient comes in and the step computes its own; `Link.is_visible` decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit.chains._link import Affine, Link
from fourbit.chains._norm import NO_ACTIVATION, NORM_BACKWARD, Activation, Normalized, NormBackward, NormGradients
from fourbit.errors import UserError
from fourbit.ops import (
    GradientReturn,
    LayerState,
    Layout,
    Node,
    Pending,
    gradient_specs,
    once,
    saw_gradient,
    saw_operand,
)
from fourbit.quantizers import Packed, Quantized, QuantSpec, Request, unpack_mask

_UNSEEN = (
    "a gradient reached the inside of a fused chain, by an autograd function that took a tensor without reading it: "
    "convert the model with fuse=False"
)


_once = once("a gradient of a fused chain", "convert with fuse=False")


def _placeholder(ctx: Any, x: Pending, inplace: bool) -> Pending:
    ctx.set_materialize_grads(False)
    if inplace:
        ctx.mark_dirty(x)
        return x
    return Pending.like(x)


class Opened(Node):
    """A finished result as the start of a chain."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Pending:
        """A tensor that stands for y."""
        ctx.set_materialize_grads(False)
        return Pending.make(y.shape, y.stride())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        """The same gradient."""
        return grads[0]


class Finished(Node):
    """The tensor that a Pending one stands for, in its place."""

    @staticmethod
    def forward(ctx: Any, w: Pending, value: list[Tensor]) -> Tensor:
        """The numbers."""
        ctx.set_materialize_grads(False)
        return value[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        """The same gradient."""
        return grads[0], None


class Normalization(Node):
    """t = slope v + offset."""

    @staticmethod
    def forward(
        ctx: Any, x: Pending, link: Link, inplace: bool, gamma: Tensor | None, beta: Tensor | None, n: Normalized
    ) -> Pending:
        """A tensor that stands for t."""
        ctx.save_for_backward(n.v, n.moments, gamma)
        ctx.format, ctx.layout, ctx.link = n.format, Layout.of(n.v), link
        return _placeholder(ctx, x, inplace)

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the input, gamma and beta."""
        g, link = grads[0], ctx.link
        found: NormGradients | None = link.gradients.take()
        if g is not None:
            if found is not None:
                raise UserError(_UNSEEN)
            found = differentiate(ctx, NO_ACTIVATION, g)
        if found is None:
            return (None,) * 6
        dx, _, _, dgamma, dbeta, _ = ctx.needs_input_grad
        return (
            found.dv if dx else None,
            None,
            None,
            found.dgamma if dgamma else None,
            found.dbeta if dbeta else None,
            None,
        )


class Sum(Node):
    """t + residual."""

    @staticmethod
    def forward(ctx: Any, x: Pending, link: Link, inplace: bool, residual: Tensor) -> Pending:
        """A tensor that stands for the sum."""
        ctx.link = link
        return _placeholder(ctx, x, inplace)

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of both."""
        g, link = grads[0], ctx.link
        found = link.d_residual.take()
        if g is None:
            return None, None, None, found
        if found is not None:
            raise UserError(_UNSEEN)
        return g, None, None, g if ctx.needs_input_grad[3] else None


class Activated(Node):
    """min(max(t, 0), cap)."""

    @staticmethod
    def forward(ctx: Any, x: Pending, link: Link, inplace: bool) -> Pending:
        """A tensor that stands for the result."""
        ctx.link = link
        return _placeholder(ctx, x, inplace)

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Where 0 < t < cap."""
        g, link = grads[0], ctx.link
        if g is None:
            return None, None, None
        if link.passing is None:
            raise UserError(_UNSEEN)
        return g * link.passing, None, None


@dataclass(slots=True, eq=False)
class Call:
    """What travels beside the tensors to the end of a chain, and what comes back.

    Args:
        link, node: the last step, and its node in autograd's graph.
        content: the result.
        behind, request: the layer that takes the codes, and how; None: the result is wanted as a tensor.
        want_out: whether it is wanted as a tensor, too.
    """

    link: Link
    node: Any
    content: Affine
    behind: LayerState | None
    request: Request | None
    want_out: bool
    out: Tensor | None = None
    quantized: Quantized | None = None
    back: GradientReturn | None = None
    cap_clips: bool = False


class End(Node):
    """The end of a chain: the arithmetic of all its steps, and of their gradients."""

    @staticmethod
    def forward(ctx: Any, w: Pending, alpha: Tensor | None, call: Call) -> Tensor:
        """The result; `w` itself, now a result of this node, where a layer takes the codes."""
        ctx.set_materialize_grads(False)
        call.out, call.quantized, passes, call.cap_clips = call.content.apply(call.request, call.want_out)
        ctx.cap_clips = call.cap_clips
        quantized, behind = call.quantized, call.behind
        packed = None if quantized is None else quantized.packed
        mask = None if quantized is None else quantized.mask
        ctx.save_for_backward(passes, None if packed is None else packed.data, mask)
        ctx.packed = None if packed is None else (packed.shape, packed.stride, packed.signed)
        ctx.link, ctx.node, ctx.back = call.link, call.node, None
        ctx.alpha_shape = () if alpha is None else alpha.shape
        if quantized is None or behind is None:
            assert call.out is not None
            return call.out
        assert not isinstance(quantized.amax, Tensor)
        saw_operand(behind, quantized.amax, call.out, quantized.tensor)
        ctx.back = call.back = GradientReturn()
        ctx.mark_dirty(w)
        return w

    @staticmethod
    @_once
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Leaves the gradients of the steps with them; or that of the result, where somebody may see a tensor between two."""
        do, (passes, data, mask), back = grads[0], ctx.saved_tensors, ctx.back
        dq, dq_scale = (None if back is None else back.grad.take()) or (None, 1.0)
        d_alpha = None if back is None else back.clipped.take()
        packed = None if ctx.packed is None else Packed(data, *ctx.packed)
        dw, clipped = None, 0.0
        if do is not None or dq is not None:
            chain = list(steps(ctx.link, ctx.node))
            if any(link.kind != "product" and link.is_visible() for link, _ in chain[1:]):
                dw, clipped = _by_itself(ctx, do, dq, dq_scale, packed, mask, passes)
            else:
                clipped = _all_at_once(ctx, chain, do, dq, dq_scale, packed, mask, passes)
        if dq is not None and ctx.needs_input_grad[1]:
            d_alpha = (
                torch.full(ctx.alpha_shape, clipped, dtype=torch.float32) if d_alpha is None else d_alpha + clipped
            )
        return dw, d_alpha, None


def steps(link: Link | None, node: Any) -> Iterator[tuple[Link, Any]]:
    """The steps of a chain and their nodes, from the last one on."""
    while link is not None:
        yield link, node
        link, node = link.before, link.node


def normalization_of(link: Link, node: Any) -> Any:
    """The node of a chain's normalization; None where it has no gradient."""
    return next(node for link, node in steps(link, node) if link.kind == "norm")


def _all_at_once(
    ctx: Any, chain: list[tuple[Link, Any]], do: Tensor | None, dq: Tensor | None, dq_scale: float, *saved: Any
) -> float:
    """Compute the gradients of all steps, and leave them there; returns what was clipped."""
    norm = total = None
    for link, node in chain:
        if link.kind == "norm":
            norm = node
        elif link.kind == "sum":
            total = link, node
    assert norm is not None
    want_residual = total is not None and total[1].needs_input_grad[3]
    packed, mask, passes = saved
    found = differentiate(norm, ctx.link.act, do, dq, dq_scale, packed, mask, passes, ctx.cap_clips, want_residual)
    norm.link.gradients.leave(found)
    if total is not None:
        total[0].d_residual.leave(found.d_residual)
    return found.clipped


def _by_itself(
    ctx: Any,
    do: Tensor | None,
    dq: Tensor | None,
    dq_scale: float,
    packed: Packed | None,
    mask: Tensor | None,
    passes: Tensor | None,
) -> tuple[Tensor, float]:
    """The gradient of the result, for the steps to go on from; and what was clipped."""
    some = do if do is not None else dq
    assert some is not None
    dw = torch.zeros_like(some, dtype=torch.float32) if do is None else do
    dw = dw.contiguous(memory_format=torch.channels_last)
    sign = inside = None
    if packed is not None and mask is not None:
        sign, inside = packed.unpack(torch.float32).sign(), unpack_mask(mask, dw)
    passing = torch.ones_like(dw, dtype=torch.bool)
    if ctx.link.act.clips:
        if passes is not None:
            passing = unpack_mask(passes, dw)
        elif sign is not None and inside is not None:
            passing = inside | (sign != 0)
        ctx.link.passing = passing
    if dq is None or sign is None or inside is None:
        return dw, 0.0
    dq = dq.to(torch.float32) * dq_scale
    outside = ~inside if ctx.cap_clips else ~inside & passing
    clipped = float((dq * sign * outside).sum(dtype=torch.float64))
    return dw + dq * inside, clipped


def differentiate(
    norm: Any,
    act: Activation,
    do: Tensor | None,
    dq: Tensor | None = None,
    dq_scale: float = 1.0,
    packed: Packed | None = None,
    mask: Tensor | None = None,
    passes: Tensor | None = None,
    cap_clips: bool = False,
    want_residual: bool = False,
) -> NormGradients:
    """The gradients of a normalization and of what follows it; that of its input is left to the layer before, quantized,
    where nobody else may see it.

    Args:
        norm: the node of the normalization.
    """
    v, moments, gamma = norm.saved_tensors
    product: Link = norm.link.before
    result, state = product.result, product.state
    specs: tuple[QuantSpec, ...] = ()
    if not norm.needs_input_grad[0] or product.is_visible():
        result = None
    if result is not None and state is not None:
        specs = gradient_specs(state, *result.needs)
    if do is not None:
        do = do.resolve_neg().to(torch.float32).contiguous(memory_format=torch.channels_last)

    def run(specs: tuple[QuantSpec, ...]) -> NormGradients:
        exponent = state.scalings["g"].stored if specs and state is not None else None
        normalized = Normalized(v, norm.format, moments)
        call = NormBackward(
            normalized,
            gamma,
            act,
            norm.layout,
            dq,
            dq_scale,
            packed,
            mask,
            passes,
            cap_clips,
            do,
            want_residual,
            specs,
            exponent,
        )
        found = NORM_BACKWARD(call)
        if found is None:
            raise UserError("the kernels were switched off inside a fused chain: switch them off around the whole step")
        return found

    found = run(specs)
    if result is None or state is None:
        return found
    if not found.quantized:
        result.g.leave((found.dv, found.amax))
    else:
        dv = run(()).dv if state.observer is not None else None
        first = bool(specs) and specs[0] is state.spec.g_dgrad
        slots = ("g_dgrad", "g_wgrad") if len(found.quantized) == 2 else ("g_dgrad",) if first else ("g_wgrad",)
        by_slot = dict(zip(slots, found.quantized, strict=True))
        amax = found.quantized[0].amax
        assert not isinstance(amax, Tensor)
        saw_gradient(state, amax, dv, [(slot, q.tensor) for slot, q in by_slot.items()])
        result.quantized.leave((by_slot.get("g_dgrad"), by_slot.get("g_wgrad")))
    return NormGradients(None, (), found.dgamma, found.dbeta, found.d_residual, found.clipped, found.amax)
