"""The products of a recurrent layer with its hidden state: step by step, or all steps of an LSTM in one call of a backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fourbit.backends import Operation
from fourbit.formats import Format
from fourbit.ops._contraction import LinearMap
from fourbit.ops._gemms import backward, fprop, quantize_weight
from fourbit.ops._product import Layout, Operand
from fourbit.ops._quantize import clip_request, gradient_request, saw_gradient, saw_operand
from fourbit.ops._saved import Saved
from fourbit.ops._spec import LayerSpec
from fourbit.ops._state import LayerState
from fourbit.ops._watcher import computing
from fourbit.quantizers import Packed, Request, Rounded, carrier_dtype, scale_of

LINEAR = LinearMap()

Rows = tuple[int, int]
"""First packed row of a step, and how many rows it has."""


@dataclass(frozen=True)
class LstmForward:
    """All steps of an LSTM without projection, for a backend.

    Args:
        steps: in the order of computation.
        gates_x: the inputs' share of the gates, with all biases [N, 4 H].
        h, c: states before the first step [B, H]; they become those after the last.
        kept: takes the activated gates [N, 4 H].
        cells: takes the cell states before and after each step [2, N, H].
        outputs: takes the hidden states [N, H].
        request, scale: how each hidden state is quantized (its x stands for them), with what is saved for backward.
        w: quantized weight [4 H, H].
        output: format of the products.
    """

    steps: Sequence[Rows]
    gates_x: Tensor
    h: Tensor
    c: Tensor
    kept: Tensor
    cells: Tensor
    outputs: Tensor
    request: Request
    scale: Tensor
    w: Operand
    output: Format | None


@dataclass(frozen=True)
class LstmBackward:
    """The same backward.

    Args:
        steps: in the order of computation, from the last to the first.
        dy: gradient of the outputs [N, H], or None.
        dh, dc: gradients of the states after the last step [B, H]; they become those before the first.
        gates, cells: as the forward pass kept them.
        d_gates: takes the gradient of the gates [N, 4 H].
        request, scale: how each step's gradient of the gates is quantized.
        w: quantized weight [4 H, H].
        masks, codes: of each step's hidden state, in the order of `steps`; None: there is no clip value, or none that learns.
        output: format of the products.
    """

    steps: Sequence[Rows]
    dy: Tensor | None
    dh: Tensor
    dc: Tensor
    gates: Tensor
    cells: Tensor
    d_gates: Tensor
    request: Request
    scale: Tensor
    w: Operand
    masks: Sequence[Tensor | None]
    codes: Sequence[Packed | None]
    output: Format | None


LSTM_RUN: Operation[[LstmForward], list[Rounded]] = Operation(
    "lstm_run", reference="(the steps one after the other, by lstm_forward and the products)"
)
"""All steps of an LSTM: the hidden state of each, in codes."""
LSTM_RUN_BACK: Operation[[LstmBackward], tuple[list[float], Tensor | None]] = Operation(
    "lstm_run_back", reference="(the steps one after the other, by lstm_backward and the products)"
)
"""max|g| of each step, and the gradient of the clip value."""


def learned(state: LayerState) -> tuple[bool, bool]:
    """Whether the clip values of x and w get gradients."""
    return state.parameter("x") is not None, state.parameter("w") is not None


def plain_dgrad(steps: list[Saved]) -> Callable[[Tensor], Tensor]:
    """dgrad in full precision, with the weight as it was quantized."""
    kept = _unpacked(steps[0].w.natural(LINEAR, "w"))
    w = kept.to(torch.float32) if kept.scale is None else kept.to(torch.float32) * kept.scale
    return lambda g: g @ w.to(g.dtype)


class Plain:
    """x w^T in full precision."""

    def __init__(self, w: Tensor):
        self._w = w.detach().t()

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self._w.to(x.dtype)


class Quantizing:
    """x w^T under the spec, step by step, with a weight that is quantized once."""

    def __init__(self, w: Tensor, state: LayerState, compute: torch.dtype):
        self._state, self._compute = state, compute
        state.begin()
        weight = quantize_weight(w, LINEAR, state)
        self._weight = replace(weight, fprop=weight.fprop._replace(cache={}))
        self.saved: list[Saved] = []

    def __call__(self, x: Tensor) -> Tensor:
        state = self._state
        with computing(state, x.numel()):
            y, saved = fprop(x, self._weight, LINEAR, state, self._compute, learned(state))
        self.saved.append(saved)
        return y

    def run_lstm(
        self,
        steps: Sequence[Rows],
        gates_x: Tensor,
        h: Tensor,
        c: Tensor,
        kept: Tensor,
        cells: Tensor,
        outputs: Tensor,
    ) -> bool:
        """All steps in one call of a backend, with the same results; False where there is none for it.

        Args:
            steps, gates_x, h, c, kept, cells, outputs: as in `LstmForward`; h and c change.
        """
        state, weight = self._state, self._weight
        if state.observer is not None or state.spec.accumulation is not None or self._compute != torch.float32:
            return False
        request = clip_request(state, h, in_evaluation=True)
        if request is None:
            return False
        scale, w, output = scale_of(request), weight.fprop, state.spec.output
        task = LstmForward(steps, gates_x, h, c, kept, cells, outputs, request, scale, w, output)
        done = LSTM_RUN(task)
        if done is None:
            return False  # nothing was computed, so a watcher is told nothing
        with computing(state, sum(size for _, size in steps) * h.shape[1]):
            for (_, size), rounded in zip(steps, done, strict=True):
                assert rounded.packed is not None and isinstance(rounded.amax, float)
                of_step = scale if math.isfinite(rounded.amax) else scale * math.nan
                x = Operand(rounded.packed, of_step, request.format, True)
                codes = x if learned(state)[0] else None, weight.codes if learned(state)[1] else None
                layout = Layout(torch.Size((size, h.shape[1])), (h.shape[1], 1))
                masks = rounded.mask, weight.mask
                self.saved.append(Saved(x, weight.saved, *codes, *masks, layout, weight.layout, weight.slope))
                saw_operand(state, rounded.amax, None, None)
                state.counter.piece += 1
        return True


class Differentiating:
    """The backward pass of `Quantizing`: dgrad from the last step to the first, and one wgrad over all of them."""

    def __init__(self, steps: list[Saved], state: LayerState, compute: torch.dtype, reverse: bool):
        self._steps, self._state, self._dtypes, self._reverse = steps, state, (compute, compute), reverse
        self._left = len(steps)
        self._alpha: Tensor | None = None
        self._w = _unpacked(steps[0].w.natural(LINEAR, "w"))._replace(cache={}) if steps else None

    def __call__(self, g: Tensor) -> Tensor:
        """dgrad: the gradient of this step's input."""
        self._left -= 1
        saved = self._steps[self._left]
        assert self._w is not None
        saved.w = self._w
        dx, _, alpha, _ = backward(g, saved, LINEAR, self._state, self._dtypes, (True, False))
        if alpha is not None:
            self._alpha = alpha if self._alpha is None else self._alpha + alpha
        assert dx is not None
        return dx

    def run_lstm(
        self,
        steps: Sequence[Rows],
        dy: Tensor | None,
        dh: Tensor,
        dc: Tensor,
        gates: Tensor,
        cells: Tensor,
        d_gates: Tensor,
    ) -> bool:
        """All steps in one call of a backend, with the same results; False where there is none for it.

        Args:
            steps, dy, dh, dc, gates, cells, d_gates: as in `LstmBackward`; dh and dc change.
        """
        spec, state, saved = self._state.spec, self._state, self._steps[::-1]
        if not saved or state.observer is not None or spec.accumulation is not None or self._dtypes[0] != torch.float32:
            return False
        w = self._w
        request = gradient_request(state, d_gates)
        if request is None or w is None:
            return False
        masks, codes = [s.x_mask for s in saved], [None if s.x_codes is None else s.x_codes.q for s in saved]
        if not all(q is None or isinstance(q, Packed) for q in codes):
            return False
        packed, scale = [q if isinstance(q, Packed) else None for q in codes], scale_of(request)
        task = LstmBackward(steps, dy, dh, dc, gates, cells, d_gates, request, scale, w, masks, packed, spec.output)
        with computing(state, 0):
            done = LSTM_RUN_BACK(task)
        if done is None:
            return False
        amaxes, self._alpha = done
        for amax in amaxes:
            saw_gradient(state, amax, None, ())
        self._left = 0
        return True

    def finish(self, g: Tensor, needed: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dw, and the gradients of the clip values of input and weight; `g` in the packed order of rows."""
        if not self._steps or not needed:
            return None, self._alpha, None
        state, first = self._state, self._steps[0]
        in_order = self._steps[::-1] if self._reverse else self._steps
        if state.spec.transform("x_wgrad") is not None:
            return self._finish_rotated(g, in_order)
        x = _stacked([s.x for s in in_order], state.spec)
        layouts = first.x_layout, first.w_layout
        saved = Saved(x, first.w, None, first.w_codes, None, first.w_mask, *layouts, first.w_slope)
        _, dw, _, alpha = backward(g, saved, LINEAR, state, self._dtypes, (False, True))
        return dw, self._alpha, alpha

    def _finish_rotated(self, g: Tensor, in_order: list[Saved]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The same where each step's input was rotated by itself: so is its gradient, and the products are added."""
        total: list[Tensor | None] = [None, None]
        start = 0
        for saved in in_order:
            size = saved.x_layout.shape[0]
            found = backward(g[start : start + size], saved, LINEAR, self._state, self._dtypes, (False, True))
            for i, part in enumerate((found[1], found[3])):
                before = total[i]
                total[i] = part if before is None or part is None else before + part
            start += size
        return total[0], self._alpha, total[1]


def _unpacked(kept: Operand) -> Operand:
    """Codes in their carrier, so that not every step has to unpack them."""
    if not isinstance(kept.q, Packed) or kept.format is None:
        return kept
    return kept._replace(q=kept.q.unpack(carrier_dtype(kept.format)))


def _stacked(steps: list[Operand], spec: LayerSpec) -> Operand:
    """The operands of all steps as one; with one scale, if all have the same."""
    steps = [s.natural(LINEAR, "x") for s in steps]
    first = steps[0]
    resolved = spec.resolved("x_wgrad")
    if first.scale is None or (resolved is not None and resolved.scaling.keeps_scale):
        return first._replace(q=torch.cat([_numbers(s) for s in steps]))
    dtype = first.scale.dtype
    numbers = [s.to(dtype) if s.scale is None else s.to(dtype) * s.scale for s in steps]
    return Operand(torch.cat(numbers), None, first.format)


def _numbers(kept: Operand) -> Tensor:
    q = _unpacked(kept).q
    assert isinstance(q, Tensor)
    return q
