"""Figures about whole runs: final accuracy, and the curves of loss and accuracy over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fourbit.report._groups import Group, reference_of
from fourbit.report._read import Run, number
from fourbit.report._stats import Series, across, mean_std, smooth
from fourbit.report._style import WIDTH, Look, Plot, legend, looks, outer_labels, panel_title, panels, short, step_axis

BANDS_AT_MOST = 6  # more bands than this on one pair of axes hide each other


def final_accuracy(groups: Sequence[Group]) -> Plot | None:
    """A dot for every seed and a bar at the mean, one row per recipe."""
    rows = [g for g in groups if any(np.isfinite(r.accuracy) for r in g.runs)]
    if not rows:
        return None
    look = looks(groups)
    figure = Figure(figsize=(WIDTH, 1.15 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    low = floor([100 * r.accuracy for g in rows for r in g.runs])
    for row, group in enumerate(rows):
        values = [100 * r.accuracy for r in group.runs if np.isfinite(r.accuracy)]
        color, marker = look[group.label].color, look[group.label].marker
        mean, std = mean_std(values)
        assert mean is not None  # the rows have values
        kept = [v for v in values if v >= low]
        axis.plot(kept, [row] * len(kept), marker, color=color, markersize=6, alpha=0.45, markeredgewidth=0)
        if len(kept) < len(values):
            lost = ", ".join(f"{v:.1f}" for v in values if v < low)
            axis.plot([low], [row], "<", color=color, markersize=8)
            axis.annotate(lost, (low, row), (8, 0), textcoords="offset points", va="center", color=color, fontsize=8)
            continue
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linewidth=2.5)
        if std is not None:
            axis.plot([mean - std, mean + std], [row, row], color=color, linewidth=1.2)
        if group.is_reference:
            axis.axvline(mean, color=color, linewidth=0.8, linestyle=":")
    lowest = min(100 * r.accuracy for g in rows for r in g.runs if np.isfinite(r.accuracy))
    axis.set_yticks(range(len(rows)), [short(g.label, 44) for g in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axis.margins(x=0.06)
    axis.set_xlabel("test accuracy at the last evaluation (%)")
    title = "Test accuracy by recipe"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return Plot(
        "accuracy",
        title,
        "One dot per seed; the upright bar is the mean over seeds and the line through it one standard deviation to "
        "either side. The dotted vertical line marks full precision: recipes whose dots surround it lose nothing."
        + (
            " An arrow stands for runs far below the others, whose accuracy is written beside it; their mean is not drawn."
            if lowest < low
            else ""
        ),
        figure,
    )


def training_curves(groups: Sequence[Group]) -> Plot | None:
    """All recipes on the same axes: training loss and test accuracy."""
    look = looks(groups)
    with_band = len(groups) <= BANDS_AT_MOST
    title = "All recipes: training loss and test accuracy"
    figure, (left, right) = panels(2, title, columns=2, height=3.9, sharey=False, extra=0.9)
    width = smoothing_width(groups)
    for group in groups:
        _group_curve(left, [_loss(r, width) for r in group.runs], look[group.label], with_band, group)
        _group_curve(right, [_accuracy(r) for r in group.runs], look[group.label], with_band, group)
    if not left.lines and not right.lines:
        return None
    _dress_loss(left, groups)
    _dress_accuracy(right)
    legend(figure, {g.label: _handle(look[g.label]) for g in groups})
    caption = "Thick lines are means over seeds, thin lines single seeds" + (
        ", bands reach from the lowest to the highest seed." if with_band else "."
    )
    if width > 1:
        caption += f" The loss is a running mean over {width} logged points."
    return Plot("curves", title, caption + _cross_note(groups), figure)


def curves_beside_reference(groups: Sequence[Group]) -> Plot | None:
    """Small multiples: test accuracy of each recipe over that of full precision."""
    references = [g for g in groups if g.is_reference]
    others = [g for g in groups if not g.is_reference and any(len(r.evaluations) > 1 for r in g.runs)]
    if len(others) < 2:
        return None
    look = looks(groups)
    title = "Test accuracy, one recipe at a time"
    figure, axes = panels(len(others), title, columns=4 if len(others) > 6 else 3, height=2.1)
    for axis, group in zip(axes, others, strict=True):
        reference = reference_of(group, groups)
        if reference is not None:
            _group_curve(axis, [_accuracy(r) for r in reference.runs], look[reference.label], False, None)
        _group_curve(axis, [_accuracy(r) for r in group.runs], look[group.label], True, group)
        panel_title(axis, group.label, look[group.label], 30)
        _dress_accuracy(axis)
    outer_labels(axes)
    _cut_start(axes)
    below = [_mark_below(axis, group, look[group.label]) for axis, group in zip(axes, others, strict=True)]
    if references:
        legend(figure, {g.label: _handle(look[g.label]) for g in references})
    against = "against full precision (dark grey) " if references else ""
    return Plot(
        "curves-each",
        title,
        f"The same curves {against}with one panel per recipe and a common vertical axis that leaves out "
        "the first quarter of training and accuracies far below the others; the band reaches "
        "from the lowest to the highest seed."
        + (" An arrow stands for runs that end below the axis, at the accuracy beside it." if any(below) else ""),
        figure,
    )


def floor(values: Sequence[float] | np.ndarray) -> float:
    """Where an axis of accuracies (%) should begin, so that a run which collapsed does not squeeze all the others.

    >>> floor([90.0, 91.0, 92.0, 10.0]), floor([90.0, 91.0, 92.0])
    (80.5, 83.0)
    """
    finite = [v for v in values if np.isfinite(v)]
    middle = float(np.median(finite))
    return middle - 4.0 * (max(finite) - middle + 1.0)


def smoothing_width(groups: Sequence[Group]) -> int:
    """Points in the running mean of the loss: none for short runs, about 1/30 of a long one."""
    longest = max((len(r.steps) for g in groups for r in g.runs), default=0)
    return max(1, longest // 30)


def _loss(run: Run, width: int) -> Series:
    lines: Sequence[Mapping] = run.steps
    key = "loss" if lines else "train_loss"
    lines = lines or run.epochs
    x = np.array([r["step"] for r in lines], dtype=float)
    return x, smooth(np.array([number(r.get(key)) for r in lines]), width)


def _accuracy(run: Run) -> Series:
    points = np.array(run.evaluations, dtype=float).reshape(-1, 3)
    return points[:, 1], 100 * points[:, 2]


def _group_curve(axis: Axes, series: Sequence[Series], look: Look, band: bool, group: Group | None) -> None:
    """Mean, seeds and band of one group; a cross where a run of `group` diverged."""
    x, mean, low, high = across(series)
    style: dict = {"color": look.color, "linestyle": look.dashes}
    if len(series) > 1:
        for xs, ys in series:
            axis.plot(xs, ys, color=look.color, linewidth=0.6, alpha=0.45)
        if band:
            axis.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
    if len(x):
        axis.plot(x, mean, marker="o" if len(x) <= 2 else None, markersize=4, **style)
    for run, (xs, ys) in zip(group.runs if group else (), series, strict=False):
        finite = np.flatnonzero(np.isfinite(ys))
        if run.status == "diverged" and len(finite):
            axis.plot(xs[finite[-1]], ys[finite[-1]], "x", color=look.color, markersize=8, markeredgewidth=2)


def _dress_loss(axis: Axes, groups: Sequence[Group]) -> None:
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 20 * values.min():
        axis.set_yscale("log")
    axis.set_ylabel("training loss (nats)" if axis.get_yscale() == "linear" else "training loss (nats, log scale)")
    axis.set_title("training loss", loc="left")
    step_axis(axis)


def _dress_accuracy(axis: Axes) -> None:
    axis.set_ylabel("test accuracy (%)")
    if not axis.get_title("left"):
        axis.set_title("test accuracy", loc="left")
    step_axis(axis)


def _cut_start(axes: Sequence[Axes]) -> None:
    """Let the common y axis show the curves after the first quarter of training: early on all of them look alike."""
    curves = [np.asarray(line.get_xydata(), dtype=float) for axis in axes for line in axis.lines]
    points = np.concatenate([c for c in curves if len(c)] or [np.zeros((0, 2))])
    points = points[np.isfinite(points).all(axis=1)]
    late = points[points[:, 0] > 0.25 * points[:, 0].max(initial=0.0), 1]
    if len(late) and late.max() > late.min():
        low = max(late.min(), floor(late))
        margin = 0.05 * (late.max() - low)
        axes[0].set_ylim(low - margin, late.max() + margin)


def _mark_below(axis: Axes, group: Group, look: Look) -> bool:
    """An arrow at the lower edge for the runs whose last accuracy lies under it; whether there are any."""
    low, high = axis.get_ylim()
    ends = [(run.evaluations[-1][1], 100 * run.accuracy) for run in group.runs if 100 * run.accuracy < low]
    if ends:
        y = low + 0.05 * (high - low)
        label = ", ".join(f"{accuracy:.1f}" for _, accuracy in ends[:3]) + (" …" if len(ends) > 3 else "")
        axis.plot([step for step, _ in ends], [y] * len(ends), "v", color=look.color, markersize=8)
        axis.annotate(
            label, (ends[0][0], y), (-8, 0), textcoords="offset points", ha="right", va="center", color=look.color, fontsize=8
        )  # fmt: skip
    return bool(ends)


def _handle(look: Look) -> Artist:
    return Line2D([], [], color=look.color, linestyle=look.dashes, linewidth=2)


def _cross_note(groups: Sequence[Group]) -> str:
    diverged = any(r.status == "diverged" for g in groups for r in g.runs)
    return " A cross marks the last finite value of a run that diverged." if diverged else ""
