"""What a recipe looks after from step to step beside its products: weights that oscillate between two numbers of the grid, and
channels of the input that stand out.

    QEma        (`_average`) rounds a weight to the side of its running average
    QRamping    (`_oscillation`) updates weights that oscillate less often, by more
    OsciReset   (`_oscillation`) moves weights that oscillate to the middle of their rounding interval
    OutControl  (`_out_control`) multiplies the channels of x that stand out in a format of more bits

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


class Upkeep(nn.Module, ABC):
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

    @abstractmethod
    def advance(self, step: int, layer: QuantizedLayer) -> None:
        """What happens before the forward pass of a step."""

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
