"""What a recipe looks after from step to step beside its products: weights that oscillate between two numbers of the grid, and
channels of the input that stand out.

    QEma        rounds a weight to the side of its running average
    QRamping    updates weights that oscillate less often, by more
    OsciReset   moves weights that oscillate to the middle of their rounding interval
    OutControl  multiplies the channels of x that stand out in a format of more bits

Each is a description; its state, an `Upkeep`, is a child of the layer's `quant`: plain tensors in every checkpoint. A
`Scheduler` calls `advance` before each step.

Sources: Chen et al., TetraJet, arXiv 2502.20853; TetraJet-v2, arXiv 2510.27527; and their code (Apache-2.0).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.nn._base import QuantizedLayer
from fourbit.ops import LayerSpec, LayerState, oriented
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


class Upkeep(nn.Module):
    """The state of one kind of upkeep of one layer.

    Attributes:
        last: the step that it was last brought up to; -1: none yet.
    """

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.tensor(-1, dtype=torch.int64))
        self._last: int | None = None  # `last`: reading it from a GPU would wait for the GPU

    def _hold(self, layer: QuantizedLayer, *names: str) -> None:
        """A float32 buffer of zeros for each name, in the shape of the weight."""
        for name in names:
            self.register_buffer(name, torch.zeros_like(layer.weight, dtype=torch.float32))  # type: ignore[arg-type]

    def at(self, step: int, layer: QuantizedLayer) -> None:
        """Bring it up to a step, whose forward pass comes next. Once for each step, however often it is called."""
        if step != self.seen():
            with torch.no_grad():
                self.advance(step, layer)
            self.last.fill_(step)
            self._last = step

    def seen(self) -> int:
        """The last step."""
        if self._last is None:
            self._last = int(self.last)
        return self._last

    def advance(self, step: int, layer: QuantizedLayer) -> None:
        """What happens before the forward pass of a step."""
        raise NotImplementedError

    def require(self) -> None:
        """Refuse a training that does not bring it up to its steps."""
        if self.seen() < 0:
            raise UserError(
                "this recipe looks after its weights from step to step: make scheduler = fourbit.scheduler(model, recipe, "
                "total_steps) once, and call scheduler.at(step) before the forward pass of each step"
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A float checkpoint has none of it, and nothing counts as missing."""
        self._last = None
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Upkeep:
        """Moves between devices, but keeps dtypes."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class StepHooks(ABC):
    """An upkeep that changes the optimizer's steps: `Scheduler.attach(optimizer)` calls it around each."""

    @abstractmethod
    def before_step(self, weight: nn.Parameter, state: dict[str, Any]) -> None:
        """The optimizer is about to step."""

    @abstractmethod
    def after_step(self, weight: nn.Parameter, state: dict[str, Any]) -> None:
        """It has."""


@dataclass(frozen=True)
class UpkeepSpec(ABC):
    """A kind of upkeep."""

    child = ""
    """The name of its state among the children of `quant`."""

    @abstractmethod
    def make(self, layer: QuantizedLayer) -> Upkeep:
        """Its state for a layer."""

    def attach(self, layer: QuantizedLayer, name: str) -> None:
        """Give a layer its state.

        Raises:
            UserError: the layer has no weight of its own, or one that is not rounded to the nearest by what the batch shows.
        """
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, nn.Parameter):
            raise UserError(
                f"{type(self).__name__} looks after weights of linear and convolution layers, and {name} has none of its own: "
                f"keep it in full precision by a rule before, Rule(None, where=name({name!r}))"
            )
        spec = layer.spec.w_fprop
        if (
            spec is None
            or spec.stochastic
            or spec.transform is not None
            or spec.scaling.state_class
            or spec.scaling.clips
        ):
            raise UserError(
                f"{type(self).__name__} is for weights that fprop rounds to the nearest, without rotation and clip value; "
                f"{name} has {spec}"
            )
        layer.quant.add_module(self.child, self.make(layer).to(weight.device).train(layer.training))


@dataclass(frozen=True)
class QEma(UpkeepSpec):
    """Weights are rounded to the one of their two neighbours that lies on the side of their running average

        m' = decay m + (1 - decay) w      after each step, m = w before the first

    from step `after` on, before that to the nearest. `Format.round_toward` is the definition.

    Source: TetraJet, Q-EMA.
    """

    child = "average"
    decay: float = 0.9983
    after: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1 or self.after < 0:
            raise UserError(f"an average has a decay between 0 and 1, and begins after 0 or more steps, not {self}")

    def make(self, layer: QuantizedLayer) -> Upkeep:
        """The average."""
        grid = layer.spec.w_fprop.format.grid  # type: ignore[union-attr]
        if 0.0 not in grid or any(-v not in grid for v in grid):
            raise UserError("Q-EMA needs a symmetric grid with zero: choose another format for w_fprop")
        return _Average(layer, self)

    def __str__(self) -> str:
        return f"weights rounded to the side of their average (Q-EMA, decay {self.decay:g}) from step {self.after} on"


