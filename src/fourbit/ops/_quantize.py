"""A layer's operands, quantized with what its state remembers.

    x, w    what the scaling remembers (a clip value) is looked up, or decided by the first batch; then the operand is rounded
    g       where its scale is known beforehand, one read gives the operands of dgrad and wgrad, and the largest magnitude that
            the state takes note of; otherwise it is read for that first

Beside the layer's own node, others quantize for it: a normalization before it its input, one behind it its gradient, a
recurrent sweep both. They ask how (`clip_request`, `gradient_specs`), and tell what they saw (`saw_operand`, `saw_gradient`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fourbit.ops._contraction import Contraction, LinearMap, Which
from fourbit.ops._product import in_float32
from fourbit.ops._rotate import WHICH, oriented
from fourbit.ops._spec import OPERANDS, REUSE
from fourbit.ops._state import LayerState
from fourbit.quantizers import (
    QTensor,
    Quantized,
    QuantSpec,
    Request,
    Rotation,
    amax_of,
    in_backward,
    is_packable,
    prepare,
    request_for,
    require_numbers,
    run,
    run_pair,
)

_NUMBERS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ---- forward ----


def quantize_operand(
    state: LayerState,
    slot: str,
    x: Tensor,
    spec: QuantSpec,
    save: bool = False,
    carrier: bool = True,
    toward: Tensor | None = None,
    contraction: Contraction | None = None,
) -> Quantized:
    """An operand of the forward pass; with `save`, also what backward needs of it.

    Args:
        x: dense, and without a graph; with scales for parts of it, or a rotation, as [groups, rows, spots, sums].
        carrier: False: the numbers themselves are not needed where there are packed codes of them.
        toward: an average to whose side numbers are rounded, as x.
        contraction: the product that the numbers are for; None: not for one.
    """
    format, stored, rotation, tile, wide = spec.format, None, None, None, False
    if x.dtype not in _NUMBERS:
        require_numbers(x, "quantize")
    if spec.needs_orientation:
        x, rotation, tile, wide = (
            prepare(x),
            _rotation(state, slot),
            state.spec.tile(slot),
            _is_wide(x, spec, contraction),
        )
    remembers = spec.scaling.state_class is not None
    if remembers:
        x, rotation = (x if rotation is None else prepare(rotation.apply(x))), None
        format, stored = state.scalings[slot[0]].use(x, spec.format, state)
    key = state.counter.key(slot) if spec.stochastic else None
    tile = None if tile is None or tile.is_tensor else tile
    carrier = carrier or state.observer is not None or not spec.in_tiles
    part = state.part(slot, spec.needs_orientation)
    request = Request(x, spec, format, tile, stored, key, save, carrier, rotation, wide, toward, part)
    result = run(request)
    if remembers:
        state.scalings[slot[0]].saw(result.amax, state)
    _saw(state, slot, request, result)
    return result


def awaits_first_batch(state: LayerState, operand: str) -> bool:
    """Whether the scale of "x" or "w" is to be decided by the first training batch, and is not yet."""
    return operand in state.spec.remembering() and state.scalings[operand].awaits(state)


def see_first_batch(state: LayerState, operand: str, t: Tensor) -> None:
    """Decide it by `t`, which stands for all that will be quantized in pieces."""
    state.scalings[operand].use(t, state.spec.remembering()[operand].format, state)


# ---- backward ----


def quantize_gradient(
    state: LayerState, g: Tensor, contraction: Contraction, need_x: bool, need_w: bool
) -> tuple[Quantized | None, Quantized | None]:
    """The output gradient for dgrad and wgrad; None where it is not quantized, not needed, or reused.

    With scales for parts of it, or a rotation, as [groups, rows, spots, sums].
    """
    state.counter.use()
    wgrad = state.spec.g_wgrad
    first = state.spec.g_dgrad if need_x or wgrad is REUSE else None
    second = wgrad if need_w and isinstance(wgrad, QuantSpec) else None
    one_read = _one_read(state, first, second)
    stored = None if one_read else _see(state, g, contraction)
    for_dgrad, for_wgrad = (
        None
        if spec is None
        else _gradient_request(state, slot, _oriented(state, slot, g, spec, contraction), spec, stored, contraction)
        for slot, spec in (("g_dgrad", first), ("g_wgrad", second))
    )
    if one_read and for_dgrad and for_wgrad:
        both = run_pair(for_dgrad, for_wgrad)
    else:
        both = (None if for_dgrad is None else run(for_dgrad), None if for_wgrad is None else run(for_wgrad))
    seen = both[0] or both[1]
    if one_read and seen is not None:
        state.scalings["g"].saw(seen.amax, state)
    for slot, request, result in zip(("g_dgrad", "g_wgrad"), (for_dgrad, for_wgrad), both, strict=True):
        if request is not None and result is not None:
            _saw(state, slot, request, result)
    return both


def awaits_first_gradient(state: LayerState) -> bool:
    """Whether the scale of g is to be decided by the first gradient, and is not yet."""
    return "g" in state.scalings and state.scalings["g"].awaits(state)


def see_first_gradient(state: LayerState, g: Tensor) -> None:
    """Decide it by `g`, that of a linear layer, which stands for all gradients that will come in pieces."""
    _see(state, g, LinearMap())


def _see(state: LayerState, g: Tensor, contraction: Contraction) -> Tensor | None:
    """Show the state the largest gradient, and return what the scaling needs."""
    spec = state.spec.g_scaling
    if spec is None:
        return None
    remembered = state.scalings["g"]
    if spec.in_tiles:  # one for each output channel, the rows of wgrad
        amax = amax_of(contraction.orientation("wgrad", "g", g.shape).of(g), (2, 3)).view(remembered.shape)
    else:
        amax = amax_of(g)
    return remembered.see(amax, state)


def _one_read(state: LayerState, *specs: QuantSpec | None) -> bool:
    """Whether one read of the gradient gives its operands and its largest magnitude: the scale is known beforehand."""
    scaled = state.spec.g_scaling
    return (
        state.training
        and scaled is not None
        and state.scalings["g"].is_known
        and any(specs)
        and all(s is None or (s.scaling == scaled.scaling and not s.needs_orientation) for s in specs)
    )


def _gradient_request(
    state: LayerState,
    slot: str,
    g: Tensor,
    spec: QuantSpec,
    stored: Tensor | None = None,
    contraction: Contraction | None = None,
) -> Request:
    if spec.scaling.state_class is None:
        stored = None
    elif stored is None:
        stored = state.scalings["g"].stored
    key = state.counter.key(slot) if spec.stochastic else None
    part = state.part(slot, spec.needs_orientation)
    if not spec.needs_orientation:
        return Request(g, spec, spec.format, None, stored, key, part=part)
    rotation, tile = _rotation(state, slot), state.spec.tile(slot)
    request = request_for(g, spec, tile, stored, key, rotation=rotation, wide=_is_wide(g, spec, contraction))
    return request if part is None else replace(request, part=part)


def _oriented(state: LayerState, slot: str, g: Tensor, spec: QuantSpec, contraction: Contraction) -> Tensor:
    return oriented(slot, g, contraction, state.spec)[0] if spec.needs_orientation else g


# ---- for other nodes ----


def operand_request(state: LayerState, x: Tensor) -> Request | None:
    """How a node before the layer is to quantize its input `x` (a tensor that gives only shape and layout).

    None where it cannot: see `clip_request`, or the first batch has only just decided PACT's form.
    """
    remembered = state.scalings.get("x")
    if remembered is None:
        return None
    if not in_backward():
        remembered.begin(state)
        if remembered.is_fresh and state.counter.uses:
            remembered.settle()  # a backward pass lies between
    return None if remembered.is_fresh else clip_request(state, x)  # recomputation must save what the first pass saved


def clip_request(state: LayerState, x: Tensor, in_evaluation: bool = False) -> Request | None:
    """How to quantize the input of a product in training (or in evaluation, too), from its shape and layout alone.

    None where that is not known: no batch has decided PACT's form, the codes are not packed integers with nearest rounding and
    a clip value, or the input is needed in another form.
    """
    spec = state.spec.x_fprop
    if spec is None or not (state.training or in_evaluation) or state.spec.x_wgrad is not REUSE:
        return None
    if spec.scaling.state_class is None or spec.stochastic or spec.needs_orientation:
        return None
    ahead = state.scalings["x"].clip_ahead(spec.format, state)
    return None if ahead is None else Request(x, spec, ahead[0], None, ahead[1], None, save=True)


def gradient_request(state: LayerState, g: Tensor) -> Request | None:
    """How dgrad's operand is made of one gradient like `g` after the other; None where `quantize_gradient` must do it."""
    specs = gradient_specs(state, True, False)
    return _gradient_request(state, "g_dgrad", g, specs[0]) if specs else None


