"""Images to classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit import data as datasets
from fourbit import models
from fourbit.data import ImageData, LargeImages
from fourbit.train._config import TrainConfig
from fourbit.train.tasks._base import Batch, Task, counts_of
from fourbit.train.tasks._metric import ACCURACY


class Classification(Task):
    """Images to classes: cross entropy, accuracy."""

    metric = ACCURACY

    def __init__(self, config: TrainConfig, data: ImageData | LargeImages, device: torch.device, rank: int, world: int):
        super().__init__(config, device, rank, world)
        self.data = data

    def build(self) -> nn.Module:
        """With as many channels and classes as the data have."""
        data = self.data
        return models.build(
            self.config.model, num_classes=data.num_classes, in_channels=data.channels, image_size=data.image_size
        )

    def num_batches(self) -> int:
        """Whole ones only."""
        return datasets.num_batches(self.data, "train", self.config.batch_size)

    def batches(self, split: str, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Training images shuffled and augmented; every process takes each n-th image."""
        config, size = self.config, self.config.eval_batch_size
        assert size is not None
        shared: dict[str, Any] = {"workers": config.workers, "part": slice(self.rank, None, self.world)}
        if split == "train":
            shared |= {"augment": config.augment, "start": start}
            found = datasets.batches(self.data, split, config.batch_size, config.seed, epoch, **shared)
        else:
            found = datasets.batches(self.data, split, size, **shared)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        for x, y in found:
            yield x.to(self.device, memory_format=layout), y.to(self.device)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Over the images of the batch."""
        return self._measure(model, batch, label_smoothing)[:2]

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Any]]:
        """With a hit or not among the five most probable classes, if there are more than ten."""
        _, counts, logits = self._measure(model, batch)
        if self.data.num_classes <= 10:
            return counts, []
        return counts, (logits.topk(5).indices == batch[-1].unsqueeze(1)).any(1).tolist()

    def judge(self, findings: list[Any]) -> float | None:
        """Top-5 accuracy."""
        return sum(findings) / len(findings) if findings else None

    def _measure(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        x, y = batch
        logits = model(x)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        return loss, counts_of(loss, logits, y), logits
