"""Utterances to words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit import data as datasets
from fourbit import models
from fourbit.data import SpeechData
from fourbit.train._config import TrainConfig
from fourbit.train.tasks._base import MOST_EXAMPLES, Batch, Examples, Task, counts_of, package
from fourbit.train.tasks._metric import WORD_ERROR_RATE


class SpeechRecognition(Task):
    """Utterances of one word to words: cross entropy, word error rate."""

    metric = WORD_ERROR_RATE

    def __init__(self, config: TrainConfig, data: SpeechData, device: torch.device, rank: int, world: int):
        super().__init__(config, device, rank, world)
        self.data = data

    def build(self) -> nn.Module:
        """With as many features and classes as the data have."""
        data = self.data
        return models.build(self.config.model, num_classes=len(data.classes), in_channels=data.num_features)

    def num_batches(self) -> int:
        """Whole ones only."""
        return datasets.num_batches(self.data, "train", self.config.batch_size)

    def batches(self, split: str, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Training utterances shuffled; every process takes each n-th."""
        config, size = self.config, self.config.batch_size if split == "train" else self.config.eval_batch_size
        assert size is not None
        for x, lengths, y in datasets.utterances(self.data, split, size, config.seed, epoch, config.augment, start):
            own = slice(self.rank, None, self.world)
            yield x[:, own].to(self.device), lengths[own], y[own].to(self.device)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Over the utterances of the batch."""
        return self._measure(model, batch, label_smoothing)[:2]

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Any]]:
        """With the words heard and said."""
        _, counts, logits = self._measure(model, batch)
        heard, said = logits.argmax(-1).tolist(), batch[-1].tolist()
        names = self.data.classes
        return counts, [(names[a], names[b]) for a, b in zip(heard, said, strict=True)]

    def check(self) -> None:
        """jiwer is there."""
        package("jiwer", "the word error rate")

    def judge(self, findings: list[Any]) -> float | None:
        """Word error rate."""
        return float(
            package("jiwer", "the word error rate").wer(
                [said for _, said in findings], [heard for heard, _ in findings]
            )
        )

    def examples(self, findings: list[Any]) -> Examples:
        """Words that were taken for others most often."""
        counts = Counter((said, heard) for heard, said in findings if heard != said)
        rows = [[said, heard, str(times)] for (said, heard), times in counts.most_common(MOST_EXAMPLES)]
        return {"columns": ["said", "heard", "times"], "rows": rows}

    def _measure(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        x, lengths, y = batch
        logits = model(x, lengths)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        return loss, counts_of(loss, logits, y), logits
