"""Where a run stands, in a form that a checkpoint can hold: counters as plain values, everything else as tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Tally:
    """Running sums of loss and hits over images."""

    loss_sum: float = 0.0
    correct: int = 0
    images: int = 0

    def add(self, loss_sum: float, correct: int, images: int) -> None:
        """Count a batch."""
        self.loss_sum += loss_sum
        self.correct += correct
        self.images += images

    @property
    def loss(self) -> float:
        """Mean loss; NaN over no images."""
        return self.loss_sum / self.images if self.images else math.nan

    @property
    def accuracy(self) -> float:
        """Share of hits; NaN over no images."""
        return self.correct / self.images if self.images else math.nan


@dataclass
class LoopState:
    """Position and running sums of a run.

    Args:
        step: optimizer steps done, left-out ones included.
        epoch: epochs completed and evaluated.
        skipped: steps left out because of NaN or infinity; skipped_in_a_row: since the last good one.
        seen: what was trained on, over all epochs; None in a run that a version which did not count began.
        window: sums since the last "step" line; whole: since the start of the epoch.
        epoch_seconds, seconds: time spent on the epoch and on everything, over all sittings.
        test_loss, test_accuracy, test_score: of the last evaluation.
    """

    step: int = 0
    epoch: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    seen: int | None = 0
    window: Tally = field(default_factory=Tally)
    whole: Tally = field(default_factory=Tally)
    epoch_seconds: float = 0.0
    seconds: float = 0.0
    test_loss: float | None = None
    test_accuracy: float | None = None
    test_score: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopState:
        """The inverse of `as_dict`."""
        nested = {name: Tally(**values[name]) for name in ("window", "whole")}
        return cls(**{"seen": None, **values, **nested})


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as "optimizer.<parameter number>.<name>". All else follows from the configuration."""
    return {
        f"optimizer.{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`, on an optimizer made from the same configuration."""
    state: dict[int, dict[str, Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            number, _, name = rest.partition(".")
            if name != "step" and value.dim() == 0 and parameters[int(number)].numel() == 1:
                value = value.view_as(parameters[int(number)])  # clip values of earlier versions were 0-d
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators. Models with dropout draw from them; data and stochastic rounding have their own."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["rng.cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def load_rng_tensors(device: torch.device, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `rng_tensors`; a generator that the checkpoint does not know stays as it is."""
    if "rng.cpu" in tensors:
        torch.set_rng_state(tensors["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"], device)
