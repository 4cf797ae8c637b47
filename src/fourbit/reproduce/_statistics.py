"""What a few seeds say: paired differences, their confidence interval, what several comparisons show together, and which
differences so few seeds could have seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fourbit._statistics import T_975, half_interval

ERROR, POWER = 0.05, 0.8
"""Of all comparisons together; of finding a difference that is there."""


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

    @property
    def error(self) -> float | None:
        """Standard error of the mean; None of fewer than two."""
        return None if self.half is None else self.half / T_975[min(self.n - 1, len(T_975)) - 1]

    @property
    def p(self) -> float | None:
        """Of Student's paired t-test, two-sided: how often seeds alone would show as large a mean; None of fewer than two.

        >>> round(paired([1.0, 2.0, 3.0]).p, 3)
        0.074
        """
        if self.error is None:
            return None
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        from scipy.special import stdtr

        return float(2 * stdtr(self.n - 1, -abs(self.mean) / self.error))


def paired(differences: Sequence[float]) -> Paired | None:
    """Mean and interval; None of nothing.

    >>> found = paired([1.0, 2.0, 3.0])
    >>> found.mean, round(found.half, 3), found.n
    (2.0, 2.484, 3)
    """
    if not differences:
        return None
    return Paired(statistics.fmean(differences), half_interval(differences), len(differences))


def holm(ps: Sequence[float]) -> list[float]:
    """Each p, adjusted for all being looked at together: Holm, Scandinavian Journal of Statistics 6 (1979) 65.

        adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)),   p_(1) <= ... <= p_(m)

    >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
    [0.06, 0.03, 0.06]
    """
    adjusted, largest = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[place]))
        adjusted[place] = largest
    return adjusted


def detectable(error: float, n: int) -> float:
    """The true difference that n seeds show with 80 % probability, about: (t(0.975) + t(0.8)) times the standard error.

    >>> round(detectable(1.0, 3), 2)
    5.36
    """
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - ERROR / 2) + stdtrit(n - 1, POWER)) * error


def together(found: Sequence[tuple[str, str, Paired]], unit: str) -> list[str]:
    """What the comparisons (name, name, difference) show when all are looked at, and what they could have shown."""
    tested = [(a, b, d, d.p) for a, b, d in found if d.p is not None and d.error is not None]
    said = []
    if len(tested) > 1:
        adjusted = holm([p for _, _, _, p in tested])
        kept = [f"{a} and {b}" for (a, b, _, _), p in zip(tested, adjusted, strict=True) if p < ERROR]
        words = "; ".join(kept) if kept else "none"
        said.append(
            f"Each interval covers its own difference with 95 %. Of {len(tested)} comparisons looked at together, with an "
            f"error of 5 % for all of them (Holm's correction), these differ: {words}."
        )
    if tested:
        n = statistics.mode(d.n for _, _, d, _ in tested)
        error = statistics.median(d.error for _, _, d, _ in tested if d.error is not None and d.n == n)
        if math.isfinite(error) and error > 0:
            said.append(
                f"With {n} seeds, a true difference of about {detectable(error, n):.2g} {unit} would be seen four times in "
                "five; smaller ones are missed more often than that."
            )
    return said


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
