"""The number by which runs are judged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fourbit import models
from fourbit.train._config import Settings


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
