"""Sentences to sentences of another language."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit import data as datasets
from fourbit import models
from fourbit.data import TranslationData
from fourbit.train._config import TrainConfig
from fourbit.train.tasks._base import MOST_EXAMPLES, Batch, Examples, Task, package
from fourbit.train.tasks._metric import BLEU


class Translation(Task):
    """Sentences to sentences: cross entropy of the next token, BLEU of the translations of the test sentences."""

    metric = BLEU
    judged_at_the_end = True

    def __init__(self, config: TrainConfig, data: TranslationData, device: torch.device, rank: int, world: int):
        super().__init__(config, device, rank, world)
        self.data = data

    def build(self) -> nn.Module:
        """With as many outputs as the vocabulary has tokens."""
        model = models.build(self.config.model, num_classes=self.data.num_tokens)
        longest = getattr(model, "max_length", None)
        if longest is not None:
            self.data.check_length(longest, self.config.model)
        return model

    def num_batches(self) -> int:
        """Whole ones only."""
        return datasets.num_batches(self.data, "train", self.config.batch_size)

    def batches(self, split: str, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Training pairs shuffled; every process takes each n-th."""
        config, size = self.config, self.config.batch_size if split == "train" else self.config.eval_batch_size
        assert size is not None
        own = slice(self.rank, None, self.world)
        for source, rows, target in datasets.pairs(self.data, split, size, config.seed, epoch, start):
            yield source[:, own].to(self.device), rows[own], target[:, own].to(self.device)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Over the tokens of the target sentences, end marks among them."""
        source, _, target = batch
        begin = torch.full_like(target[:1], datasets.BEGIN)
        logits = model(source, torch.cat((begin, target[:-1]))).flatten(0, 1)
        y = target.flatten()
        there = y != datasets.PAD
        loss = F.cross_entropy(logits.float(), y, ignore_index=datasets.PAD, label_smoothing=label_smoothing)
        hits = (logits.detach().argmax(-1) == y)[there].sum()
        count = there.sum().double()
        counts = torch.stack([loss.detach().double() * count, hits.double(), count])
        if self.world > 1 and model.training:  # the mean over processes is to be one over tokens
            everywhere = count.clone()
            torch.distributed.all_reduce(everywhere)
            loss = loss * (count * self.world / everywhere).to(loss.dtype)
        return loss, counts

    def evaluate(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Any]]:
        """With the translations and the numbers of their pairs."""
        source, rows, _ = batch
        network: Any = getattr(model, "module", model)  # what distributed training wraps is not needed here
        found = network.translate(source, self.config.beam_size).t().tolist()
        texts = [self.data.text(tokens) for tokens in found]
        return self.loss(model, batch)[1], list(zip(texts, rows.tolist(), strict=True))

    def check(self) -> None:
        """sacrebleu is there."""
        package("sacrebleu", "BLEU")

    def judge(self, findings: list[Any]) -> float | None:
        """BLEU as sacrebleu defines it: its own tokens, case kept."""
        return (
            package("sacrebleu", "BLEU")
            .corpus_bleu([found for found, _ in findings], [[self.data.references[i] for _, i in findings]])
            .score
        )

    def examples(self, findings: list[Any]) -> Examples:
        """The first test sentences that were translated."""
        shown = sorted(findings, key=lambda found: found[1])[:MOST_EXAMPLES]
        sources = self.data.test[0]
        rows = [[self.data.text(sources[i].tolist()), self.data.references[i], found] for found, i in shown]
        return {"columns": ["source", "reference", "translation"], "rows": rows}
