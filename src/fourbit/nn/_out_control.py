"""OutControl: the channels of x that stand out, in a product of their own with more bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.nn._base import QuantizedLayer
from fourbit.nn._upkeep import Upkeep, UpkeepSpec
from fourbit.ops import LayerSpec, LayerState


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
