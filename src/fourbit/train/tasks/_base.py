"""What every task has."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.train._config import TrainConfig
from fourbit.train.tasks._metric import Metric

Batch = tuple[Tensor, ...]
"""The targets come last."""

Examples = dict[str, list[Any]]
"""A table: `columns`, the names, and `rows`, lists of text."""


MOST_EXAMPLES = 8
"""Rows of it."""


class Task(ABC):
    """See `fourbit.train.tasks`.

    Args:
        config: of the run.
        rank, world: of the processes that share each batch.
        device: where batches go.
    """

    metric: Metric
    data: Any
    """What `fourbit.data.load` gave."""
    judged_at_the_end = False
    """Whether `evaluate` is so slow that only the last evaluation calls it; the others take the counts of `loss`."""

    def __init__(self, config: TrainConfig, device: torch.device, rank: int, world: int):
        self.config, self.device, self.rank, self.world = config, device, rank, world

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, in full precision."""

    @abstractmethod
    def num_batches(self) -> int:
        """Of a training epoch."""

    @abstractmethod
    def batches(self, split: str, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Of an epoch from batch `start` on, as this process takes them."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Mean loss, and float64 [loss summed, hits, number of predictions], which counts exactly."""

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Any]]:
        """The counts of `loss` for a test batch, and what `judge` needs to know of each of its items."""
        return self.loss(model, batch)[1], []

    def judge(self, findings: list[Any]) -> float | None:
        """A score of all items, from what `evaluate` found; None where there is no such score."""
        return None

    def examples(self, findings: list[Any]) -> Examples | None:
        """Some of what `evaluate` found, to be looked at; None where there is nothing to look at."""
        return None

    def figures(self, loss: float) -> dict[str, float]:
        """Further numbers that follow from the mean loss of an evaluation, by their names in metrics.jsonl."""
        return {}

    def sample(self, model: nn.Module) -> str | None:
        """What the trained network produces, to be looked at; None where that is nothing to look at."""
        return None

    def check(self) -> None:
        """Raise a UserError for what would fail only after training: an evaluation that cannot begin."""
        return

    def snapshot(self) -> Callable[[], None]:
        """What the task carries from batch to batch now; a call of the result brings it back."""
        return lambda: None

    def state_tensors(self, gather: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        """What the task carries from batch to batch, for a checkpoint. Called by all processes; `gather` joins their tensors
        along the first axis."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse."""
        return


def package(name: str, what: str) -> Any:
    """The module, or a UserError that says how to get what is needed for `what`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the package {name}: pip install 'fourbit[train]'.") from error


def counts_of(loss: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    """Loss summed, hits, and number of predictions, float64."""
    hits = (logits.detach().argmax(-1) == y).sum()
    return torch.stack([loss.detach().double() * len(y), hits.double(), hits.new_tensor(len(y)).double()])
