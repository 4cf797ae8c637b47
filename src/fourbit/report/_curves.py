"""Figures about whole runs: the final result, and the curves of loss and metric over time; each for one metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fourbit.report._groups import Group, reference_of
from fourbit.report._metric import decimal, heading, name, sign
from fourbit.report._read import Run, number
from fourbit.report._stats import Series, across, mean_std, smooth
from fourbit.report._style import WIDTH, Look, Plot, legend, looks, outer_labels, panel_title, panels, short, step_axis

STEPS, TOKENS = "optimizer step", "tokens trained on"
"""What an axis says that curves are drawn over."""
BANDS_AT_MOST = 6  # more bands than this on one pair of axes hide each other


def final_result(groups: Sequence[Group], metric: str) -> Plot | None:
    """A dot for every seed and a bar at the mean, one row per recipe."""
    rows = [g for g in groups if g.metric == metric and any(np.isfinite(r.result) for r in g.runs)]
    if not rows:
        return None
    look = looks(groups)
    figure = Figure(figsize=(WIDTH, 1.15 + 0.32 * len(rows)), layout="constrained")
    axis = figure.subplots()
    better = sign(metric)
    worst = limit([r.result for g in rows for r in g.runs], better)
    lost_any = False
    for row, group in enumerate(rows):
        values = [r.result for r in group.runs if np.isfinite(r.result)]
        color, marker = look[group.label].color, look[group.label].marker
        mean, std = mean_std(values)
        assert mean is not None  # the rows have values
        kept = [v for v in values if better * (v - worst) >= 0]
        axis.plot(kept, [row] * len(kept), marker, color=color, markersize=6, alpha=0.45, markeredgewidth=0)
        if len(kept) < len(values):
            lost_any = True
            lost = ", ".join(decimal(v, 1) for v in values if v not in kept)
            axis.plot([worst], [row], "<" if better > 0 else ">", color=color, markersize=8)
            axis.annotate(
                lost, (worst, row), (8 * better, 0), textcoords="offset points", ha="left" if better > 0 else "right",
                va="center", color=color, fontsize=8,
            )  # fmt: skip
            continue
        axis.plot([mean, mean], [row - 0.3, row + 0.3], color=color, linewidth=2.5)
        if std is not None:
            axis.plot([mean - std, mean + std], [row, row], color=color, linewidth=1.2)
        if group.is_reference:
            axis.axvline(mean, color=color, linewidth=0.8, linestyle=":")
    axis.set_yticks(range(len(rows)), [short(g.name, 44) for g in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8))
    axis.margins(x=0.06)
    axis.set_xlabel(short(f"{heading(metric)} at the last evaluation", 60))
    title = f"Test {_name(metric)} by recipe"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return Plot(
        "result",
        title,
        "One dot per seed; the upright bar is the mean over seeds and the line through it one standard deviation to "
        "either side. The dotted vertical line marks full precision: recipes whose dots surround it lose nothing."
        + (
            f" An arrow stands for runs far {_worse(metric)} the others, whose {_name(metric)} is written beside it; "
            "their mean is not drawn."
            if lost_any
            else ""
        ),
        figure,
    )


def training_curves(groups: Sequence[Group], metric: str) -> Plot | None:
    """All recipes on the same axes: training loss and metric."""
    look = looks(groups)
    shown = [g for g in groups if g.metric == metric]
    with_band = len(shown) <= BANDS_AT_MOST
    title = f"All recipes: training loss and test {_name(metric)}"
    figure, (left, right) = panels(2, title, columns=2, height=3.9, sharey=False, extra=0.9)
    width, over = smoothing_width(shown), _over(shown)
    for group in shown:
        _group_curve(left, [_loss(r, width, over) for r in group.runs], look[group.label], with_band, group)
        _group_curve(right, [_metric(r, over) for r in group.runs], look[group.label], with_band, group)
    if not left.lines and not right.lines:
        return None
    _dress_loss(left, over)
    _dress_metric(right, metric, over)
    if sign(metric) < 0 and _log_if_wide(right):
        right.set_ylabel(short(f"{heading(metric)}, log scale"))
    legend(figure, {g.name: _handle(look[g.label]) for g in shown})
    caption = "Thick lines are means over seeds, thin lines single seeds" + (
        ", bands reach from the lowest to the highest seed." if with_band else "."
    )
    if width > 1:
        caption += f" The loss is a running mean over {width} logged points."
    return Plot("curves", title, caption + _cross_note(shown), figure)


def loss_curves(groups: Sequence[Group]) -> Figure | None:
    """The training loss alone, for runs that have not been evaluated yet."""
    look = looks(groups)
    figure, (axis,) = panels(1, "Training loss", columns=1, height=3.9, sharey=False, extra=0.9)
    over = _over(groups)
    for group in groups:
        width = smoothing_width(groups)
        _group_curve(axis, [_loss(r, width, over) for r in group.runs], look[group.label], True, group)
    if not axis.lines:
        return None
    _dress_loss(axis, over)
    legend(figure, {g.name: _handle(look[g.label]) for g in groups})
    return figure


def curves_beside_reference(groups: Sequence[Group], metric: str) -> Plot | None:
    """Small multiples: the metric of each recipe over that of full precision."""
    judged = [g for g in groups if g.metric == metric]
    references = [g for g in judged if g.is_reference]
    others = [
        g for g in judged if not g.is_reference and any(np.isfinite(_metric(r, STEPS)[1]).sum() > 1 for r in g.runs)
    ]
    if len(others) < 2:
        return None
    look, over = looks(groups), _over(judged)
    title = f"Test {_name(metric)}, one recipe at a time"
    figure, axes = panels(len(others), title, columns=4 if len(others) > 6 else 3, height=2.1)
    for axis, group in zip(axes, others, strict=True):
        reference = reference_of(group, groups)
        if reference is not None:
            _group_curve(axis, [_metric(r, over) for r in reference.runs], look[reference.label], False, None)
        _group_curve(axis, [_metric(r, over) for r in group.runs], look[group.label], True, group)
        panel_title(axis, group.name, look[group.label], 27 if len(others) > 6 else 36)
        _dress_metric(axis, metric, over)
    outer_labels(axes)
    better = sign(metric)
    _cut_start(axes, better)
    beyond = [
        _mark_beyond(axis, group, look[group.label], better, over) for axis, group in zip(axes, others, strict=True)
    ]
    if references:
        legend(figure, {g.name: _handle(look[g.label]) for g in references})
    against = "against full precision (dark grey) " if references else ""
    return Plot(
        "curves-each",
        title,
        f"The same curves {against}with one panel per recipe and a common vertical axis that leaves out "
        f"the first quarter of training and results far {_worse(metric)} the others; the band reaches "
        "from the lowest to the highest seed."
        + (
            f" An arrow stands for runs that end {_worse(metric)} the axis, at the {_name(metric)} beside it."
            if any(beyond)
            else ""
        ),
        figure,
    )


def limit(values: Sequence[float] | np.ndarray, better: int) -> float:
    """Where an axis of results should end on its worse side, so that a run which collapsed does not squeeze all the others.

    Args:
        values: accuracies in percent, perplexities and the like.
        better: the sign of an improvement.

    >>> limit([90.0, 91.0, 92.0, 10.0], 1), limit([90.0, 91.0, 92.0], 1), limit([90.0, 91.0, 92.0, 500.0], -1)
    (80.5, 83.0, 101.5)
    """
    finite = [better * v for v in values if np.isfinite(v)]
    middle = float(np.median(finite))
    return better * (middle - 4.0 * (max(finite) - middle + 1.0))


def smoothing_width(groups: Sequence[Group]) -> int:
    """Points in the running mean of the loss: none for short runs, about 1/30 of a long one."""
    longest = max((len(r.steps) for g in groups for r in g.runs), default=0)
    return max(1, longest // 30)


def _over(groups: Sequence[Group]) -> str:
    """What curves are drawn over: tokens, if all runs count them."""
    return TOKENS if all(run.in_tokens for group in groups for run in group.runs) else STEPS


def _along(run: Run, steps: np.ndarray, over: str) -> np.ndarray:
    """Where these steps stand on the axis."""
    return run.tokens_at(steps) if over == TOKENS and len(steps) else steps


def _loss(run: Run, width: int, over: str) -> Series:
    lines: Sequence[Mapping] = run.steps
    key = "loss" if lines else "train_loss"
    lines = lines or run.epochs
    x = np.array([r["step"] for r in lines], dtype=float)
    return _along(run, x, over), smooth(np.array([number(r.get(key)) for r in lines]), width)


def _metric(run: Run, over: str) -> Series:
    points = np.array(run.evaluations, dtype=float).reshape(-1, 3)
    return _along(run, points[:, 1], over), points[:, 2]


def _group_curve(axis: Axes, series: Sequence[Series], look: Look, band: bool, group: Group | None) -> None:
    """Mean, seeds and band of one group; a cross where a run of `group` diverged."""
    x, mean, low, high = across(series)
    style: dict = {"color": look.color, "linestyle": look.dashes}
    marker = "o" if len(x) <= 2 else None
    if len(series) > 1:
        for xs, ys in series:
            axis.plot(xs, ys, color=look.color, linewidth=0.6, alpha=0.45, marker=marker, markersize=3)
        if band:
            axis.fill_between(x, low, high, color=look.color, alpha=0.15, linewidth=0)
    if len(x):
        axis.plot(x, mean, marker=marker, markersize=4, **style)
    for run, (xs, ys) in zip(group.runs if group else (), series, strict=False):
        finite = np.flatnonzero(np.isfinite(ys))
        if run.status == "diverged" and len(finite):
            axis.plot(xs[finite[-1]], ys[finite[-1]], "x", color=look.color, markersize=8, markeredgewidth=2)


def _dress_loss(axis: Axes, over: str) -> None:
    axis.set_ylabel("training loss (nats, log scale)" if _log_if_wide(axis) else "training loss (nats)")
    axis.set_title("training loss", loc="left")
    step_axis(axis, over)


def _dress_metric(axis: Axes, metric: str, over: str) -> None:
    axis.set_ylabel(short(heading(metric)))
    if not axis.get_title("left"):
        axis.set_title(f"test {_name(metric)}", loc="left")
    step_axis(axis, over)


def _log_if_wide(axis: Axes) -> bool:
    """Whether the curves needed a logarithmic scale, which the axis then has."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    wide = bool(len(values)) and values.min() > 0 and values.max() > 20 * values.min()
    if wide:
        axis.set_yscale("log")
    return wide