def gradient_specs(state: LayerState, need_x: bool, need_w: bool) -> tuple[QuantSpec, ...]:
    """The quantizations of the output gradient that one read of it gives; () where `quantize_gradient` must see it first."""
    wgrad = state.spec.g_wgrad
    found = (state.spec.g_dgrad if need_x or wgrad is REUSE else None, wgrad if need_w else None)
    specs = tuple(s for s in found if isinstance(s, QuantSpec))
    wanted = need_x + (need_w and wgrad is not REUSE) if not (wgrad is REUSE and need_w) else 1
    if not specs or len(specs) != wanted or state.spec.compensates or any(s.stochastic for s in specs):
        return ()
    return specs if _one_read(state, *specs) else ()


def saw_operand(state: LayerState, amax: float, x: Tensor | None, quantized: QTensor | None) -> None:
    """A node before the layer has quantized its input `x` (given where somebody observes); its largest magnitude was `amax`."""
    state.scalings["x"].saw(amax, state)
    if state.observer is not None and x is not None and quantized is not None:
        state.observer.record("x_fprop", x, quantized)
    state.count_nonfinite("x_fprop", amax)


def saw_gradient(state: LayerState, amax: float, g: Tensor | None, quantized: Sequence[tuple[str, QTensor]]) -> None:
    """A node behind the layer has quantized the gradient as `gradient_specs` says; its largest magnitude was `amax`.

    Where somebody observes, `g` is the gradient itself; `quantized` has the results by slot.
    """
    state.counter.use()
    if state.observer is not None and g is not None:
        for slot, result in quantized:
            state.observer.record(slot, g, result)
    state.count_nonfinite("g_dgrad", amax)
    state.scalings["g"].saw(amax, state)


