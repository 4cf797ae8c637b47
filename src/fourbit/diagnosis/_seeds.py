"""A seed that is unlike the others."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

OUTLIER = "seed-outlier"

APART, POINTS, RELATIVE = 4.0, 3.0, 0.1
"""How far the nearest of the others must be: four times their own range, and 3 points of a percentage or a tenth of another
metric. Of three seeds of the same recipe on ResNet-20 (three epochs) the widest lie 2 points apart."""


def outlier(results: Sequence[float], percent: bool) -> int | None:
    """The place of the one result that is apart from the rest; None if there is none, or there are fewer than three.

    Args:
        results: by seed; NaN for a run that diverged, which is apart if all others did not.
        percent: whether they are percentages.
    """
    values = np.array(results, dtype=float)
    if len(values) < 3:
        return None
    lost = np.flatnonzero(np.isnan(values))
    if len(lost):
        return int(lost[0]) if len(lost) == 1 else None
    for place, value in enumerate(values):
        others = np.delete(values, place)
        gap = float(np.abs(others - value).min())
        floor = POINTS if percent else RELATIVE * abs(float(np.median(others)))
        if gap > max(APART * float(np.ptp(others)), floor) and not math.isclose(gap, 0):
            return place
    return None
