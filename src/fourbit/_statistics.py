"""What a few seeds say about a mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

# Quantile 0.975 of Student's t with 1, 2, ... degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def half_interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of their mean, by Student's t; None of fewer than two.

    >>> round(half_interval([1.0, 2.0, 3.0]), 3)
    2.484
    """
    n = len(values)
    if n < 2:
        return None
    return T_975[min(n - 1, len(T_975)) - 1] * statistics.stdev(values) / math.sqrt(n)
