"""Rows of several groups, each times a weight of its own, as one autograd node: the experts of a mixture.

    forward     y[rows of e]  = Q(x[rows of e]) Q(w[e])^T
    backward    dx[rows of e] = Q(g[rows of e]) Q(w[e])      masked
                dw[e]         = Q(g[rows of e])^T Q(x[rows of e]);   0 where e has no rows

Every product is that of a linear layer with the weight w[e], so a scale that is computed from the numbers (SAWB, amax) is
each expert's own. What the layer remembers is one for all experts: the clip values, which the first batch decides from the
rows of all of them, and the exponent of GradScale, which moves by one vote of the largest gradient among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.ops._contract import full_precision
from fourbit.ops._contraction import LinearMap
from fourbit.ops._gemms import backward, clip_gradient, fprop, needs_of, quantize_weight
from fourbit.ops._quantize import (
    awaits_first_batch,
    awaits_first_gradient,
    see_first_batch,
    see_first_gradient,
)
from fourbit.ops._saved import Saved
from fourbit.ops._second_derivatives import once, refuse_transforms
from fourbit.ops._state import LayerState
from fourbit.ops._watcher import computing

_LINEAR = LinearMap()


def grouped(x: Tensor, w: Tensor, sizes: Sequence[int], state: LayerState) -> Tensor:
    """The rows of each group times the transposed weight of that group, under the spec of `state`.

    Args:
        x: rows [S, K], those of the first group first.
        w: weights [E, N, K].
        sizes: rows of each of the E groups, S in all; 0 for a group without any.
        state: the layer's memory; it is updated in training mode.

    Returns:
        [S, N] in the dtype of x, or autocast's where autocast is on.

    Raises:
        UserError: a tensor on the meta device.
    """
    if x.is_meta or w.is_meta:
        raise UserError("a tensor on the meta device has no numbers to quantize: move layer and input to a real device")
    refuse_transforms()
    state.with_gradients = torch.is_grad_enabled()
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with full_precision(device), computing(state, x.numel()):
        return _Grouped.apply(x, w, state.parameter("x"), state.parameter("w"), tuple(sizes), state, dtype)


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """The groups that have rows, and which."""
    for number, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        if size:
            yield number, slice(end - size, end)


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        x_alpha: Tensor | None,
        w_alpha: Tensor | None,
        sizes: tuple[int, ...],
        state: LayerState,
        dtype: torch.dtype,
    ) -> Tensor:
        state.begin()
        for operand, t in (("x", x), ("w", w)):
            if x.shape[0] and awaits_first_batch(state, operand):
                see_first_batch(state, operand, t)
        learned = x_alpha is not None, w_alpha is not None
        y = x.new_empty(x.shape[0], w.shape[1], dtype=dtype)
        tensors: list[Tensor | None] = []
        ctx.outlines = []
        for number, rows in _groups(sizes):
            weight = quantize_weight(w[number], _LINEAR, state)
            y[rows], saved = fprop(x[rows], weight, _LINEAR, state, dtype, learned)
            tensors += saved.tensors()
            ctx.outlines.append(saved.outline())
        ctx.save_for_backward(*tensors)
        ctx.sizes, ctx.state, ctx.dtypes = sizes, state, (x.dtype, w.dtype)
        ctx.w_like = w.shape, w.stride(), w.device
        return y

    @staticmethod
    @once("a gradient of a mixture's experts", "call restore(model) first")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        state: LayerState = ctx.state
        needs = ctx.needs_input_grad
        need_x, need_w = needs_of(needs)
        shape, stride, device = ctx.w_like
        x_dtype, w_dtype = ctx.dtypes
        dx = g.new_empty(g.shape[0], shape[2], dtype=x_dtype) if need_x else None
        dw = torch.empty_strided(shape, stride, dtype=w_dtype, device=device).zero_() if need_w else None
        alphas: list[list[Tensor]] = [[], []]
        with full_precision(g.device.type):
            if g.shape[0] and awaits_first_gradient(state):
                see_first_gradient(state, g)
            parts = Saved.of_several(ctx.outlines, ctx.saved_tensors)
            for (number, rows), saved in zip(_groups(ctx.sizes), parts, strict=True):
                found = backward(g[rows], saved, _LINEAR, state, ctx.dtypes, (need_x, need_w))
                for whole, place, part in ((dx, rows, found[0]), (dw, number, found[1])):
                    if whole is not None and part is not None:
                        whole[place] = part
                for sums, alpha in zip(alphas, found[2:], strict=True):
                    if alpha is not None:
                        sums.append(alpha)
        x_alpha, w_alpha = (torch.stack(sums).sum(0) if sums else None for sums in alphas)
        clips = clip_gradient(x_alpha), clip_gradient(w_alpha)
        return (dx if needs[0] else None, dw if needs[1] else None, *clips, None, None, None)