def _cut_start(axes: Sequence[Axes], better: int) -> None:
    """Let the common y axis show the curves after the first quarter of training: early on all of them look alike."""
    curves = [np.asarray(line.get_xydata(), dtype=float) for axis in axes for line in axis.lines]
    points = np.concatenate([c for c in curves if len(c)] or [np.zeros((0, 2))])
    points = points[np.isfinite(points).all(axis=1)]
    late = points[points[:, 0] > 0.25 * points[:, 0].max(initial=0.0), 1]
    if len(late) and late.max() > late.min():
        worst = limit(late, better)
        low = max(late.min(), worst) if better > 0 else late.min()
        high = late.max() if better > 0 else min(late.max(), worst)
        margin = 0.05 * (high - low)
        axes[0].set_ylim(low - margin, high + margin)


def _mark_beyond(axis: Axes, group: Group, look: Look, better: int, over: str) -> bool:
    """An arrow at the edge of the worse results for the runs that end beyond it; whether there are any."""
    edge, opposite = axis.get_ylim()[::better]
    beyond = [run for run in group.runs if better * (run.result - edge) < 0]
    ends = [(_along(run, np.array([run.evaluations[-1][1]]), over)[0], run.result) for run in beyond]
    if ends:
        y = edge + 0.05 * (opposite - edge)
        label = ", ".join(decimal(value, 1) for _, value in ends[:3]) + (" …" if len(ends) > 3 else "")
        axis.plot(
            [step for step, _ in ends], [y] * len(ends), "v" if better > 0 else "^", color=look.color, markersize=8
        )
        axis.annotate(
            label, (ends[0][0], y), (-8, 0), textcoords="offset points", ha="right", va="center", color=look.color, fontsize=8
        )  # fmt: skip
    return bool(ends)


def _name(metric: str) -> str:
    return short(name(metric))


def _worse(metric: str) -> str:
    return "below" if sign(metric) > 0 else "above"


def _handle(look: Look) -> Artist:
    return Line2D([], [], color=look.color, linestyle=look.dashes, linewidth=2)


def _cross_note(groups: Sequence[Group]) -> str:
    diverged = any(r.status == "diverged" for g in groups for r in g.runs)
    return " A cross marks the last finite value of a run that diverged." if diverged else ""