class _Average(Upkeep):
    mean: Tensor

    def __init__(self, layer: QuantizedLayer, spec: QEma):
        super().__init__()
        self.spec = spec
        self._hold(layer, "mean")

    def advance(self, step: int, layer: QuantizedLayer) -> None:
        w = layer.weight.detach().to(torch.float32)  # type: ignore[operator]
        if self.seen() < 0:
            self.mean.copy_(w)
        else:
            self.mean.mul_(self.spec.decay).add_(w, alpha=1 - self.spec.decay)

    def toward(self) -> Tensor | None:
        """The average, once weights are rounded to its side."""
        return self.mean if self.seen() >= self.spec.after else None


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
        self._kept: tuple[Tensor, Tensor, dict[str, Tensor]] | None = None

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
        kept = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and v.shape == weight.shape}
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
                value.copy_(torch.where(due, value, kept.get(name, torch.zeros_like(value))))
        self.waited.masked_fill_(due, 0.0)
        self.gradient.masked_fill_(due, 0.0)


@dataclass(frozen=True)
class OutControl(UpkeepSpec):
    """The channels of x that stand out have products of their own, in a format of more bits. Which they are is decided once, by
    the sum of their norms over the batches of some steps.

    Args:
        high: the operands of those channels.
        share: of the channels.
        start: the first step whose batches count.
        steps: how many do.

    Source: TetraJet-v2, OutControl.
    """

    child = "channels"
    high: LayerSpec = LayerSpec()
    share: float = 0.1
    start: int = 501
    steps: int = 50

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.start < 0 or self.steps < 1:
            raise UserError(f"a share between 0 and 1, start >= 0 and steps >= 1 are needed, not {self}")

    def make(self, layer: QuantizedLayer) -> Upkeep:
        """Norms of channels, and the choice."""
        if not isinstance(layer, nn.Linear):
            raise UserError(
                f"OutControl is for linear layers, and one is a {type(layer).__name__}: keep it in full precision by a rule "
                "before"
            )
        return Channels(layer, self)

    def __str__(self) -> str:
        x = self.high.x_fprop
        share, format = f"{self.share:.0%}".replace("%", " %"), "full precision" if x is None else x.format.name
        which = f"the {share} of the channels of x with the largest norms"
        return f"after step {self.start + self.steps - 1}, {which} in {format} (OutControl)"


class Channels(Upkeep):
    """The choice of channels of a linear layer.

    Attributes:
        norms: summed over the batches that count.
        chosen: 1 for channels of their own products.
        state: their products.
    """

    norms: Tensor
    chosen: Tensor

    def __init__(self, layer: QuantizedLayer, spec: OutControl):
        super().__init__()
        self.spec = spec
        assert isinstance(layer, nn.Linear)
        self.register_buffer("norms", torch.zeros(layer.in_features, dtype=torch.float32))
        self.register_buffer("chosen", torch.zeros(layer.in_features, dtype=torch.uint8))
        quant: LayerState = layer.quant  # type: ignore[assignment]
        self.state = LayerState(
            spec.high, layer.out_features, quant.counter.seed, quant.counter.index + (1 << 20), quant.products
        )
        self._parts: tuple[Tensor, Tensor] | None = None
        self._decided: bool | None = None

    @property
    def records(self) -> bool:
        """Whether the batches of this step count."""
        return 0 <= self.seen() - self.spec.start < self.spec.steps

    def advance(self, step: int, layer: QuantizedLayer) -> None:
        if step == self.spec.start + self.spec.steps:
            number = round(self.spec.share * self.norms.numel())
            self.chosen.zero_()
            self.chosen[self.norms.argsort(descending=True, stable=True)[:number]] = 1
            self._parts = self._decided = None

    def parts(self) -> tuple[Tensor, Tensor] | None:
        """The other channels and the chosen ones; None before the choice."""
        if self._decided is None:
            self._decided = bool(self.chosen.any())
            self._parts = ((self.chosen == 0).nonzero()[:, 0], self.chosen.nonzero()[:, 0]) if self._decided else None
        return self._parts

    def record(self, x: Tensor) -> None:
        """Count a batch [..., channels]."""
        if x.numel():
            self.norms.add_(torch.linalg.vector_norm(x.detach().flatten(0, -2).to(torch.float32), dim=0))

    def _load_from_state_dict(self, *args: Any) -> None:
        self._parts = self._decided = None
        super()._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Upkeep:
        self._parts = self._decided = None
        return super()._apply(fn, recurse)
