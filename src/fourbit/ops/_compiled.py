"""The products of a layer as two operators of torch, so that `torch.compile` sees them whole and breaks no graph.

    fourbit::contract            x, w, clip values -> y, and what backward needs
    fourbit::contract_backward   g, and that -> dx, dw, gradients of the clip values

Both run what the eager path runs. A layer is told by a number, its handle, under which its state is found; its geometry
is a list of integers (`Contraction.encode`). The fake implementations say shapes and dtypes, from the spec alone. What
the operators do to the state (votes, first clip values) happens inside and is not part of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.ops._contraction import Contraction, Convolution
from fourbit.ops._gemms import backward, clip_gradient, fprop, needs_of
from fourbit.ops._orientation import Orientation
from fourbit.ops._product import Layout, Operand
from fourbit.ops._rotate import WHICH
from fourbit.ops._saved import Saved
from fourbit.ops._spec import REUSE, LayerSpec
from fourbit.ops._state import LayerState, state_of
from fourbit.quantizers import (
    BLOCK,
    BlockScale,
    BlockScales,
    Packed,
    QuantSpec,
    StepSize,
    Tile,
    as_packed,
    carrier_dtype,
    fits_bfloat16,
    is_packable,
    scale_fits_byte,
    scale_shape,
)


def _order(t: Tensor, contraction: Contraction) -> torch.memory_format:
    last = isinstance(contraction, Convolution) and contraction.takes_channels_last(t)
    return torch.channels_last if last else torch.contiguous_format


def _strides(shape: torch.Size, order: torch.memory_format = torch.contiguous_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=order).stride()


def _canonical(t: Tensor, contraction: Contraction) -> Tensor:
    """An operand in the one order of axes that shape and geometry determine; itself if it lies so."""
    strides = _strides(t.shape, _order(t, contraction))
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


def _blank(t: Tensor, dtype: torch.dtype, contraction: Contraction) -> Tensor:
    return t.new_empty_strided(t.shape, _strides(t.shape, _order(t, contraction)), dtype=dtype)


def _stored_slots(spec: LayerSpec, learned: tuple[bool, bool]) -> list[str]:
    """The slots whose operands are saved, in the order of the saved tensors."""
    slots = ["x_wgrad", "w_dgrad"]
    slots += ["x_fprop"] if learned[0] and spec.x_wgrad is not REUSE else []
    slots += ["w_fprop"] if learned[1] and spec.w_dgrad is not REUSE else []
    return [slot for slot in slots if spec.resolved(slot) is not None]


def _format_of(state: LayerState, slot: str, spec: QuantSpec) -> Format:
    """The format of an operand of the forward pass."""
    remembered = state.scalings.get(slot[0]) if spec.scaling.state_class is not None else None
    return spec.format if remembered is None else remembered.format_of(spec.format, state)


def _masks(spec: LayerSpec) -> list[str]:
    """The operands with a mask of their own."""
    return [op for op in "xw" if (s := spec.resolved(f"{op}_fprop")) is not None and s.scaling.clips]


def _has_slope(spec: LayerSpec) -> bool:
    """Whether dw is multiplied by the slope of an estimator."""
    return spec.w_fprop is not None and spec.w_fprop.estimator is not None


@dataclass(frozen=True)
class _Form:
    """How an operand is saved: its shape, [groups, rows, spots, sums] with an orientation, and the tile of its scales."""

    shape: torch.Size
    orientation: Orientation | None
    tile: Tile

    @staticmethod
    def of(t: Tensor, slot: str, spec: LayerSpec, contraction: Contraction) -> _Form:
        resolved = spec.resolved(slot)
        assert resolved is not None
        if not resolved.needs_orientation:
            return _Form(t.shape, None, Tile(None, None))
        origin = slot if getattr(spec, slot) is not REUSE else f"{slot[0]}_fprop"
        orientation = contraction.orientation(WHICH[origin], slot[0], t.shape)
        shape, transform = list(orientation.shape), spec.transform(origin)
        if transform is not None:
            shape[3] += -shape[3] % transform.size
        return _Form(torch.Size(shape), orientation, spec.tile(slot))

    @property
    def has_blocks(self) -> bool:
        return not (self.tile.is_tensor or self.tile.is_row)

    def scale_shape(self) -> list[int]:
        if self.tile.is_row and self.shape[0] * self.shape[1] != 1:
            return [self.shape[0], self.shape[1], 1, 1]
        return []


def _blank_operand(t: Tensor, slot: str, spec: LayerSpec, contraction: Contraction) -> list[Tensor]:
    """Shapes of an operand as it is saved: data, scale, and scales of blocks."""
    form, resolved = _Form.of(t, slot, spec, contraction), spec.resolved(slot)
    assert resolved is not None
    packed = is_packable(resolved.format) and resolved.samples == 1
    part, scale_format = (
        resolved.scaling.kept(form.tile) if isinstance(resolved.scaling, BlockScale) else (form.tile, None)
    )
    if packed:
        data = t.new_empty((form.shape.numel() + BLOCK - 1) // BLOCK * (BLOCK // 2), dtype=torch.uint8)
    else:
        dtype = torch.float32 if resolved.samples > 1 else carrier_dtype(resolved.format)
        if form.has_blocks:
            exact = resolved.samples == 1 and fits_bfloat16(resolved.format.grid, scale_format)
            dtype = torch.bfloat16 if exact else torch.float32
        oriented = form.orientation is not None
        data = t.new_empty(form.shape, dtype=dtype) if oriented else _blank(t, dtype, contraction)
    found = [data, t.new_empty(form.scale_shape(), dtype=torch.float32)]
    if packed and form.has_blocks:
        dtype = torch.uint8 if scale_fits_byte(scale_format) else torch.float32
        found.append(t.new_empty(scale_shape(form.shape, part), dtype=dtype))
    return found


@torch.library.custom_op("fourbit::contract", mutates_args=())
def _forward(
    x: Tensor,
    w: Tensor,
    x_alpha: Tensor | None,
    w_alpha: Tensor | None,
    layer: int,
    geometry: Sequence[int],
    dtype: torch.dtype,
    with_gradients: bool,
) -> list[Tensor]:
    state, contraction = state_of(layer), Contraction.decode(geometry)
    state.with_gradients = with_gradients
    spec, learned = state.spec, (x_alpha is not None, w_alpha is not None)
    x, w = _canonical(x, contraction), _canonical(w, contraction)
    y, saved = fprop(x, w, contraction, state, dtype, learned)
    if not with_gradients:
        return [_canonical(y, contraction)]
    kept = {"x_wgrad": saved.x, "w_dgrad": saved.w, "x_fprop": saved.x_codes, "w_fprop": saved.w_codes}
    tensors: list[Tensor] = []
    for slot in _stored_slots(spec, learned):
        operand = kept[slot]
        assert operand is not None
        data, scale = operand.q, operand.scale
        assert scale is not None
        tensors += [data.data if isinstance(data, Packed) else data, scale.clone()]
        if isinstance(data, Packed) and data.blocks is not None:
            tensors.append(data.blocks.data)
    tensors += [getattr(saved, f"{op}_mask") for op in _masks(spec)]
    if saved.w_slope is not None:
        tensors.append(_canonical(saved.w_slope, contraction))
    return [_canonical(y, contraction), *tensors]


@_forward.register_fake
def _(
    x: Tensor,
    w: Tensor,
    x_alpha: Tensor | None,
    w_alpha: Tensor | None,
    layer: int,
    geometry: Sequence[int],
    dtype: torch.dtype,
    with_gradients: bool,
) -> list[Tensor]:
    spec, contraction = state_of(layer).spec, Contraction.decode(geometry)
    of = {"x": x, "w": w}
    tensors: list[Tensor] = []
    if not with_gradients:
        return [_canonical(torch.empty_like(contraction.fprop(x.to(dtype), w.to(dtype))), contraction)]
    for slot in _stored_slots(spec, (x_alpha is not None, w_alpha is not None)):
        tensors += _blank_operand(of[slot[0]], slot, spec, contraction)
    for op in _masks(spec):
        num = _Form.of(of[op], f"{op}_fprop", spec, contraction).shape.numel()
        tensors.append(x.new_empty((num + BLOCK - 1) // BLOCK * 8, dtype=torch.uint8))
    if _has_slope(spec):
        tensors.append(_blank(w, torch.float32, contraction))
    y = contraction.fprop(x.to(dtype), w.to(dtype))
    return [_canonical(torch.empty_like(y), contraction), *tensors]


@torch.library.custom_op("fourbit::contract_backward", mutates_args=())
def _backward(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    tensors: Sequence[Tensor],
    layer: int,
    geometry: Sequence[int],
    learned: Sequence[bool],
    needs: Sequence[bool],
) -> list[Tensor]:
    state, contraction = state_of(layer), Contraction.decode(geometry)
    spec, left = state.spec, list(tensors)
    of = {op: _canonical(_full(t, contraction), contraction) for op, t in (("x", x), ("w", w))}
    kept: dict[str, Operand] = {}
    for slot in _stored_slots(spec, (learned[0], learned[1])):
        operand, resolved = of[slot[0]], spec.resolved(slot)
        assert resolved is not None
        form = _Form.of(operand, slot, spec, contraction)
        data, scale, format = left.pop(0), left.pop(0), _format_of(state, slot, resolved)
        if is_packable(format) and resolved.samples == 1:
            blocks = None
            if form.has_blocks:
                scaling, block_data = resolved.scaling, left.pop(0)
                part, scale_format = scaling.kept(form.tile) if isinstance(scaling, BlockScale) else (form.tile, None)
                blocks = BlockScales(block_data, scale_format if block_data.dtype == torch.uint8 else None, part)
            stride = operand.stride() if form.orientation is None else _strides(form.shape)
            data = as_packed(data, form.shape, stride, format, blocks)
        on_grid = resolved.samples == 1 and not form.has_blocks
        kept[slot] = Operand(data, scale, None if form.has_blocks else format, on_grid, None, form.orientation)
    masks = {op: left.pop(0) for op in _masks(spec)}
    saved = Saved(
        kept.get("x_wgrad", Operand(of["x"])),
        kept.get("w_dgrad", Operand(of["w"])),
        kept.get("x_fprop", kept.get("x_wgrad")) if learned[0] else None,
        kept.get("w_fprop", kept.get("w_dgrad")) if learned[1] else None,
        masks.get("x"),
        masks.get("w"),
        Layout.of(of["x"]),
        Layout.of(of["w"]),
        left.pop(0) if _has_slope(spec) else None,
    )
    found = backward(g, saved, contraction, state, (x.dtype, w.dtype), (needs[0], needs[1]))
    dx, dw, *alphas = found
    return [g.new_empty(0) if t is None else t for t in (dx, dw, *map(clip_gradient, alphas))]


@_backward.register_fake
def _(
    g: Tensor,
    x: Tensor,
    w: Tensor,
    tensors: Sequence[Tensor],
    layer: int,
    geometry: Sequence[int],
    learned: Sequence[bool],
    needs: Sequence[bool],
) -> list[Tensor]:
    contraction = Contraction.decode(geometry)
    dx = _blank(x, x.dtype, contraction) if needs[0] else g.new_empty(0)
    dw = _blank(w, w.dtype, contraction) if needs[1] else g.new_empty(0)
    alphas = [
        g.new_empty(1, dtype=torch.float32) if a and n else g.new_empty(0) for a, n in zip(learned, needs, strict=True)
    ]
    return [dx, dw, *alphas]


def _stand_in(t: Tensor) -> Tensor:
    """A tensor that keeps the shape of an operand, and one element of memory: the codes are saved already."""
    return t.new_empty(()).expand(t.shape)


def _full(t: Tensor, contraction: Contraction) -> Tensor:
    """The operand, or memory with nothing in it in place of a stand-in."""
    return _blank(t, t.dtype, contraction) if t.dim() and not any(t.stride()) else t


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, w, x_alpha, w_alpha, layer, geometry, *_ = inputs
    spec = state_of(layer).spec
    x = x if spec.resolved("x_wgrad") is None else _stand_in(x)
    w = w if spec.resolved("w_dgrad") is None else _stand_in(w)
    ctx.save_for_backward(x, w, *output[1:])
    ctx.layer, ctx.geometry = layer, geometry
    ctx.learned = [x_alpha is not None, w_alpha is not None]


def _differentiate(ctx: Any, grads: list[Tensor | None]) -> tuple[Tensor | None, ...]:
    x, w, *tensors = ctx.saved_tensors
    g, wanted = grads[0], ctx.needs_input_grad
    assert g is not None
    needs = list(needs_of(wanted))
    found = torch.ops.fourbit.contract_backward(g, x, w, tensors, ctx.layer, ctx.geometry, ctx.learned, needs)
    return (*(t if need else None for t, need in zip(found, wanted[:4], strict=True)), None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_setup)


def _refuse(ctx: Any, grads: list[Tensor | None]) -> Any:
    raise UserError(
        "a gradient of a compiled model cannot be differentiated a second time: call the model itself instead"
    )


_backward.register_autograd(_refuse)


def compiled_contract(
    x: Tensor,
    w: Tensor,
    x_alpha: Tensor | None,
    w_alpha: Tensor | None,
    contraction: Contraction,
    state: LayerState,
    dtype: torch.dtype,
) -> Tensor:
    """`contract` as an operator."""
    if any(
        spec is not None and isinstance(spec.scaling, StepSize) for spec in (state.spec.x_fprop, state.spec.w_fprop)
    ):
        raise UserError("torch.compile does not take layers with a learned step size: call the model itself instead")
    geometry = list(contraction.encode())
    recorded = torch.is_grad_enabled()
    return torch.ops.fourbit.contract(x, w, x_alpha, w_alpha, state.handle, geometry, dtype, recorded)[0]
