"""What a few seeds say: paired differences, their confidence interval, and a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Quantile 0.975 of Student's t with 1, 2, ... degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Paired:
    """Differences between runs of the same seed.

    Args:
        mean: their mean.
        half: half the width of the 95 % confidence interval of the mean, by Student's t; None of fewer than two.
        n: how many.
    """

    mean: float
    half: float | None
    n: int


def paired(differences: Sequence[float]) -> Paired | None:
    """Mean and interval; None of nothing.

    >>> found = paired([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 3), found.n
    (2.0, 2.484, 3)
    """
    n = len(differences)
    if not n:
        return None
    half = None
    if n > 1:
        half = T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(differences) / math.sqrt(n)
    return Paired(statistics.fmean(differences), half, n)


def sentence(name: str, reference: str, found: Paired, unit: str, higher_is_better: bool) -> str:
    """What follows from the differences to the reference, and what does not.

    >>> sentence("TPR FP4", "FP32", Paired(-4.6, None, 1), "points", True)
    'TPR FP4 is 4.60 points worse than FP32 with one seed: how far seeds scatter is not known.'
    """
    worse = (found.mean < 0) == higher_is_better and found.mean != 0
    amount = f"{abs(found.mean):.2f} {unit}"
    words = f"{name} is {amount} {'worse' if worse else 'better'} than {reference}"
    if found.mean == 0:
        words = f"{name} equals {reference}"
    if found.half is None:
        return f"{words} with one seed: how far seeds scatter is not known."
    interval = f"95 % interval {found.mean - found.half:+.2f} to {found.mean + found.half:+.2f}, {found.n} seeds"
    if abs(found.mean) <= found.half:
        return f"{name} cannot be told from {reference} ({interval})."
    return f"{words} ({interval})."
