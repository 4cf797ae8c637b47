"""What a run trains for: which network fits the data, how batches come, what the loss is, and by which number it is judged.

A task is chosen by the data: images are classified, of text the next token is predicted, speech is heard, pairs of sentences
are translated. The loop asks a task for batches
and losses and knows nothing else about data.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit import data as datasets
from fourbit import models
from fourbit.data import ImageData, LargeImages, SpeechData, TextData, TranslationData
from fourbit.errors import UserError
from fourbit.train._config import Settings, TrainConfig

Batch = tuple[Tensor, ...]
"""The targets come last."""


@dataclass(frozen=True)
class Metric:
    """The number by which runs are judged.

    Args:
        name: in tables.
        unit: behind the name, in parentheses.
        factor: what the number is multiplied with to be shown.
        higher_is_better: otherwise lower is.
        items: what is predicted, in the plural.
        source: what it is computed from: the share of hits, the mean loss, or a score of whole texts.
    """

    name: str
    unit: str
    factor: float
    higher_is_better: bool
    items: str
    source: Literal["accuracy", "loss", "score"]

    def of(self, loss: float | None, accuracy: float | None, score: float | None) -> float | None:
        """The number, from what is measured of a run: mean loss, share of hits, and what `Task.judge` found."""
        if self.source == "loss":
            return None if loss is None else math.exp(min(loss, 700.0))
        return accuracy if self.source == "accuracy" else score

    @property
    def title(self) -> str:
        """Name and unit."""
        return f"{self.name} {self.unit}".strip()

    def text(self, value: float) -> str:
        """The number with its unit."""
        return f"{value * self.factor:.2f}{self.unit}"


ACCURACY = Metric("accuracy", "%", 100.0, True, "images", "accuracy")
PERPLEXITY = Metric("perplexity", "", 1.0, False, "tokens", "loss")
WORD_ERROR_RATE = Metric("word error rate", "%", 100.0, False, "utterances", "score")
BLEU = Metric("BLEU", "", 1.0, True, "tokens", "score")


def metric_of(settings: Settings) -> Metric:
    """The metric of runs with these settings."""
    kinds = {"image": ACCURACY, "text": PERPLEXITY, "speech": WORD_ERROR_RATE, "translation": BLEU}
    return kinds[models.kind_of(settings.model)]


class Task(ABC):
    """See the module.

    Args:
        config: of the run.
        rank, world: of the processes that share each batch.
        device: where batches go.
    """

    metric: Metric
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

    def check(self) -> None:
        """Raise a UserError for what would fail only after training: an evaluation that cannot begin."""
        return

    def state_tensors(self, gather: Callable[[Tensor], Any]) -> dict[str, Tensor]:
        """What the task carries from batch to batch, for a checkpoint. Called by all processes; `gather` joins their tensors
        along the first axis."""
        return {}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse."""
        return


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
        return loss, _counts(loss, logits, y), logits


class LanguageModelling(Task):
    """The next token after each: cross entropy, perplexity = exp(mean loss). The state of the network goes from window to
    window, but gradients do not."""

    metric = PERPLEXITY

    def __init__(self, config: TrainConfig, data: TextData, device: torch.device, rank: int, world: int):
        super().__init__(config, device, rank, world)
        self.data = data
        self._carried: dict[str, tuple[Tensor, ...]] = {}

    def build(self) -> nn.Module:
        """With as many outputs as the vocabulary has tokens."""
        return models.build(self.config.model, num_classes=len(self.data.vocabulary))

    def num_batches(self) -> int:
        """Windows, the last shorter one among them."""
        return datasets.num_windows(self.data, "train", self.config.batch_size, self.config.sequence_length)

    def batches(self, split: str, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Windows in the order of the text; every process takes each n-th row."""
        config, size = self.config, self.config.batch_size if split == "train" else self.config.eval_batch_size
        assert size is not None
        if start == 0:
            self._carried.pop(split, None)
        for batch in datasets.windows(self.data, split, size, config.sequence_length, start):
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
        return loss, _counts(loss, logits, y)

    def check(self) -> None:
        """There is a window of test text."""
        size = self.config.eval_batch_size
        assert size is not None
        datasets.num_windows(self.data, "test", size, self.config.sequence_length)

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
        return datasets.num_utterance_batches(self.data, "train", self.config.batch_size)

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
        _package("jiwer", "the word error rate")

    def judge(self, findings: list[Any]) -> float | None:
        """Word error rate."""
        return float(
            _package("jiwer", "the word error rate").wer(
                [said for _, said in findings], [heard for heard, _ in findings]
            )
        )

    def _measure(self, model: nn.Module, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        x, lengths, y = batch
        logits = model(x, lengths)
        loss = F.cross_entropy(logits.float(), y, label_smoothing=label_smoothing)
        return loss, _counts(loss, logits, y), logits


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
        return datasets.num_pair_batches(self.data, "train", self.config.batch_size)

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
        """With the translations and the references."""
        source, rows, _ = batch
        network: Any = getattr(model, "module", model)  # what distributed training wraps is not needed here
        found = network.translate(source, self.config.beam_size).t().tolist()
        texts = [self.data.text(tokens) for tokens in found]
        return self.loss(model, batch)[1], [
            (t, self.data.references[i]) for t, i in zip(texts, rows.tolist(), strict=True)
        ]

    def check(self) -> None:
        """sacrebleu is there."""
        _package("sacrebleu", "BLEU")

    def judge(self, findings: list[Any]) -> float | None:
        """BLEU as sacrebleu defines it: its own tokens, case kept."""
        return (
            _package("sacrebleu", "BLEU")
            .corpus_bleu([found for found, _ in findings], [[right for _, right in findings]])
            .score
        )


def make_task(config: TrainConfig, device: torch.device, rank: int, world: int) -> Task:
    """The task of the configured data.

    Raises:
        UserError: data that cannot be loaded, or that the network does not read.
    """
    data = datasets.load(config.data, config.data_dir)
    kinds: dict[type, models.Kind] = {TextData: "text", SpeechData: "speech", TranslationData: "translation"}
    kind = kinds.get(type(data), "image")
    reads = models.kind_of(config.model)
    if reads != kind:
        words = {"text": "text", "image": "images", "speech": "speech", "translation": "pairs of sentences"}
        raise UserError(
            f"{config.model} reads {words[reads]}, but {config.data} has {words[kind]}: choose one of "
            f"{', '.join(models.names(kind))}."
        )
    processes = device, rank, world
    if isinstance(data, TextData):
        return LanguageModelling(config, data, *processes)
    if isinstance(data, SpeechData):
        return SpeechRecognition(config, data, *processes)
    if isinstance(data, TranslationData):
        return Translation(config, data, *processes)
    return Classification(config, data, *processes)


def _package(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{what} needs the package {name}: pip install 'fourbit[train]'.") from error


def _counts(loss: Tensor, logits: Tensor, y: Tensor) -> Tensor:
    hits = (logits.detach().argmax(-1) == y).sum()
    return torch.stack([loss.detach().double() * len(y), hits.double(), hits.new_tensor(len(y)).double()])
