"""`LayerState`: how a quantized layer uses and changes what it remembers (`StoredState`)."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.ops._contraction import Contraction, LinearMap, Which
from fourbit.ops._product import Products
from fourbit.ops._rotate import WHICH, oriented
from fourbit.ops._spec import OPERANDS, REUSE, SLOTS, LayerSpec
from fourbit.ops._stored import StoredState
from fourbit.quantizers import (
    UNSET,
    ClipValue,
    GradScale,
    QTensor,
    Quantized,
    QuantSpec,
    Request,
    Rotation,
    amax_of,
    best_clip_value,
    exponent_scale,
    has_integer_codes,
    is_packable,
    request_for,
    run,
    run_pair,
    stream_key,
)


def _is_wide(x: Tensor, spec: QuantSpec) -> bool:
    """Whether numbers times the scales of blocks are wanted in float32: a CPU multiplies them so, and keeps codes."""
    return x.device.type == "cpu" and is_packable(spec.format)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


_states: weakref.WeakValueDictionary[int, LayerState] = weakref.WeakValueDictionary()
_next_handle = itertools.count()


def _enter(state: LayerState) -> int:
    handle = next(_next_handle)
    _states[handle] = state
    return handle


def state_of(handle: int) -> LayerState:
    """The living state with that handle."""
    return _states[handle]


class LayerState(StoredState):
    """State of one layer: its tensors, and the quantization of its operands with them.

    Args:
        spec: the layer's six slots.
        num_channels: output channels, for per-channel GradScale.
        seed, index: coordinates of the layer's random words.
        products: how backends may multiply, "fast" or "exact" (see `fourbit.ops.Products`).
    """

    fuse = True
    """Whether the layer may leave its product to the normalization behind it (`fourbit.chains`)."""
    wants_float = False
    """Whether its input was needed as a tensor, too, when it came as codes; then both come out of one pass."""

    def __init__(
        self,
        spec: LayerSpec,
        num_channels: int = 1,
        seed: int = 0,
        index: int = 0,
        products: Products = "fast",
    ):
        super().__init__(spec, num_channels, seed, index, products)
        self.handle = _enter(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and pickles get a handle of their own."""
        super().__setstate__(state)
        self.handle = _enter(self)

    def respec(self, spec: LayerSpec) -> None:
        """Another spec from the next forward pass on; what the layer remembers stays.

        Raises:
            UserError: the spec needs something that the layer has not remembered so far.
        """
        if spec == self.spec:
            return
        for operand in ("x", "w"):
            wanted = getattr(spec, f"{operand}_fprop")
            if wanted is not None and wanted.scaling.stored_kind == "alpha" and operand not in self._clipped:
                raise UserError(
                    f"{operand}_fprop would need a clip value, which this layer has never had: convert again"
                )
        scaled = spec.g_scaling
        if scaled is not None and (
            self.g_amax is None or (scaled.scaling.stored_kind == "exponent" and self.g_exponent is None)
        ):
            raise UserError("the gradient would need a GradScale, which this layer has never had: convert again")
        if spec.stochastic and self.step is None:
            raise UserError("the spec draws random words, which this layer has never done: convert again")
        self.spec = spec
        self.handle = _enter(self)  # a compiled graph holds for one spec

    def begin(self, keeps_positive: bool = True) -> None:
        """Start of a forward pass: apply what the last backward pass voted for.

        Args:
            keeps_positive: whether to look after the clip values; `operand_request` has done so before.
        """
        self._piece = 0
        if _in_backward():
            return  # recomputation
        if self._modules and self.training and self._uses:
            for upkeep in self._modules.values():
                upkeep.require()  # type: ignore[union-attr,operator]
        self._uses = 0
        with torch.no_grad():
            if keeps_positive:
                self._keep_positive()
            if self.step is not None:
                self.step[0] += self.step[1]
                self.step[1] = 0
                if self._count is not None:
                    self._count = [sum(self._count), 0]
            amax, exponent, g_spec = self.g_amax, self.g_exponent, self.spec.g_scaling
            if not self.training or amax is None:
                return
            self._exponents_known()
            if exponent is not None and g_spec is not None:
                scaling: GradScale = g_spec.scaling  # type: ignore[assignment]
                if exponent.is_cpu and exponent.dim() == 0:  # a few scalars: the host is faster
                    if vote := scaling.vote(amax.item()):
                        exponent.fill_(scaling.step(round(exponent.item()), vote))
                else:
                    exponent.copy_(scaling.step(exponent, scaling.vote(amax)))
                amax.fill_(-1.0)  # without an exponent, `LossScaler` reads it, once a step

    def next_piece(self) -> None:
        """The next product of this forward pass with the same weight, a time step of a recurrent layer, draws other words."""
        self._piece += 1

    @property
    def toward(self) -> Tensor | None:
        """The running average to whose side the weight is rounded, in the shape in which fprop has it, where there is one."""
        average, channels = (self._modules.get(name) for name in ("average", "channels"))
        mean = None if average is None else average.toward()  # type: ignore[operator]
        parts = None if channels is None or mean is None else channels.parts()  # type: ignore[operator]
        return mean if parts is None or mean is None else mean.index_select(1, parts[0])

    def quantize(
        self,
        slot: str,
        x: Tensor,
        spec: QuantSpec,
        save: bool = False,
        carrier: bool = True,
        toward: Tensor | None = None,
    ) -> Quantized:
        """An operand of the forward pass, quantized; with `save`, also what backward needs of it.

        Args:
            x: with scales for parts of it, or a rotation, as [groups, rows, spots, sums].
            carrier: False: the numbers themselves are not needed where there are packed codes of them.
            toward: an average to whose side numbers are rounded, as x.
        """
        format: Format | None = None
        stored: Tensor | None = None
        key, rotation = self._key(slot, spec), self._rotation(slot)
        if spec.scaling.stored_kind == "alpha":
            x, rotation = (x if rotation is None else rotation.apply(x)), None
            format, stored = self._clip(slot[0], x, spec)
        request = request_for(x, spec, self.spec.tile(slot), stored, key, format, save, rotation, _is_wide(x, spec))
        if not carrier and self.observer is None and spec.in_tiles:
            request = replace(request, carrier=False)
        if toward is not None:
            request = replace(request, toward=toward)
        result = run(request)
        self._saw(slot, request, result)
        return result

    def gradients(
        self, g: Tensor, contraction: Contraction, need_x: bool, need_w: bool
    ) -> tuple[Quantized | None, Quantized | None]:
        """The output gradient, quantized for dgrad and wgrad; None where it is not quantized, not needed, or reused.

        With scales for parts of it, or a rotation, as [groups, rows, spots, sums]. Records the largest gradient, and sets the
        first exponent from it.
        """
        self._differentiate()
        wgrad = self.spec.g_wgrad
        first = self.spec.g_dgrad if need_x or wgrad is REUSE else None
        second = wgrad if need_w and isinstance(wgrad, QuantSpec) else None
        one_pass = self._known and self._one_pass(first, second)
        exponent = None if one_pass else self._see(g, contraction)
        for_dgrad, for_wgrad = (
            None if spec is None else self._request(slot, self._oriented(slot, g, spec, contraction), spec, exponent)
            for slot, spec in (("g_dgrad", first), ("g_wgrad", second))
        )
        if one_pass and for_dgrad and for_wgrad:
            both = run_pair(for_dgrad, for_wgrad)
        else:
            both = (None if for_dgrad is None else run(for_dgrad), None if for_wgrad is None else run(for_wgrad))
        seen = both[0] or both[1]
        if one_pass and seen is not None:
            self._record(self._scaled(seen.amax))
        for slot, request, result in zip(("g_dgrad", "g_wgrad"), (for_dgrad, for_wgrad), both, strict=True):
            if request is not None and result is not None:
                self._saw(slot, request, result)
        return both

    def _oriented(self, slot: str, g: Tensor, spec: QuantSpec, contraction: Contraction) -> Tensor:
        if not spec.needs_orientation:
            return g
        return oriented(slot, g, contraction, self.spec)[0]

    def awaits_first_batch(self, operand: str) -> bool:
        """Whether the clip value of an operand ("x" or "w") is to be taken from the first training batch, and is not yet."""
        spec = getattr(self.spec, f"{operand}_fprop")
        clipped = spec is not None and isinstance(spec.scaling, ClipValue)
        return clipped and self.training and self._form_of(operand) is None and not self._tries(operand)

    def see_first_batch(self, operand: str, t: Tensor) -> None:
        """Take it from `t`, which stands for all that will be quantized in pieces."""
        self._clip(operand, t, getattr(self.spec, f"{operand}_fprop"))

    def awaits_first_gradient(self) -> bool:
        """Whether an exponent is to be taken from the first gradient, and is not yet."""
        return self.training and self.g_exponent is not None and not self._exponents_known()

    def see_first_gradient(self, g: Tensor) -> None:
        """Take it from `g`, that of a linear layer, which stands for all gradients that will come in pieces."""
        self._see(g, LinearMap())

    def operand_request(self, x: Tensor) -> Request | None:
        """How a node before this layer is to quantize the layer's input `x` (a tensor that gives only shape and layout).

        None where it cannot: see `clip_request`, or the first batch has only just decided PACT's form.
        """
        if not _in_backward():
            self._keep_positive()
            if self._undecided and self._uses:
                self.settle()  # a backward pass lies between
        return None if self._undecided else self.clip_request(x)  # recomputation must save what the first pass saved

    def clip_request(self, x: Tensor, in_evaluation: bool = False) -> Request | None:
        """How to quantize the input of a product in training (or in evaluation, too), from its shape and layout alone.

        None where that is not known: no batch has decided PACT's form, the codes are not packed integers with nearest
        rounding and a clip value, or the input is needed in another form.
        """
        spec = self.spec.x_fprop
        if spec is None or not (self.training or in_evaluation) or self.spec.x_wgrad is not REUSE:
            return None
        clip = spec.scaling
        if not isinstance(clip, ClipValue) or spec.stochastic or spec.needs_orientation or self._form_of("x") is None:
            return None
        format, alpha = self._clip("x", x, spec)
        return Request(x, spec, format, None, alpha, None, save=True) if has_integer_codes(format) else None

    def gradient_request(self, g: Tensor) -> Request | None:
        """How dgrad's operand is made of one output gradient like `g` after the other; None where `gradients` must do it."""
        specs = self.gradient_specs(True, False)
        return self._request("g_dgrad", g, specs[0], self._exponent()) if specs else None

    def settle(self) -> None:
        """No backward pass will come for the forward pass that decided the form of x: the next one may use it in full."""
        self._undecided = False

    def gradient_specs(self, need_x: bool, need_w: bool) -> tuple[QuantSpec, ...]:
        """The quantizations of the output gradient that one read of it gives; () where `gradients` must see it first."""
        wgrad = self.spec.g_wgrad
        found = (self.spec.g_dgrad if need_x or wgrad is REUSE else None, wgrad if need_w else None)
        specs = tuple(s for s in found if isinstance(s, QuantSpec))
        wanted = need_x + (need_w and wgrad is not REUSE) if not (wgrad is REUSE and need_w) else 1
        if not self._exponents_known() or len(specs) != wanted or self.spec.restores:
            return ()
        return specs if specs and self._one_pass(*specs) and not any(s.stochastic for s in specs) else ()

    def saw_gradient(self, amax: float, g: Tensor | None, quantized: Sequence[tuple[str, QTensor]]) -> None:
        """A node behind this layer has quantized the gradient as `gradient_specs` says; its largest magnitude was `amax`.

        Where somebody observes, `g` is the gradient itself; `quantized` has the results by slot.
        """
        self._differentiate()
        if self.observer is not None and g is not None:
            for slot, result in quantized:
                self.observer.record(slot, g, result)
        if not math.isfinite(amax):
            self.nonfinite[2] += 1
        self._record(self._scaled(amax))

    def _differentiate(self) -> None:
        """One more use in this backward pass."""
        self._uses += 1
        if self.step is not None:
            self.step[1] = 1
            if self._count is not None:
                self._count[1] = 1

    def saw_operand(self, amax: float, x: Tensor | None, quantized: QTensor | None) -> None:
        """A node before this layer has quantized its input `x` (given where somebody observes)."""
        if self.observer is not None and x is not None and quantized is not None:
            self.observer.record("x_fprop", x, quantized)
        if not math.isfinite(amax):
            self.nonfinite[0] += 1

    def _one_pass(self, *specs: QuantSpec | None) -> bool:
        """Whether one read of the gradient gives its operands and the vote: the exponent is known beforehand."""
        scaled = self.spec.g_scaling
        return (
            self.training
            and scaled is not None
            and scaled.scaling.stored_kind == "exponent"
            and any(specs)
            and all(s is None or (s.scaling == scaled.scaling and not s.needs_orientation) for s in specs)
        )

    def _request(self, slot: str, g: Tensor, spec: QuantSpec, exponent: Tensor | None = None) -> Request:
        stored = None
        if spec.scaling.stored_kind == "exponent":
            stored = exponent if exponent is not None else self._exponent()
        rotation = self._rotation(slot)
        tile, key = self.spec.tile(slot), self._key(slot, spec)
        return request_for(g, spec, tile, stored, key, rotation=rotation, wide=_is_wide(g, spec))

    def _exponent(self) -> Tensor:
        assert self.g_exponent is not None
        return self.g_exponent

    def _saw(self, slot: str, request: Request, result: Quantized) -> None:
        if isinstance(result.amax, Tensor):
            self.nonfinite["xwg".index(slot[0])] += (~result.amax.isfinite()).any()
        elif not math.isfinite(result.amax):
            self.nonfinite["xwg".index(slot[0])] += 1
        if self.observer is not None:
            x = request.x if request.rotation is None else request.rotation.apply(request.x)
            self.observer.record(slot, x, result.tensor)

    def count_nonfinite(self, slot: str, t: Tensor | float) -> None:
        """Count NaN or infinity in an operand that is not quantized, or in its largest magnitude."""
        if isinstance(t, Tensor):
            self.nonfinite["xwg".index(slot[0])] += ~amax_of(t).isfinite()
        elif not math.isfinite(t):
            self.nonfinite["xwg".index(slot[0])] += 1

    def _see(self, g: Tensor, contraction: Contraction) -> Tensor | None:
        """Record the largest gradient, set the first exponent from it, and return the exponent to use (None: no GradScale).

        A backward pass in evaluation mode takes its exponent from the gradient at hand and leaves the layer's alone.
        """
        g_spec = self.spec.g_scaling
        if g_spec is None or self.g_amax is None:
            return None
        if g_spec.in_tiles:  # one for each output channel, the rows of wgrad
            amax = amax_of(contraction.orientation("wgrad", "g", g.shape).of(g), (2, 3)).view(self.g_amax.shape)
        else:
            amax = amax_of(g)
        exponent = self.g_exponent
        if exponent is not None:
            first = g_spec.scaling.first_exponent(amax)  # type: ignore[attr-defined]
            if self.training:
                exponent.copy_(torch.where(exponent == UNSET, first, exponent))
                amax = amax * exponent_scale(exponent)
                self._known = self._known or not bool((exponent == UNSET).any())
            else:
                exponent = first
            if exponent.dim():  # a channel without gradients yet must not stand out: it takes the smallest scale
                exponent = torch.where(exponent == UNSET, exponent.max(), exponent)
        if self.training:
            self._record(amax)
        return exponent

    def _scaled(self, amax: Tensor | float) -> Tensor | float:
        scale = exponent_scale(self._exponent())
        return amax * float(scale) if not isinstance(amax, Tensor) else amax * scale

    def _record(self, amax: Tensor | float) -> None:
        recorded = self.g_amax
        assert recorded is not None
        if not isinstance(amax, Tensor):
            if amax > recorded.item() or math.isnan(amax):
                recorded.fill_(amax)
            return
        recorded.copy_(torch.maximum(recorded, amax))

    def _key(self, slot: str, spec: QuantSpec) -> int | None:
        if not spec.stochastic or self.step is None:
            return None
        use = self._uses if slot.startswith("g_") else self._piece
        return stream_key(self.seed, self.index, self._step(), SLOTS.index(slot), use)

    def _step(self) -> int:
        """Backward passes seen before this step."""
        if self._count is None:
            assert self.step is not None
            self._count = [int(n) for n in self.step.tolist()]
        return self._count[0]

    def _rotation(self, slot: str) -> Rotation | None:
        transform = self.spec.transform(slot)
        return None if transform is None else Rotation(transform, self.rotation_key(WHICH[slot]))

    def rotation_key(self, which: Which) -> int | None:
        """The key of the signs of a product's rotation, where they are fresh; the same forward and backward in one step."""
        transform = self.spec.transform(OPERANDS[which][0])
        if transform is None or not transform.is_fresh or self.step is None:
            return None
        stream = len(SLOTS) + len(OPERANDS) + tuple(OPERANDS).index(which)
        return stream_key(self.seed, self.index, self._step(), stream)

    def sum_key(self, which: Which) -> int | None:
        """The key of a product's random words, where the accumulation draws some; they differ from those of all slots."""
        accumulation = self.spec.accumulation
        if accumulation is None or not accumulation.stochastic or self.step is None:
            return None
        step = self._step()
        stream = len(SLOTS) + ("fprop", "dgrad", "wgrad").index(which)
        return stream_key(self.seed, self.index, step, stream, self._piece if which == "fprop" else self._uses)

    def _clip(self, operand: str, x: Tensor, spec: QuantSpec) -> tuple[Format, Tensor]:
        """Format and alpha of a PACT operand; the first training batch decides what is still open.

        A pass without gradients (a check before training, new statistics for batch normalization) decides for itself and those
        that follow, until a pass with gradients decides for good. If that is the recomputation of a pass without gradients
        inside a backward pass (checkpointing), it takes what the first pass took.
        """
        clip: ClipValue = spec.scaling  # type: ignore[assignment]
        signed = self._form_of(operand)
        if signed is not None:
            other = clip.signed_format
            return (other if signed and other and not spec.format.signed else spec.format), self._clip_value(operand)
        if self._tries(operand):
            negative, value = self._trial[operand]
        else:
            negative = spec.format.signed or (clip.signed_format is not None and x.numel() > 0 and bool((x < 0).any()))
        format = clip.signed_format if negative and clip.signed_format and not spec.format.signed else spec.format
        usable = True
        if not self._tries(operand):
            value = clip.init if clip.init is not None else best_clip_value(x, format)
            amax = amax_of(x)
            usable = bool((amax > 0) & amax.isfinite())
        if self.training and usable and not self.with_gradients:
            self._trial[operand] = negative, value
        elif self.training and usable:
            self._decide(operand, negative, value)
            self._undecided = self._undecided or operand == "x"
            return format, getattr(self, f"{operand}_alpha")
        return format, torch.full((1,), value, dtype=torch.float32, device=x.device)

    def _tries(self, operand: str) -> bool:
        """Whether a pass without gradients has found a form and a clip value that hold for this one."""
        return self.training and operand in self._trial and (not self.with_gradients or _in_backward())

    def _clip_value(self, operand: str) -> Tensor:
        """The clip value in use, [1]."""
        alpha: Tensor = getattr(self, f"{operand}_alpha")
        if self.training:
            return alpha  # `begin` keeps it positive
        form, floor = getattr(self, f"{operand}_form"), getattr(self, f"{operand}_floor")
        if not alpha.is_cpu:
            return torch.where(alpha.detach() <= 0, floor, alpha.detach()) / form.sum()
        value, share = alpha.item(), sum(form.tolist())
        if share == 1 and not value <= 0:
            return alpha
        return (floor if value <= 0 else alpha.detach()) / share

    def _keep_positive(self) -> None:
        """A clip value that an optimizer took to zero or below becomes half of what it last was."""
        if not self.training:
            return
        for operand in self._clipped:
            if self._form_of(operand) is None:
                continue
            alpha, floor = getattr(self, f"{operand}_alpha").detach(), getattr(self, f"{operand}_floor")
            if not alpha.is_cpu:
                alpha.copy_(torch.where(alpha <= 0, floor, alpha))
                torch.mul(alpha, 0.5, out=floor)
                continue
            value = alpha.item()
            if value <= 0:
                value = floor.item()
                alpha.fill_(value)
            floor.fill_(value / 2)

    def format_of(self, operand: str, spec: QuantSpec) -> Format:
        """The format that an operand ("x" or "w") has in forward: PACT's signed form, or that of `spec`."""
        clip = spec.scaling
        signed = isinstance(clip, ClipValue) and self._form_of(operand) and not spec.format.signed
        return clip.signed_format or spec.format if isinstance(clip, ClipValue) and signed else spec.format
