"""One direction of one recurrent layer, as one autograd node.

    forward, step by step    u = Q(h) Q(w_hh)^T                   the product under the spec of the hidden part
                             h', c' = cell(Q(x) Q(w_ih)^T + b_ih, u + b_hh, h, c)
                             h' = Q(h') Q(w_hr)^T                 where the layer has projections (LSTM)
    backward, in reverse     gradients of the gates from those of h' and c';  dh = Q(g) Q(w_hh) masked
    at the end               dw_hh = sum over all steps of Q(g)^T Q(h), in one product;  dx and dw_ih likewise

The product with the inputs is one for all steps, before the first. Weights are quantized once per forward pass, the hidden
state at every step, the gradient of a step when it is known. All steps see one exponent of GradScale, which moves by one
vote of the largest gradient among them. Gates, cell state and biases are in float32.

Sequences of different lengths come as torch packs them: the rows of step t are `batch_sizes[t]` many, longest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourbit.ops._cells import LSTM_CELL, Cell
from fourbit.ops._contract import full_precision
from fourbit.ops._gemms import backward, clip_gradient, fprop
from fourbit.ops._quantize import (
    awaits_first_batch,
    awaits_first_gradient,
    see_first_batch,
    see_first_gradient,
)
from fourbit.ops._recurrent_products import LINEAR, Differentiating, Plain, Quantizing, learned, plain_dgrad
from fourbit.ops._saved import NUM_TENSORS, Saved
from fourbit.ops._second_derivatives import once, refuse_forward_mode, refuse_transforms
from fourbit.ops._state import LayerState
from fourbit.ops._watcher import computing, owns


@dataclass(frozen=True)
class Recurrence:
    """One direction of one layer: its cell, the states of its products (hr None: no projection), and its sequences.

    `batch_sizes`: rows of each step, not growing; `reverse`: from the last step to the first.
    """

    cell: Cell
    ih: LayerState
    hh: LayerState
    hr: LayerState | None
    batch_sizes: Sequence[int]
    reverse: bool

    def steps(self, backwards: bool = False) -> Iterator[tuple[slice, int]]:
        """Rows of the packed data, and how many, step by step in the order of computation (`backwards`: the opposite)."""
        ends = list(accumulate(self.batch_sizes))
        found = [(slice(end - size, end), size) for end, size in zip(ends, self.batch_sizes, strict=True)]
        return iter(found[::-1] if self.reverse != backwards else found)


def recurrent(
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: tuple[Tensor, Tensor, Tensor | None],
    biases: tuple[Tensor | None, Tensor | None],
    layer: Recurrence,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Outputs, last hidden state and last cell state of one direction of one layer.

    Args:
        x: packed inputs [sum of batch_sizes, I].
        h, c: first hidden state [B, H or projection] and cell state [B, H] (None for a GRU).
        weights: w_ih [G H, I], w_hh [G H, H or projection], w_hr [projection, H] or None.
        biases: b_ih, b_hh [G H] or None.
    """
    refuse_transforms()
    for state in (layer.ih, layer.hh, layer.hr):
        if state is not None:
            state.with_gradients = torch.is_grad_enabled()
    alphas = [a for state in (layer.ih, layer.hh, layer.hr) for a in (_alphas(state))]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with full_precision(device):
        y, h, c = _Recurrent.apply(x, h, c, *weights, *biases, *alphas, layer)
    return y.to(dtype), h.to(dtype), None if c is None else c.to(dtype)


