"""What a comparison of recipes finds: a row of statistics for each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fourbit.train.tasks import Metric


@dataclass(frozen=True)
class Row:
    """One recipe of a comparison; statistics over the seeds that finished. Sample standard deviations; None from n = 1.

    Args:
        recipe: its name.
        values: {seed: the metric on the test data}, an accuracy as a fraction; seeds that diverged are missing.
        diverged: seeds whose run met NaN or infinity.
        difference, difference_half: to fp32, over the seeds that both finished, and half the width of its 95 % confidence
            interval (Student's t, seed by seed); None without such seeds, the interval with one.
        train_loss: mean over seeds of the last epoch's training loss.
        seconds_per_epoch: mean over seeds of the median epoch.
    """

    recipe: str
    values: dict[int, float]
    diverged: tuple[int, ...]
    difference: float | None
    difference_half: float | None
    train_loss: float | None
    seconds_per_epoch: float | None

    @property
    def mean(self) -> float | None:
        """Mean of the metric."""
        return mean(list(self.values.values()))

    @property
    def std(self) -> float | None:
        """Sample standard deviation of the metric."""
        return std(list(self.values.values()))


@dataclass(frozen=True)
class Comparison:
    """The outcome: `rows` in the order of the recipes, or `interrupted` with fewer runs than asked for."""

    folder: Path
    metric: Metric
    rows: tuple[Row, ...]
    interrupted: bool = False


def mean(values: Sequence[float]) -> float | None:
    """Mean; None of nothing."""
    return statistics.fmean(values) if values else None


def std(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None
