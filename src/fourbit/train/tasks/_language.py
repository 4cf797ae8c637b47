"""The next token of a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit import data as datasets
from fourbit import models
from fourbit.data import TextData
from fourbit.train._config import TrainConfig
from fourbit.train.tasks._base import Batch, Task, counts_of
from fourbit.train.tasks._metric import PERPLEXITY

PROMPT = 32
"""Tokens of test text that a sample goes on from."""
TEMPERATURE = 0.8


class LanguageModelling(Task):
    """The next token after each: cross entropy, perplexity = exp(mean loss). The state of a recurrent network goes from window
    to window, but gradients do not; other networks are trained on sequences in random order."""

    metric = PERPLEXITY

    def __init__(self, config: TrainConfig, data: TextData, device: torch.device, rank: int, world: int):
        super().__init__(config, device, rank, world)
        self.data = data
        assert config.sequence_length is not None
        self.length, self.recurrent = config.sequence_length, models.is_recurrent(config.model)
        self._carried: dict[str, tuple[Tensor, ...]] = {}

    def build(self) -> nn.Module:
        """With as many outputs as the vocabulary has tokens."""
        return models.build(self.config.model, num_classes=len(self.data.vocabulary))

    def num_batches(self) -> int:
        """Windows, the last shorter one among them; of sequences, whole batches only."""
        if self.recurrent:
            return datasets.num_windows(self.data, "train", self.config.batch_size, self.length)
        return datasets.num_sequences(self.data, self.config.batch_size, self.length)

    def batches(self, split: str, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Windows in the order of the text, or sequences; every process takes each n-th row."""
        config, size = self.config, self.config.batch_size if split == "train" else self.config.eval_batch_size
        assert size is not None
        if start == 0:
            self._carried.pop(split, None)
        if split == "train" and not self.recurrent:
            found = datasets.sequences(self.data, size, self.length, config.seed, epoch, start)
        else:
            found = datasets.windows(self.data, split, size, self.length, start)
        for batch in found:
            x, y = (t[:, self.rank :: self.world] if self.world > 1 else t for t in batch)
            yield x.to(self.device), y.to(self.device)

    def loss(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """Over the tokens of the window."""
        x, y = batch
        split = "train" if model.training else "test"
        logits, state = model(x, self._carried.get(split))
        self._carried[split] = tuple(t.detach() for t in state)
        logits, y = logits.flatten(0, 1), y.flatten()
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        return loss, counts_of(loss, logits, y)

    def figures(self, loss: float) -> dict[str, float]:
        """`bits_per_byte` = loss / ln 2 * tokens / bytes of the test text, which does not depend on the kind of tokens; only
        where tokens are the text and nothing is lost."""
        size = self.data.test_bytes
        return {} if not size else {"bits_per_byte": loss / math.log(2) * len(self.data.test) / size}

    def check(self) -> None:
        """There is a window of test text."""
        size = self.config.eval_batch_size
        assert size is not None
        datasets.num_windows(self.data, "test", size, self.length)

    def sample(self, model: nn.Module) -> str | None:
        """The first tokens of the test text, a line of three dashes, and what the network writes next, drawn with temperature
        0.8."""
        if not self.config.sample_tokens:
            return None
        random = torch.Generator().manual_seed(self.config.seed)
        prompt = self.data.test[:PROMPT].tolist()
        tokens, state, rest = list(prompt), None, list(prompt)
        for _ in range(self.config.sample_tokens):
            if not self.recurrent:
                state, rest = None, tokens[-self.length :]
            logits, state = model(torch.tensor(rest, device=self.device).unsqueeze(1), state)
            shares = (logits[-1, 0].double().cpu() / TEMPERATURE).softmax(-1)
            rest = [int(torch.multinomial(shares, 1, generator=random))]
            tokens += rest
        return f"{self.data.text(prompt)}\n---\n{self.data.text(tokens[len(prompt) :])}\n"

    def snapshot(self) -> Callable[[], None]:
        """The state behind the last window of each split."""
        carried = dict(self._carried)

        def restore() -> None:
            self._carried = dict(carried)

        return restore

    def state_tensors(self, gather: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        """The state behind the last training window, [rows of all processes, layers, units]."""
        carried = enumerate(self._carried.get("train", ()))
        return {f"carried.{i}": gather(t.transpose(0, 1).contiguous()) for i, t in carried}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse."""
        found = sorted((key, t) for key, t in tensors.items() if key.startswith("carried."))
        if found:
            own = (t.chunk(self.world)[self.rank].transpose(0, 1).contiguous() for _, t in found)
            self._carried["train"] = tuple(t.to(self.device) for t in own)
