"""What a few seeds say: paired differences, their confidence interval, and a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fourbit._statistics import half_interval


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
    if not differences:
        return None
    return Paired(statistics.fmean(differences), half_interval(differences), len(differences))


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
