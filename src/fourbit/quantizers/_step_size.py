"""LSQ's learned step size: a number per operand, and what a layer remembers of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.quantizers._round import nearest_number
from fourbit.quantizers._scaling import TINY, Bound, Scaling
from fourbit.quantizers._scaling_state import Pass, ScalingState, Stored
from fourbit.quantizers._statistics import Statistics
from fourbit.quantizers._tiles import Granularity


class StepState(ScalingState):
    """A step size.

    Tensors:
        step: [1], a Parameter; 0 until a batch decides.
    """

    step = Stored()
    scaling: StepSize

    def tensors(self, format: Format) -> dict[str, Tensor]:
        """As above."""
        self._decided: bool | None = None
        return {"step": nn.Parameter(torch.zeros(1))}

    def begin(self, now: Pass) -> None:
        """A step size that an optimizer took below zero becomes positive again."""
        if now.training and self._is_decided():
            self.write(self.step.detach().abs().clamp_min(TINY))

    def use(self, x: Tensor, format: Format, now: Pass) -> tuple[Format, Tensor | None]:
        """The step size; the first training batch decides it."""
        if self._is_decided():
            return format, self.step
        first = (2 * x.detach().abs().to(torch.float32).mean() / math.sqrt(format.max)).clamp_min(TINY).view(1)
        if now.training and now.with_gradients and bool(first.isfinite()):
            self.write(first)
            self._decided = True
            return format, self.step
        return format, first

    def awaits(self, now: Pass) -> bool:
        """Whether no batch has decided it."""
        return now.training and not self._is_decided()

    def decisions(self) -> list[Tensor]:
        """The step size."""
        return [self.step]

    def agree(self, votes: list[Tensor], decisions: list[Tensor] | None) -> bool:
        """The largest of all."""
        if decisions is not None and bool((decisions[0] > 0).any()):
            self.write(decisions[0].amax(0))
            self._decided = True
        return decisions is None or self._is_decided()

    def reload(self) -> None:
        """Look again."""
        self._decided = None

    def numbers(self) -> dict[str, float | int | None]:
        """The step size."""
        return {"step": self.step.item()}

    def _is_decided(self) -> bool:
        if self._decided is None:
            self._decided = bool((self.step.detach() != 0).any())
        return self._decided

    def __str__(self) -> str:
        return (
            f"step of {self.operand} {self.step.item():.4g}" if self._is_decided() else f"step of {self.operand} open"
        )


@dataclass(frozen=True)
class StepSize(Scaling):
    """LSQ: scale = s, a learned number, x ~ s q with q = clip(round(x / s)) to the format's range.

    Gradients: dx passes where x / s lies in the range, and

        ds = 1 / sqrt(n Q) * sum over all n elements of dx * (q - x / s, or the end of the range where x / s is beyond it)

    with Q the largest number of the format. s starts at 2 mean|x| / sqrt(Q) of the first training batch, and an optimizer that
    takes it below zero finds its magnitude.

    Source: Esser et al., Learned Step Size Quantization, ICLR 2020; as in Xi et al., arXiv 2306.11987, and their code.
    """

    state_class: ClassVar[type[ScalingState] | None] = StepState
    operands: ClassVar[str] = "xw"
    keeps_scale: ClassVar[bool] = True

    @property
    def clips(self) -> bool:
        """Always."""
        return True

    def objection(self, granularity: Granularity) -> str:
        """One step size for the tensor."""
        return "" if granularity == "tensor" else "LSQ has one step size per layer: use granularity='tensor'"

    def of(self, statistics: Statistics, format: Format, stored: Tensor | None) -> Tensor:
        """s."""
        if stored is None:
            raise UserError("LSQ needs a step size: use it in a layer, or pass stored=step")
        return stored.detach().to(torch.float32).view(()).clamp_min(TINY)

    def bound(self, scale: Tensor, format: Format, stored: Tensor | None) -> Bound | None:
        """|x| <= s Q."""
        return Bound("inclusive", scale * format.max)

    def slope(self, x: Tensor, scale: Tensor, format: Format) -> Tensor:
        """What dx is multiplied by in ds, element by element, float32."""
        v = x.to(torch.float32) * scale.reciprocal()
        inside = (v >= format.min) & (v <= format.max)
        found = torch.where(inside, nearest_number(v, format) - v, v.clamp(format.min, format.max))
        return found / math.sqrt(max(1, x.numel()) * format.max)

    def __str__(self) -> str:
        return "LSQ"
