"""LARS: stochastic gradient descent whose steps are a share of the length of what they change, layer by layer.

You, Gitman and Ginsburg, "Large batch training of convolutional networks" (arXiv 1708.03888), Algorithm 1. The length of a
layer's gradient drops out of its step, and with it whatever rounding does to that length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

OTHERS = 10.0
"""Rate of plain steps over that of the others: 0.01 goes with SGD's usual 0.1."""


class Lars(torch.optim.Optimizer):
    """v <- momentum v + lr |w| / (|g| + decay |w|) (g + decay w);  w <- w - v.

    |.| is the Euclidean norm of all of a parameter. Parameters with less than two axes (biases, normalization, clip values),
    and those whose weight or gradient is zero, take steps of SGD with 10 times the rate: v <- momentum v + 10 lr (g + decay w).

    Args:
        groups: of `fourbit.param_groups`.
        lr: the paper's learning rate times its coefficient eta: the share of a layer's length that changes in the first step;
            with momentum m, about lr / (1 - m) later on.
        momentum: in [0, 1).
    """

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float, momentum: float):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad.add(p, alpha=decay) if decay else p.grad
                length, of_gradient = (float(p.norm()), float(p.grad.norm())) if p.dim() > 1 else (0.0, 0.0)
                share = length / (of_gradient + decay * length) if length > 0 and of_gradient > 0 else OTHERS
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                p.sub_(state["momentum_buffer"].mul_(group["momentum"]).add_(d, alpha=group["lr"] * share))
        return loss
