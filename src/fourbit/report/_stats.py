"""What a group of runs says as numbers: means over seeds, and differences to full precision paired by seed.

Two runs with the same seed start from the same weights and see the same batches, so the difference *within* a seed is
less noisy than the difference of two means. Standard deviations are those of a sample (n - 1 in the denominator) and
are None for a single seed. Metrics are in the unit in which they are shown.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fourbit._statistics import half_interval
from fourbit.report._groups import Group, group_runs, reference_of
from fourbit.report._metric import name
from fourbit.report._read import TOKENS, Run, load_runs, text

Series = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class RecipeSummary:
    """One line of the result table. Numbers are None where no run has one yet.

    Attributes:
        label: recipe, with the settings that tell groups apart.
        n: number of runs (seeds).
        metric: what is measured, with its unit, such as "accuracy %" or "perplexity".
        metric_mean, metric_std: the metric at the last evaluation, in that unit.
        diff_mean, diff_half: metric minus that of fp32, over the `num_pairs` seeds that both have at the same epoch, and half
            the width of its 95 % confidence interval (Student's t).
        train_loss: mean training loss of the last epoch.
        seconds_per_epoch: mean over runs of the median epoch.
        bits_per_byte: mean over runs at the last evaluation, of text.
        tokens_per_s: mean over runs of the median, of text and translations.
        notes: what a reader has to know, such as "1 of 3 diverged".
    """

    label: str
    n: int
    metric: str
    metric_mean: float | None
    metric_std: float | None
    diff_mean: float | None
    diff_half: float | None
    train_loss: float | None
    seconds_per_epoch: float | None
    num_pairs: int = 0
    notes: tuple[str, ...] = ()
    bits_per_byte: float | None = None
    tokens_per_s: float | None = None


def mean_std(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation of the finite values; None where there are too few.

    >>> mean_std([1.0, 3.0, float("nan")])
    (2.0, 1.4142135623730951)
    >>> mean_std([1.0])
    (1.0, None)
    """
    finite = [v for v in values if math.isfinite(v)]
    mean = float(np.mean(finite)) if finite else None
    with np.errstate(over="ignore"):  # of perplexities of runs that collapsed
        return mean, float(np.std(finite, ddof=1)) if len(finite) > 1 else None


def paired_differences(runs: Sequence[Run], reference: Sequence[Run]) -> list[float]:
    """Metric minus the reference's metric, seed by seed, where both were last evaluated at the same epoch.

    A run that is half-way is not compared with one that is done. Runs that share a seed count as their mean.
    """
    ours, theirs = _result_by_seed(runs), _result_by_seed(reference)
    return [ours[key] - theirs[key] for key in ours if key in theirs]


def _result_by_seed(runs: Sequence[Run]) -> dict[tuple[str, float], float]:
    found: dict[tuple[str, float], list[float]] = {}
    for run in runs:
        if math.isfinite(run.result):
            found.setdefault((run.seed, run.evaluations[-1][0]), []).append(run.result)
    return {key: float(np.mean(values)) for key, values in found.items()}


def summarize_group(group: Group, groups: Sequence[Group]) -> RecipeSummary:
    """The numbers of one group; `groups` are all groups of the report, among them the fp32 one."""
    metric_mean, metric_std = mean_std(r.result for r in group.runs)
    reference = reference_of(group, groups)
    pairs = paired_differences(group.runs, reference.runs) if reference else []
    return RecipeSummary(
        label=group.label,
        n=len(group.runs),
        metric=group.metric,
        metric_mean=metric_mean,
        metric_std=metric_std,
        diff_mean=mean_std(pairs)[0],
        diff_half=half_interval(pairs),
        train_loss=mean_std(r.train_loss for r in group.runs)[0],
        seconds_per_epoch=mean_std(r.seconds_per_epoch for r in group.runs)[0],
        num_pairs=len(pairs),
        notes=_notes(group, len(pairs) if reference else None),
        bits_per_byte=mean_std(r.bits_per_byte for r in group.runs)[0],
        tokens_per_s=mean_std(r.rate[1] for r in group.runs if r.rate[0] == TOKENS)[0],
    )


def _notes(group: Group, num_pairs: int | None) -> tuple[str, ...]:
    n = len(group.runs)
    status = Counter(r.status for r in group.runs)
    notes = [f"{status[s]} of {n} {s}" for s in ("diverged", "unfinished", "interrupted") if status[s]]
    without = sum(math.isnan(r.result) for r in group.runs)
    if without:
        notes.append(f"{without} of {n} without a test {name(group.metric)}")
    if num_pairs is not None and num_pairs < n:
        notes.append(f"{num_pairs} of {n} comparable with fp32" if num_pairs else "no fp32 run to compare with")
    shared = [seed for seed, count in Counter(r.seed for r in group.runs).items() if count > 1]
    if shared:
        notes.append(f"several runs with seed {', '.join(shared)}")
    return tuple(notes)


def summarize(paths: Iterable[Path]) -> list[RecipeSummary]:
    """One summary per configuration found in run folders at or below `paths`, full precision first.

    Raises:
        UserError: no run folder there, or a file in one that no trainer wrote.
    """
    groups = group_runs(load_runs(paths))
    return [summarize_group(g, groups) for g in groups]


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` neighbours (fewer at the ends); NaN stays NaN and spoils no neighbour."""
    if width <= 1 or len(values) == 0:
        return values
    finite = np.isfinite(values)
    window = np.ones(min(width, len(values)))
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    count = np.convolve(finite.astype(float), window, mode="same")
    return np.where(finite, total / np.maximum(count, 1.0), math.nan)


def across(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, mean, minimum, maximum over several curves, on the stretch of x that all of them cover.

    Where one curve ends (diverged, or not there yet) the mean ends too: it never jumps because a member left.
    """
    kept = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in series]
    kept = [(x, y) for x, y in kept if len(x)]
    empty = np.zeros(0)
    if not kept:
        return empty, empty, empty, empty
    low, high = max(x[0] for x, _ in kept), min(x[-1] for x, _ in kept)
    grid = np.unique(np.concatenate([x for x, _ in kept]))
    grid = grid[(grid >= low) & (grid <= high)]
    if not len(grid):
        return empty, empty, empty, empty
    stack = np.stack([np.interp(grid, x, y) for x, y in kept])
    return grid, stack.mean(axis=0), stack.min(axis=0), stack.max(axis=0)


@dataclass(frozen=True)
class FinalResult:
    """What the runs of one configuration have come to.

    Args:
        model, recipe: their names.
        metric: as in `RecipeSummary`; `mean`: over `seeds` runs.
        images: samples that each run has trained on, over all epochs; None where the runs do not say.
        lr: learning rate.
    """

    model: str
    recipe: str
    metric: str
    mean: float
    seeds: int
    images: int | None
    lr: float


def final_results(paths: Sequence[str | Path]) -> list[FinalResult]:
    """Of all configurations at or below `paths` that have a result.

    Raises:
        UserError: as `summarize`.
    """
    groups = group_runs(load_runs([Path(p) for p in paths]))
    found = []
    for group in groups:
        summary = summarize_group(group, groups)
        if summary.metric_mean is None:
            continue
        steps = max((int(e["step"]) for r in group.runs for e in r.epochs), default=0)
        batch = int(group.config.get("batch_size", 0))
        model = text(group.config.get("model", ""))
        images, lr = steps * batch or None, float(group.config.get("lr", 0.0))
        found.append(FinalResult(model, group.recipe, summary.metric, summary.metric_mean, summary.n, images, lr))
    return found