def rotation_key(state: LayerState, which: Which) -> int | None:
    """The key of the signs of a product's rotation, where they are fresh."""
    transform = state.spec.transform(OPERANDS[which][0])
    return state.counter.rotation_key(which) if transform is not None and transform.is_fresh else None


def sum_key(state: LayerState, which: Which) -> int | None:
    """The key of a product's random words, where the accumulation draws some."""
    accumulation = state.spec.accumulation
    return state.counter.sum_key(which) if accumulation is not None and accumulation.stochastic else None


def _rotation(state: LayerState, slot: str) -> Rotation | None:
    transform = state.spec.transform(slot)
    return None if transform is None else Rotation(transform, rotation_key(state, WHICH[slot]))


def _saw(state: LayerState, slot: str, request: Request, result: Quantized) -> None:
    state.count_nonfinite(slot, result.amax)
    if state.observer is not None:
        x = request.x if request.rotation is None else request.rotation.apply(request.x)
        state.observer.record(slot, x, result.tensor)


def _is_wide(x: Tensor, spec: QuantSpec, contraction: Contraction | None) -> bool:
    """Whether numbers times the scales of blocks are wanted in float32 by what multiplies them; codes are kept of them."""
    return is_packable(spec.format) and (contraction is None or in_float32(contraction, x.device))
