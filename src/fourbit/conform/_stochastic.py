"""Checks of stochastic rounding: its mean, its variance, and the quality of the random words behind it.

All numbers of a test tensor lie at one fraction p between two neighbours of the grid, in blocks whose scale is exact, so each
rounding is a coin with probability p. What is tested are the coins. A check looks at up to a hundred normal deviates, and fails
where one is beyond 6, which chance does twice in 10^9 each: with the default number of samples, a right quantizer fails about
one run in a million.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit._registry import Registry
from fourbit.conform._blocks import PER_ROW, Comparison, differs, lead, pack
from fourbit.conform._nearest import Case, _judge
from fourbit.conform._report import Result
from fourbit.formats import BlockFormat

SIGMAS = 6.0
"""Largest normal deviate that passes."""
CHANCE = 1e-8
"""The same for the peak of a spectrum: how often chance alone may exceed the threshold."""
FRACTIONS = (1 / 32, 1 / 4, 1 / 2, 3 / 4, 31 / 32)
INTERVALS = 14
"""At most so many intervals of the grid are tested."""

Check = Callable[["Coins"], Result]
CHECKS: Registry[Check] = Registry("check")
"""Checks of stochastic rounding, in the order in which they run."""


@dataclass
class Coins:
    """A quantizer that rounds stochastically.

    Args:
        case: quantizer and format.
        samples: roundings that each check may use, about.
    """

    case: Case
    samples: int

    @property
    def format(self) -> BlockFormat:
        """The block format."""
        return self.case.format

    def intervals(self) -> list[tuple[float, float]]:
        """Neighbours of the grid, spread over the range."""
        pairs = list(zip(self.format.element.grid, self.format.element.grid[1:], strict=False))
        return pairs[:: max(1, math.ceil(len(pairs) / INTERVALS))]

    def tensor(self, value: float, num: int) -> tuple[Tensor, Tensor]:
        """A tensor with about `num` numbers `value` in blocks with scale 1, and where these are."""
        first = lead(self.format)
        block = [*first, *[value] * (self.format.block - len(first))]
        rows = max(8, round(num / (PER_ROW * (self.format.block - len(first)))))
        if not self.format.tensor_bound:
            x = torch.tensor(block * PER_ROW).repeat(rows, 1)
        else:  # one row with the anchor, which is left out
            x = torch.cat([pack(self.format, []), torch.tensor(block * PER_ROW).repeat(rows, 1)])
        mask = x == torch.tensor(value, dtype=torch.float32)
        return x, mask

    def flip(self, low: float, high: float, p: float, num: int) -> tuple[Tensor, Tensor]:
        """Coins [rows, columns]: 1 where the number at fraction p became `high`; and which places count."""
        value = float(torch.tensor(low + p * (high - low), dtype=torch.float32))
        x, mask = self.tensor(value, num)
        y = self.case.subject(x)
        keep = mask.any(dim=1)
        middle = (low + high) / 2
        return (y > middle)[keep].double(), mask[keep]

    def signs(self, p: float, num: int) -> tuple[Tensor, Tensor]:
        """Coins less their mean, over their standard deviation; 0 at places that do not count. And the places."""
        positive = [v for v in self.format.element.grid if v >= 0]
        coins, mask = self.flip(positive[2], positive[3], p, num)
        mean = coins[mask].mean()  # whether that is p is a check of its own
        deviation = (mean * (1 - mean)).sqrt().clamp_min(1e-9)
        return torch.where(mask, (coins - mean) / deviation, 0.0), mask


@CHECKS.register("neighbours")
def neighbours(coins: Coins) -> Result:
    """Each number becomes one of its two neighbours."""
    case, f = coins.case, coins.format
    x = case.normal(32, 4 * f.block)
    y = case.subject(x)
    amax = float(x.abs().max())
    low, high = torch.empty_like(x), torch.empty_like(x)
    for i, row in enumerate(x.tolist()):
        ends = []
        for block in f.split(row):
            found = f.choose(block, amax)
            for at, value in enumerate(block):
                s = f.scale_at(at, found.scale, found.micro) * f.tensor_scales(amax)[1]
                ends.append([v * s for v in f.element.neighbors(value / s if s else 0.0)])
        low[i], high[i] = torch.tensor(ends).T
    wrong = differs(y, low) & differs(y, high)
    where = wrong.nonzero()
    text = ""
    if len(where):
        at = tuple(where[0].tolist())
        text = f"{float(x[at]):.9g} became {float(y[at]):.9g}, neither {float(low[at]):.9g} nor {float(high[at]):.9g}"
    return _judge("neighbours", Comparison(wrong.numel(), int(wrong.sum()), text))


@CHECKS.register("unbiased")
def unbiased(coins: Coins) -> Result:
    """The mean of many roundings is the number, in each interval and over all."""
    intervals = coins.intervals()
    num = coins.samples // (len(intervals) * len(FRACTIONS))
    worst, upward, outward, variance, count = (0.0, ""), 0.0, 0.0, 0.0, 0
    for low, high in intervals:
        for p in FRACTIONS:
            flipped, mask = coins.flip(low, high, p, num)
            n = int(mask.sum())
            excess = float(flipped[mask].sum()) - n * p
            z = excess / math.sqrt(n * p * (1 - p))
            text = f"{low + p * (high - low):g} between {low:g} and {high:g} goes up with {p + excess / n:.4f}, not {p:.4f}; "
            worst = max(worst, (abs(z), text))
            upward, outward = upward + excess, outward + (excess if low >= 0 else -excess)
            variance, count = variance + n * p * (1 - p), count + n
    sigmas = [worst[0], *(abs(total) / math.sqrt(variance) for total in (upward, outward))]
    failed = max(sigmas) > SIGMAS
    means = f"mean error {upward / count:+.5f} steps ({sigmas[1]:.1f} sigma), outward {outward / count:+.5f} ({sigmas[2]:.1f})"
    detail = f"{worst[1] if worst[0] > SIGMAS else ''}{means}, worst number {worst[0]:.1f} sigma"
    return Result("unbiased", "fail" if failed else "pass", detail, count, int(failed))


@CHECKS.register("small probabilities")
def small_probabilities(coins: Coins) -> Result:
    """A number 2^-9 of a step above the grid goes up as often as it should."""
    positive = [v for v in coins.format.element.grid if v >= 0]
    p, num = 2.0**-9, coins.samples // 4
    flipped, mask = coins.flip(positive[1], positive[2], p, num)
    n, ups = int(mask.sum()), float(flipped[mask].sum())
    z = (ups - n * p) / math.sqrt(n * p * (1 - p))
    detail = f"{ups:.0f} of {n} went up, {n * p:.0f} expected ({z:+.1f} sigma)"
    return Result("small probabilities", "fail" if abs(z) > SIGMAS else "pass", detail, n, int(abs(z) > SIGMAS))


def _spread(sums: Tensor, counts: Tensor) -> float:
    """How much sums of `signs` spread, as a normal deviate: chi-square by Wilson and Hilferty's approximation."""
    used = counts > 0
    chi = float((sums[used] ** 2 / counts[used]).sum())
    k = int(used.sum())
    return ((chi / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))


