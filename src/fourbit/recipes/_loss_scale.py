"""The baseline that GradScale is compared with: one dynamic scale, multiplied into the loss (as NVIDIA's APEX has it).

    first step  the power of two with which the largest gradient of any layer just fits, unless `init` is given
    overflow    a gradient beyond the format's range in any layer, or a non-finite one: scale / 2
    otherwise   after `interval` steps without overflow: scale * 2

So the largest gradient of any layer, and of any of the last `interval` steps, decides for all: layers and steps with smaller
ones lose them to underflow. That is the comparison. A 4-bit overflow only saturates, so the step is kept; a step with
non-finite gradients is skipped.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn import quantized_layers

SMALLEST, LARGEST = 2.0**-24, 2.0**60


class LossScaler:
    """Dynamic loss scale for recipes with `LossScaled` gradients.

    Args:
        model: converted by such a recipe.
        init: first scale; None takes it from the first gradients (the first step itself has 2^16).
        interval: steps without overflow before the scale doubles. APEX uses 2000; shorter runs need a shorter one.

    >>> scaler = LossScaler(nn.Linear(2, 2), init=2.0**10)
    >>> float(scaler.scale(torch.tensor(0.5)))
    512.0
    """

    def __init__(self, model: nn.Module, init: float | None = None, interval: int = 200):
        self.model, self.interval = model, interval
        self.value = 2.0**16 if init is None else init
        self.clean_steps = 0
        self._undecided = init is None
        self._finite = True

    def scale(self, loss: Tensor) -> Tensor:
        """loss times the current scale."""
        return loss * self.value

    def unscale_(self, optimizer: torch.optim.Optimizer) -> bool:
        """Divide all gradients by the scale, in place. False: some are not finite, skip the step."""
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return True
        for grad in grads:
            grad.mul_(1.0 / self.value)
        self._finite = bool(torch.nn.utils.get_total_norm(grads, float("inf")).isfinite())
        return self._finite

    def update(self) -> None:
        """Move the scale; call once per step, after backward."""
        fullness = self._fullness()
        overflow = not self._finite or fullness > 1
        if self._undecided and self._finite and 0 < fullness < math.inf:
            fitting = self.value * 2.0 ** -math.ceil(math.log2(fullness))
            self.value, self._undecided = min(max(fitting, SMALLEST), LARGEST), False
            return
        self._finite = True
        self.clean_steps = 0 if overflow else self.clean_steps + 1
        if overflow:
            self.value = max(self.value / 2, SMALLEST)
        elif self.clean_steps >= self.interval:
            self.value, self.clean_steps = min(self.value * 2, LARGEST), 0

    def _fullness(self) -> float:
        """The largest gradient of any layer over the largest number of its format since the last call; 0 without any."""
        fullness = 0.0
        for layer in quantized_layers(self.model).values():
            if layer.spec.needs_loss_scale:
                fullness = max(fullness, layer.quant.scalings["g"].fullness())
        return fullness

    def state_dict(self) -> dict[str, Any]:
        """Scale, count of clean steps, and whether the first gradients are still to come."""
        return {"value": self.value, "clean_steps": self.clean_steps, "undecided": self._undecided}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
        self.value, self.clean_steps = float(state["value"]), int(state["clean_steps"])
        self._undecided = bool(state.get("undecided", False))


def loss_scaler(model: nn.Module, interval: int = 200) -> LossScaler | None:
    """A LossScaler if the model's recipe needs one, None otherwise. In a training loop:

    scaler = fb.loss_scaler(model)          # once, after convert
    ...
    scaler.scale(loss).backward()           # in place of loss.backward(); in several processes: fb.synchronize(model)
    if scaler.unscale_(optimizer):          # in place of optimizer.step()
        optimizer.step()
    scaler.update()

    Args:
        interval: as of `LossScaler`.
    """
    for layer in quantized_layers(model).values():
        if layer.spec.needs_loss_scale:
            return LossScaler(model, interval=interval)
    return None
