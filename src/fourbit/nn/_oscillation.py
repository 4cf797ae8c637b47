"""Weights that oscillate between two numbers of the grid, which their way tells, and that of what they round to: reset to the
middle (OsciReset), or updated less often (Q-Ramping)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.nn._base import QuantizedLayer
from fourbit.nn._out_control import Channels
from fourbit.nn._upkeep import StepHooks, Upkeep, UpkeepSpec
from fourbit.ops import oriented
from fourbit.quantizers import request_for, run


def nearest_weight(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    """A weight of a layer as fprop has it without Q-EMA, in its shape; channels that have products of their own stay."""
    channels = layer.quant._modules.get("channels")
    parts = channels.parts() if isinstance(channels, Channels) else None
    if parts is None:
        return _nearest(layer, weight)
    numbers = weight.detach().to(torch.float32, copy=True)
    return numbers.index_copy_(1, parts[0], _nearest(layer, weight.index_select(1, parts[0])))


def _nearest(layer: QuantizedLayer, weight: Tensor) -> Tensor:
    contraction, state = layer.contraction(), layer.quant
    spec = state.spec.w_fprop
    assert spec is not None
    w = contraction.prepare(weight.detach(), "w")
    m, orientation = oriented("w_fprop", w, contraction, state.spec) if spec.needs_orientation else (w, None)
    tile = state.spec.tile("w_fprop") if orientation is not None else None
    numbers = run(request_for(m, spec, tile)).tensor.dequantize()
    return numbers if orientation is None else contraction.prepare(orientation.back(numbers), "w")


class _Watched(Upkeep):
    """How far a weight moves, and its rounding, over a window of steps."""

    before: Tensor
    moved: Tensor
    jumped: Tensor

    def __init__(self, layer: QuantizedLayer):
        super().__init__()
        self._hold(layer, "before", "moved", "jumped")

    def begin(self, layer: QuantizedLayer) -> None:
        self.before.copy_(layer.weight)  # type: ignore[arg-type]
        self.moved.zero_()
        self.jumped.zero_()

    def watch(self, layer: QuantizedLayer) -> None:
        now = layer.weight.detach().to(torch.float32)  # type: ignore[operator]
        self.jumped.add_((nearest_weight(layer, now) - nearest_weight(layer, self.before)).abs())
        self.moved.add_((now - self.before).abs())
        self.before.copy_(now)


@dataclass(frozen=True)
class OsciReset(UpkeepSpec):
    """Every so many steps, weights are watched over a window. Where the path of the rounded weight is `ratio` times that of the
    weight or longer, sum |dQ(w)| >= ratio * sum |dw|, the weight becomes Q(w), the middle of its rounding interval.

    Args:
        start: the first step of the first window.
        every: steps from the beginning of one window to that of the next.
        window: steps of a window.
        ratio: 16, or 8 in the authors' configurations.

    Source: TetraJet-v2, OsciReset.
    """

    child = "oscillation"
    start: int = 8000
    every: int = 200
    window: int = 50
    ratio: float = 16.0

    def __post_init__(self) -> None:
        if self.start < 0 or not 0 < self.window < self.every - 1 or not self.ratio > 0:
            raise UserError(f"windows lie apart: 0 < window < every - 1, start >= 0, ratio > 0, not {self}")

    def make(self, layer: QuantizedLayer) -> Upkeep:
        """Paths."""
        return _Reset(layer, self)

    def __str__(self) -> str:
        return (
            f"every {self.every} steps from step {self.start} on, weights whose rounding moved {self.ratio:g} times as far as "
            f"they did in {self.window} steps are set to it (OsciReset)"
        )


class _Reset(_Watched):
    def __init__(self, layer: QuantizedLayer, spec: OsciReset):
        super().__init__(layer)
        self.spec = spec

    def advance(self, step: int, layer: QuantizedLayer) -> None:
        place = (step - self.spec.start) % self.spec.every
        if step < self.spec.start or place > self.spec.window + 1 or step - place < self.spec.start:
            return
        if place == 0:
            self.begin(layer)
        elif place <= self.spec.window:
            self.watch(layer)
        else:
            oscillates = (self.moved > 0) & (self.jumped >= self.spec.ratio * self.moved)
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.copy_(torch.where(oscillates, nearest_weight(layer, weight), weight))


@dataclass(frozen=True)
class QRamping(UpkeepSpec):
    """Weights that oscillate are updated less often, by more: every `period` steps, with the mean gradient of these steps and a
    learning rate that is `period` times as large. Every so many steps the periods are found anew, over a window in which all
    are 1:

        period = min(floor(sum |dQ(w)| / (ratio * sum |dw|)) * gain + 1, every)

    It works with any optimizer of torch: what its step changes where a weight's time has not come (the weight, and what the
    optimizer remembers of it) is taken back, and the change is multiplied by the period where it has.

    Args:
        every: steps from one window to the next; the authors' is an epoch.
        window: steps of a window. The authors train through it and take it back; here it counts.

    Source: TetraJet, Q-Ramping.
    """

    child = "ramping"
    every: int = 1000
    window: int = 30
    ratio: float = 16.0
    gain: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.window < self.every or not (self.ratio > 0 and self.gain > 0):
            raise UserError(f"windows lie apart: 0 < window < every, ratio > 0, gain > 0, not {self}")

    def make(self, layer: QuantizedLayer) -> Upkeep:
        """Periods, and gradients that wait."""
        return _Ramping(layer, self)

    def __str__(self) -> str:
        return f"weights that oscillate are updated less often, found every {self.every} steps (Q-Ramping)"


class _Ramping(_Watched, StepHooks):
    period: Tensor
    waited: Tensor
    gradient: Tensor

    def __init__(self, layer: QuantizedLayer, spec: QRamping):
        super().__init__(layer)
        self.spec = spec
        self._hold(layer, "period", "waited", "gradient")
        self.period.fill_(1.0)
        self._kept: tuple[Tensor, Tensor, dict[str, _Kept]] | None = None

    def advance(self, step: int, layer: QuantizedLayer) -> None:
        place = step % self.spec.every
        if place == 0:
            self.begin(layer)
            self.period.fill_(1.0)
        elif place <= self.spec.window:
            self.watch(layer)
            if place == self.spec.window:
                share = torch.floor(self.jumped / self.spec.ratio / (self.moved + 1e-8))
                self.period.copy_((share * self.spec.gain + 1).floor_().clamp_(max=self.spec.every))

    def before_step(self, weight: nn.Parameter, state: dict[str, Any]) -> None:
        """Its gradient is the mean of those that waited, where the time has come."""
        self._kept = None
        if weight.grad is None:
            return
        if bool(weight.grad.isfinite().all()):
            self.gradient.add_(weight.grad)
        self.waited.add_(1.0)
        due = self.waited % self.period == 0
        weight.grad.copy_(torch.where(due, self.gradient / self.waited, 0.0))
        kept = {k: _keep(v) for k, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}
        self._kept = due, weight.detach().clone(), kept

    def after_step(self, weight: nn.Parameter, state: dict[str, Any]) -> None:
        """What is not due goes back, what is due has moved for all the steps that it waited."""
        if self._kept is None:
            return
        due, before, kept = self._kept
        self._kept = None
        moved = before + (weight - before) * self.waited.to(weight.dtype)
        weight.copy_(torch.where(due, torch.where(self.waited == 1, weight, moved), before))
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                _take_back(value, due, kept.get(name))
        self.waited.masked_fill_(due, 0.0)
        self.gradient.masked_fill_(due, 0.0)


class _Kept(NamedTuple):
    """What an optimizer remembered of a weight; of torchao's states of few bits also their codes, and scales of blocks."""

    numbers: Tensor
    codes: Tensor | None = None
    scale: Tensor | None = None


def _numbers(t: Tensor) -> Tensor:
    return t.dequantize() if hasattr(t, "codes") else t


def _keep(t: Any) -> _Kept:
    parts = (t.codes.clone(), t.scale.clone()) if hasattr(t, "codes") else ()
    return _Kept(_numbers(t).clone(), *parts)


def _take_back(t: Any, due: Tensor, kept: _Kept | None) -> None:
    """What is not due is what it was, 0 where it was nothing. In a block of few bits with something due, to a rounding."""
    new = _numbers(t)
    t.copy_(torch.where(due, new, torch.zeros_like(new) if kept is None else kept.numbers))
    if kept is None or kept.codes is None or kept.scale is None:
        return
    blocks = kept.scale.numel()
    waits = ~due.reshape(blocks, -1).any(1)
    t.codes.view(torch.uint8).view(blocks, -1)[waits] = kept.codes.view(torch.uint8).view(blocks, -1)[waits]
    t.scale[waits] = kept.scale[waits]
