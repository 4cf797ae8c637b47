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
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourbit import backends
from fourbit.ops._contract import (
    Saved,
    flatten,
    full_precision,
    quantize_weight,
    run_backward,
    run_forward,
    unflatten,
)
from fourbit.ops._contraction import LinearMap
from fourbit.ops._product import Operand
from fourbit.ops._spec import LayerSpec
from fourbit.ops._state import LayerState
from fourbit.ops._watch import computing, owns
from fourbit.quantizers import ClipValue, Packed, carrier_dtype

_LINEAR = LinearMap()


class CellGradient(NamedTuple):
    """Gradients of one step: of the hidden state's share of the gates, of the cell state before it (None: there is none), and
    of the hidden state before it beside the product (None: 0)."""

    gates_h: Tensor
    c: Tensor | None
    h: Tensor | None


@dataclass(frozen=True)
class Cell:
    """What is between the products.

    Args:
        num_gates: rows of the weights per unit.
        has_c: whether there is a cell state.
        forward: (gates_x [B, G H], gates_h [B, G H], h [B, H], c [B, H], kept [B, G H]) -> (h', c'); `kept` takes what
            backward needs of the gates.
        backward: (dh', dc', kept, gates_h, h, c, c', out [B, G H]) -> CellGradient; `out` takes the gradient of the input's
            share of the gates. Where the cell does not keep h, both shares have one gradient, and `gates_h` is `out`.
        keeps_h: whether backward needs gates_h and h; otherwise only the sum of both shares matters.
    """

    name: str
    num_gates: int
    has_c: bool
    forward: Callable[..., tuple[Tensor, Tensor | None]]
    backward: Callable[..., CellGradient]
    keeps_h: bool