@CHECKS.register("variance")
def variance(coins: Coins) -> Result:
    """Sums along rows and along columns vary as those of independent coins do."""
    worst = (0.0, "")
    compared = 0
    for p in (1 / 2, 1 / 8):
        signs, mask = coins.signs(p, coins.samples // 4)
        compared += int(mask.sum())
        for axis, name in ((1, "rows"), (0, "columns")):
            z = _spread(signs.sum(dim=axis), mask.double().sum(dim=axis))
            words = "more" if z > 0 else "less"
            worst = max(worst, (abs(z), f"sums along {name} vary {words} than independent roundings do at p = {p:g}"))
    failed = worst[0] > SIGMAS
    detail = f"{worst[1]} ({worst[0]:.1f} sigma)" if failed else f"worst {worst[0]:.1f} sigma"
    return Result("variance", "fail" if failed else "pass", detail, compared, int(failed))


def _peak(power: Tensor) -> float:
    """The largest of powers whose mean is 1, over what chance gives once in 1 / CHANCE."""
    return float(power.max()) / (math.log(power.numel()) - math.log(CHANCE))


@CHECKS.register("spectrum")
def spectrum(coins: Coins) -> Result:
    """No period: no frequency stands out of the coins, in memory order or along both axes."""
    worst, n = (0.0, ""), 0
    for p in (1 / 2, 1 / 8):
        signs, mask = coins.signs(p, coins.samples // 4)
        n += int(mask.sum())
        flat = torch.fft.rfft(signs.flatten())[1:-1].abs() ** 2 / mask.sum()
        both = torch.fft.fft2(signs).abs().flatten()[1:] ** 2 / mask.sum()
        period = signs.numel() / (1 + int(flat.argmax()))
        worst = max(worst, (_peak(flat), f"roundings repeat with a period of about {period:.4g} numbers at p = {p:g}"))
        worst = max(worst, (_peak(both), f"roundings form a pattern along rows and columns at p = {p:g}"))
    failed = worst[0] > 1
    detail = (
        f"{worst[1]} (peak {worst[0]:.3g} of what chance allows)"
        if failed
        else f"highest peak {worst[0]:.2f} of the limit"
    )
    return Result("spectrum", "fail" if failed else "pass", detail, n, int(failed))


@CHECKS.register("correlation")
def correlation(coins: Coins) -> Result:
    """Roundings of neighbours are independent: along rows, down columns, and a power of two apart."""
    signs, mask = coins.signs(1 / 2, coins.samples // 4)
    columns = signs.shape[1]
    flat, present = signs.flatten(), mask.double().flatten()
    worst = (0.0, "")
    lags = {1, 2, 3, 5, 7, columns - 1, columns, columns + 1, *(2**k for k in range(2, 20))}
    for lag in sorted(lag for lag in lags if lag < flat.numel() // 2):
        pairs = float((present[lag:] * present[:-lag]).sum())
        if pairs:
            z = float((flat[lag:] * flat[:-lag]).sum()) / math.sqrt(pairs)
            where = "one row down" if lag == columns else f"{lag} apart"
            worst = max(worst, (abs(z), f"roundings {where} are correlated by {z / math.sqrt(pairs):+.3f}"))
    failed = worst[0] > SIGMAS
    detail = f"{worst[1]} ({worst[0]:.1f} sigma)" if failed else f"worst {worst[0]:.1f} sigma"
    return Result("correlation", "fail" if failed else "pass", detail, int(mask.sum()), int(failed))


@CHECKS.register("fresh words")
def fresh_words(coins: Coins) -> Result:
    """Two calls, and two neighbouring rows, draw different words."""
    first, mask = coins.signs(1 / 2, coins.samples // 8)
    second, _ = coins.signs(1 / 2, coins.samples // 8)
    n = int(mask.sum())
    calls = float((first * second).sum()) / math.sqrt(n)
    rows = float((first[1:] * first[:-1]).sum()) / math.sqrt(max(1, int((mask[1:] & mask[:-1]).sum())))
    same = bool((first == second).all())
    failed = max(abs(calls), abs(rows)) > SIGMAS
    detail = "two calls round the same" if same else f"calls {calls:+.1f} sigma, rows {rows:+.1f} sigma"
    return Result("fresh words", "fail" if failed else "pass", detail, n, int(failed))