def _alphas(state: LayerState | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if state is None else (state.parameter("x"), state.parameter("w"))


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        x, h, c, w_ih, w_hh, w_hr, b_ih, b_hh, *_, layer = arguments
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, h = x.detach().to(compute), h.detach().to(compute)
        c = None if c is None else c.detach().to(compute)
        with computing(layer.ih, x.numel()):
            gates, saved_ih = fprop(x, w_ih, LINEAR, layer.ih, compute, learned(layer.ih))
        if b_ih is not None:
            gates += b_ih
        if b_hh is not None and not layer.cell.keeps_h:
            gates += b_hh
            b_hh = None
        if h.shape[0] and awaits_first_batch(layer.hh, "x"):
            seen, _ = _sweep(layer, gates, h, c, Plain(w_hh), None if w_hr is None else Plain(w_hr), b_hh)
            see_first_batch(layer.hh, "x", seen.hiddens)
            if layer.hr is not None:
                see_first_batch(layer.hr, "x", seen.inputs)
        hh = Quantizing(w_hh, layer.hh, compute)
        hr = None if w_hr is None or layer.hr is None else Quantizing(w_hr, layer.hr, compute)
        run, (h, c) = _sweep(layer, gates, h, c, hh, hr, b_hh)
        tensors: list[Tensor | None] = []
        outlines = []
        parts = ((layer.ih, [saved_ih]), (layer.hh, hh.saved), (layer.hr, [] if hr is None else hr.saved))
        for state, part in parts:
            found = [t for saved in part for t in saved.tensors()]
            if state is not None:
                owns(state, found)
            outlines.append([saved.outline() for saved in part])
            tensors += found
        ctx.save_for_backward(run.gates, run.cells, run.gates_h, run.before, *tensors)
        ctx.outlines, ctx.layer, ctx.compute = outlines, layer, compute
        ctx.shapes = h.shape, None if c is None else c.shape
        ctx.set_materialize_grads(False)
        return run.outputs, h, c

    jvp = staticmethod(refuse_forward_mode)

    @staticmethod
    @once("a gradient of a quantized recurrent layer", "take the penalty elsewhere, or call restore(model) first")
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, cells, gates_h, before, *tensors = ctx.saved_tensors
        parts: list[list[Saved]] = []
        for outlines in ctx.outlines:
            parts.append(Saved.of_several(outlines, tensors))
            del tensors[: NUM_TENSORS * len(outlines)]
        (saved_ih,), hh_steps, hr_steps = parts
        layer: Recurrence = ctx.layer
        needs = ctx.needs_input_grad
        with full_precision(gates.device.type):
            hh = Differentiating(hh_steps, layer.hh, ctx.compute, layer.reverse)
            hr = Differentiating(hr_steps, layer.hr, ctx.compute, layer.reverse) if layer.hr is not None else None
            kept = _Kept(gates, cells, gates_h, before)
            if any(awaits_first_gradient(state) for state in (layer.hh, layer.hr) if state is not None):
                project = plain_dgrad(hr_steps) if hr_steps else None
                seen = _sweep_back(layer, kept, grads, ctx.shapes, plain_dgrad(hh_steps), project)
                see_first_gradient(layer.hh, seen.gates_h)
                if layer.hr is not None:
                    see_first_gradient(layer.hr, seen.outputs)
            run = _sweep_back(layer, kept, grads, ctx.shapes, hh, hr)
            d_gates, d_gates_h, d_outputs, dh, dc = run
            dw_hh, *alphas_hh = hh.finish(d_gates_h, needs[4] or needs[11])
            dw_hr, *alphas_hr = (None, None, None) if hr is None else hr.finish(d_outputs, needs[5] or needs[13])
            wanted = needs[0] or needs[8], needs[3] or needs[9]
            dtypes = ctx.compute, ctx.compute
            dx, dw_ih, *alphas_ih = backward(d_gates, saved_ih, LINEAR, layer.ih, dtypes, wanted)
        db_ih = d_gates.sum(0) if needs[6] else None
        db_hh = d_gates_h.sum(0) if needs[7] else None
        alphas = map(clip_gradient, (*alphas_ih, *alphas_hh, *alphas_hr))
        found = (dx, dh, dc, dw_ih, dw_hh, dw_hr, db_ih, db_hh, *alphas)
        return (*(g if need else None for g, need in zip(found, needs[:-1], strict=True)), None)


class _Kept(NamedTuple):
    """What the cell left for backward; see `_Run`."""

    gates: Tensor
    cells: Tensor | None
    gates_h: Tensor | None
    before: Tensor | None


class _BackRun(NamedTuple):
    """Gradients, by packed rows, of both shares of the gates and of the outputs before the projection's product; and of the
    first states."""

    gates: Tensor
    gates_h: Tensor
    outputs: Tensor
    h: Tensor
    c: Tensor | None


def _sweep_back(
    layer: Recurrence,
    kept: _Kept,
    grads: Sequence[Tensor | None],
    shapes: tuple[torch.Size, torch.Size | None],
    dgrad: Callable[[Tensor], Tensor],
    project: Callable[[Tensor], Tensor] | None,
) -> _BackRun:
    """All steps of the backward pass; `dgrad` and `project` give the gradients of the products' inputs, step by step."""
    gates, cells, gates_h, before = kept
    dy, dh, dc = grads
    h_shape, c_shape = shapes
    dh = gates.new_zeros(h_shape) if dh is None else dh.to(gates.dtype).clone()
    dc = None if c_shape is None else gates.new_zeros(c_shape) if dc is None else dc.to(gates.dtype).clone()
    d_gates = torch.empty_like(gates)
    d_gates_h = torch.empty_like(gates) if layer.cell.keeps_h else d_gates
    d_outputs = gates.new_zeros((gates.shape[0], h_shape[1]) if project is not None else 0)
    steps = list(layer.steps(backwards=True))
    if isinstance(dgrad, Differentiating) and layer.cell is LSTM_CELL and project is None:
        assert dc is not None and cells is not None
        if dgrad.run_lstm([(rows.start, size) for rows, size in steps], dy, dh, dc, gates, cells, d_gates):
            return _BackRun(d_gates, d_gates, d_outputs, dh, dc)
    for rows, size in steps:
        step = dh[:size] if dy is None else dh[:size] + dy[rows]
        if project is not None:
            d_outputs[rows] = step
            step = project(step)
        found = layer.cell.backward(
            step,
            None if dc is None else dc[:size],
            gates[rows],
            None if gates_h is None else gates_h[rows],
            None if before is None else before[rows],
            None if cells is None else cells[0][rows],
            None if cells is None else cells[1][rows],
            d_gates[rows],
        )
        if d_gates_h is not d_gates:
            d_gates_h[rows] = found.gates_h
        through = dgrad(found.gates_h)
        dh[:size] = through if found.h is None else through + found.h
        if dc is not None and found.c is not None:
            dc[:size] = found.c
    return _BackRun(d_gates, d_gates_h, d_outputs, dh, dc)


@dataclass
class _Run:
    """What a pass over all steps leaves, by packed rows: the gates as the cell keeps them; cell states before and after
    [2, N, H]; for cells that need them the hidden share of the gates and the hidden state before; the outputs; of a pass in
    full precision, what entered the products."""

    gates: Tensor
    cells: Tensor | None
    gates_h: Tensor | None
    before: Tensor | None
    outputs: Tensor
    hiddens: Tensor
    inputs: Tensor


def _sweep(
    layer: Recurrence, gates_x: Tensor, h: Tensor, c: Tensor | None, hh: Any, hr: Any, b_hh: Tensor | None
) -> tuple[_Run, tuple[Tensor, Tensor | None]]:
    """All steps of the forward pass."""
    cell = layer.cell
    num_rows, size_h = gates_x.shape[0], gates_x.shape[1] // cell.num_gates
    c = None if c is None else c.clone()
    kept = torch.empty_like(gates_x)
    cells = None if c is None else gates_x.new_empty(2, num_rows, size_h)
    gates_h = torch.empty_like(gates_x) if cell.keeps_h else None
    before = gates_x.new_empty(num_rows, h.shape[1]) if cell.keeps_h else None
    outputs = gates_x.new_empty(num_rows, h.shape[1])
    plain = isinstance(hh, Plain)
    hiddens = gates_x.new_empty(num_rows, h.shape[1]) if plain else gates_x.new_empty(0)
    inputs = gates_x.new_empty(num_rows, size_h) if plain and hr is not None else gates_x.new_empty(0)
    steps = list(layer.steps())
    if isinstance(hh, Quantizing) and cell is LSTM_CELL and hr is None:
        assert c is not None and cells is not None
        last = h.clone()
        if hh.run_lstm([(rows.start, size) for rows, size in steps], gates_x, last, c, kept, cells, outputs):
            return _Run(kept, cells, None, None, outputs, hiddens, inputs), (last, c)
    for rows, size in steps:
        old = h[:size]
        if plain:
            hiddens[rows] = old
        product = hh(old)
        if b_hh is not None:
            product += b_hh
        if gates_h is not None and before is not None:
            gates_h[rows], before[rows] = product, old
        new, new_c = cell.forward(gates_x[rows], product, old, None if c is None else c[:size], kept[rows])
        if cells is not None and c is not None and new_c is not None:
            cells[0][rows], cells[1][rows] = c[:size], new_c
            c[:size] = new_c
        if hr is not None:
            if plain:
                inputs[rows] = new
            new = hr(new)
        h = new if size == h.shape[0] else torch.cat((new, h[size:]))  # not in place: the products may have kept it
        outputs[rows] = new
    return _Run(kept, cells, gates_h, before, outputs, hiddens, inputs), (h, c)
