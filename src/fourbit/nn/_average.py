"""Q-EMA: weights rounded to the side of their running average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.nn._base import QuantizedLayer
from fourbit.nn._upkeep import Upkeep, UpkeepSpec


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