def _lstm_forward(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """c' = f c + i g, h' = o tanh(c'), with i, f, o = sigmoid and g = tanh of the gates, in torch's order i, f, g, o."""
    done = backends.dispatch("lstm_forward", gates_x, gates_h, c, kept)
    if done is not None:
        return done
    gates = torch.add(gates_x, gates_h, out=kept)
    size = c.shape[1]
    gates[:, : 2 * size].sigmoid_()
    gates[:, 2 * size : 3 * size].tanh_()
    gates[:, 3 * size :].sigmoid_()
    i, f, g, o = gates.chunk(4, 1)
    new = torch.addcmul(f * c, i, g)
    return o * new.tanh(), new


def _lstm_backward(
    dh: Tensor, dc: Tensor, gates: Tensor, gates_h: Tensor | None, h: Tensor | None, c: Tensor, new: Tensor, out: Tensor
) -> CellGradient:
    done = backends.dispatch("lstm_backward", dh, dc, gates, c, new, out)
    if done is not None:
        return CellGradient(out, done, None)
    i, f, g, o = gates.chunk(4, 1)
    t = new.tanh()
    dc = torch.addcmul(dc, dh * o, 1 - t * t)
    torch.cat((dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dh * t * o * (1 - o)), 1, out=out)
    return CellGradient(out, dc * f, None)


def _gru_forward(gates_x: Tensor, gates_h: Tensor, h: Tensor, c: None, kept: Tensor) -> tuple[Tensor, None]:
    """h' = (1 - z) n + z h, with r, z = sigmoid(x + h), n = tanh(x + r h) of the gates, in torch's order r, z, n."""
    size = h.shape[1]
    r, z = torch.add(gates_x[:, : 2 * size], gates_h[:, : 2 * size], out=kept[:, : 2 * size]).sigmoid_().chunk(2, 1)
    n = torch.addcmul(gates_x[:, 2 * size :], r, gates_h[:, 2 * size :], out=kept[:, 2 * size :]).tanh_()
    return torch.lerp(n, h, z), None


def _gru_backward(
    dh: Tensor, dc: None, gates: Tensor, gates_h: Tensor, h: Tensor, c: None, new: None, out: Tensor
) -> CellGradient:
    r, z, n = gates.chunk(3, 1)
    dn = dh * (1 - z) * (1 - n * n)
    dz = dh * (h - n) * z * (1 - z)
    dr = dn * gates_h[:, 2 * h.shape[1] :] * r * (1 - r)
    torch.cat((dr, dz, dn), 1, out=out)
    return CellGradient(torch.cat((dr, dz, dn * r), 1), None, dh * z)


LSTM_CELL = Cell("LSTM", 4, True, _lstm_forward, _lstm_backward, keeps_h=False)
GRU_CELL = Cell("GRU", 3, False, _gru_forward, _gru_backward, keeps_h=True)


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
    alphas = [a for state in (layer.ih, layer.hh, layer.hr) for a in (_alphas(state))]
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with full_precision(device):
        y, h, c = _Recurrent.apply(x, h, c, *weights, *biases, *alphas, layer)
    return y.to(dtype), h.to(dtype), None if c is None else c.to(dtype)


def _alphas(state: LayerState | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if state is None else (state.x_alpha, state.w_alpha)


def _learned(state: LayerState) -> tuple[bool, bool]:
    return state.x_alpha is not None, state.w_alpha is not None


class _Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        x, h, c, w_ih, w_hh, w_hr, b_ih, b_hh, *_, layer = arguments
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        x, h = x.detach().to(compute), h.detach().to(compute)
        c = None if c is None else c.detach().to(compute)
        with computing(layer.ih, x.numel()):
            gates, saved_ih = run_forward(x, w_ih, _LINEAR, layer.ih.spec, layer.ih, compute, _learned(layer.ih))
        if b_ih is not None:
            gates += b_ih
        if b_hh is not None and not layer.cell.keeps_h:
            gates += b_hh
            b_hh = None
        if h.shape[0] and layer.hh.awaits_first_batch("x"):
            seen, _ = _sweep(layer, gates, h, c, _Plain(w_hh), None if w_hr is None else _Plain(w_hr), b_hh)
            layer.hh.see_first_batch("x", seen.hiddens)
            if layer.hr is not None:
                layer.hr.see_first_batch("x", seen.inputs)
        hh = _Quantizing(w_hh, layer.hh, compute)
        hr = None if w_hr is None or layer.hr is None else _Quantizing(w_hr, layer.hr, compute)
        run, (h, c) = _sweep(layer, gates, h, c, hh, hr, b_hh)
        tensors: list[Tensor | None] = []
        outlines = []
        parts = ((layer.ih, [saved_ih]), (layer.hh, hh.saved), (layer.hr, [] if hr is None else hr.saved))
        for state, part in parts:
            flat = [flatten(saved) for saved in part]
            if state is not None:
                owns(state, [t for found, _ in flat for t in found])
            outlines.append([outline for _, outline in flat])
            tensors += [t for found, _ in flat for t in found]
        ctx.save_for_backward(run.gates, run.cells, run.gates_h, run.before, *tensors)
        ctx.outlines, ctx.layer, ctx.compute = outlines, layer, compute
        ctx.shapes = h.shape, None if c is None else c.shape
        ctx.set_materialize_grads(False)
        return run.outputs, h, c

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gates, cells, gates_h, before, *tensors = ctx.saved_tensors
        parts: list[list[Saved]] = []
        for outlines in ctx.outlines:
            parts.append([unflatten(o, tensors[10 * i : 10 * i + 10]) for i, o in enumerate(outlines)])
            del tensors[: 10 * len(outlines)]
        (saved_ih,), hh_steps, hr_steps = parts
        layer: Recurrence = ctx.layer
        needs = ctx.needs_input_grad
        with full_precision(gates.device.type):
            hh = _Differentiating(hh_steps, layer.hh, ctx.compute, layer.reverse)
            hr = _Differentiating(hr_steps, layer.hr, ctx.compute, layer.reverse) if layer.hr is not None else None
            kept = _Kept(gates, cells, gates_h, before)
            if layer.hh.awaits_first_gradient() or (layer.hr is not None and layer.hr.awaits_first_gradient()):
                seen = _sweep_back(layer, kept, grads, ctx.shapes, _plainly(hh_steps), _plainly(hr_steps))
                layer.hh.see_first_gradient(seen.gates_h)
                if layer.hr is not None:
                    layer.hr.see_first_gradient(seen.outputs)
            run = _sweep_back(layer, kept, grads, ctx.shapes, hh.dgrad, None if hr is None else hr.dgrad)
            d_gates, d_gates_h, d_outputs, dh, dc = run
            dw_hh, *alphas_hh = hh.finish(d_gates_h, needs[4] or needs[11])
            dw_hr, *alphas_hr = (None, None, None) if hr is None else hr.finish(d_outputs, needs[5] or needs[13])
            wanted = needs[0] or needs[8], needs[3] or needs[9]
            dtypes = ctx.compute, ctx.compute
            dx, dw_ih, *alphas_ih = run_backward(d_gates, saved_ih, _LINEAR, layer.ih.spec, layer.ih, dtypes, wanted)
        db_ih = d_gates.sum(0) if needs[6] else None
        db_hh = d_gates_h.sum(0) if needs[7] else None
        found = (dx, dh, dc, dw_ih, dw_hh, dw_hr, db_ih, db_hh, *alphas_ih, *alphas_hh, *alphas_hr)
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
    for rows, size in layer.steps(backwards=True):
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


def _plainly(steps: list[Saved]) -> Any:
    """dgrad in full precision, with the weight as it was quantized; None without steps."""
    if not steps:
        return None
    kept = _unpacked(steps[0].w)
    w = kept.to(torch.float32) if kept.scale is None else kept.to(torch.float32) * kept.scale
    return lambda g: g @ w.to(g.dtype)


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
    plain = isinstance(hh, _Plain)
    hiddens = gates_x.new_empty(num_rows, h.shape[1]) if plain else gates_x.new_empty(0)
    inputs = gates_x.new_empty(num_rows, size_h) if plain and hr is not None else gates_x.new_empty(0)
    for rows, size in layer.steps():
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


class _Plain:
    """x w^T in full precision."""

    def __init__(self, w: Tensor):
        self._w = w.detach().t()

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self._w.to(x.dtype)


class _Quantizing:
    """x w^T under the spec, step by step, with a weight that is quantized once."""

    def __init__(self, w: Tensor, state: LayerState, compute: torch.dtype):
        self._state, self._compute = state, compute
        state.begin()
        weight = quantize_weight(w, _LINEAR, state.spec, state)
        self._weight = replace(weight, fprop=weight.fprop._replace(cache={}))
        self.saved: list[Saved] = []

    def __call__(self, x: Tensor) -> Tensor:
        state = self._state
        with computing(state, x.numel()):
            y, saved = run_forward(x, self._weight, _LINEAR, state.spec, state, self._compute, _learned(state))
        self.saved.append(saved)
        return y


class _Differentiating:
    """The backward pass of `_Quantizing`: dgrad from the last step to the first, and one wgrad over all of them."""

    def __init__(self, steps: list[Saved], state: LayerState, compute: torch.dtype, reverse: bool):
        self._steps, self._state, self._dtypes, self._reverse = steps, state, (compute, compute), reverse
        self._left = len(steps)
        self._alpha: Tensor | None = None
        self._w = _unpacked(steps[0].w)._replace(cache={}) if steps else None

    def dgrad(self, g: Tensor) -> Tensor:
        """The gradient of this step's input."""
        self._left -= 1
        saved = self._steps[self._left]
        assert self._w is not None
        saved.w = self._w
        spec, state = self._state.spec, self._state
        dx, _, alpha, _ = run_backward(g, saved, _LINEAR, spec, state, self._dtypes, (True, False))
        if alpha is not None:
            self._alpha = alpha if self._alpha is None else self._alpha + alpha
        assert dx is not None
        return dx

    def finish(self, g: Tensor, needed: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dw, and the gradients of the clip values of input and weight; `g` in the packed order of rows."""
        if not self._steps or not needed:
            return None, self._alpha, None
        spec, state = self._state.spec, self._state
        first = self._steps[0]
        x = _stacked([s.x for s in (reversed(self._steps) if self._reverse else self._steps)], spec)
        saved = Saved(x, first.w, None, first.w_codes, None, first.w_mask, first.x_layout, first.w_layout)
        _, dw, _, alpha = run_backward(g, saved, _LINEAR, spec, state, self._dtypes, (False, True))
        return dw, self._alpha, alpha


def _unpacked(kept: Operand) -> Operand:
    """Codes in their carrier, so that not every step has to unpack them."""
    if not isinstance(kept.q, Packed) or kept.format is None:
        return kept
    return kept._replace(q=kept.q.unpack(carrier_dtype(kept.format)))


def _stacked(steps: list[Operand], spec: LayerSpec) -> Operand:
    """The operands of all steps as one; with one scale, if all have the same."""
    first = steps[0]
    resolved = spec.resolved("x_wgrad")
    if first.scale is None or (resolved is not None and isinstance(resolved.scaling, ClipValue)):
        return first._replace(q=torch.cat([_numbers(s) for s in steps]))
    dtype = first.scale.dtype
    numbers = [s.to(dtype) if s.scale is None else s.to(dtype) * s.scale for s in steps]
    return Operand(torch.cat(numbers), None, first.format)


def _numbers(kept: Operand) -> Tensor:
    q = _unpacked(kept).q
    assert isinstance(q, Tensor)
    return q
