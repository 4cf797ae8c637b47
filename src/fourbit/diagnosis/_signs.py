"""What is looked for: each function reads a history and yields where it found its sign.

A state counts if it lasts: in LASTING observations, one after the other, up to the newest. A layer in which it was mended
in the meantime is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fourbit.diagnosis._history import History, Series

GRADIENTS = ("g_dgrad", "g_wgrad")

LASTING = 3
"""Observations. One batch may be odd, two may be chance."""

FULL, OVERFULL = 1 / 16, 8.0
"""GradScale brings the largest gradient between a half and one of its MAX, and that of the next batches to a third to 1.7 of
it (ResNet-20, 1170 steps). A factor of ten beyond is no lag of an exponent that moves by one in a step."""

SWING = 3.0
"""Powers of two, from one turn of an exponent to the next. Healthy ones turn by one or two."""

UNDERFLOW, MAGNITUDE_LOST = 1 / 3, 0.25
"""A third of the numbers is much, but radix 4 loses up to a half of a layer's in runs that learn well, and LUQ two thirds,
with the magnitudes kept on average. The magnitude lost with them tells: radix 4 rounded to the nearest loses 0.12 to 0.15
of it in any layer."""

GRADIENTS_CLIPPED, OPERANDS_CLIPPED, CLIPPED_AWAY = 0.05, 0.2, 0.5
"""Gradients: up to 0.005 with GradScale, 0.03 while they grow. SAWB cuts 0.02 of a normal weight off, PACT up to 0.3 of a
gated activation and 0.3 of its magnitude, in a GPT that learns; so operands must lose a half of it, gradients a quarter."""

COLLAPSED = 1 / 8
"""Of the first clip value. In runs that learn it stays within 0.9 and 1.2 of it; collapsed ones fall from above 1 to 0.02."""

NO_SIGNAL_DB = 3.0
"""The noise has half of the signal's power. Healthy operands have 12 dB and more, the collapsed ones 0.1."""

LAYER_SHRINKS, SHRUNK = 0.2, 1 / 32
"""Per layer: radix 4 rounded to the nearest loses 0.12 to 0.15. All layers together: 0.07 in ResNet-20, which learns; 0.02
in ResNet-29, where the first layer's gradient has a 38th of its variance."""

ZERO_SUM, BROKEN_SUM, CHANCE = 1e-3, 0.2, 4.0
"""Behind batch normalization exact sums are 1e-7 of the magnitude; what the formats of the catalogue leave is 0.001 to 0.06
of 128 images; of 32 small ones it is 0.12. So for few numbers n it must exceed CHANCE / sqrt(n), too."""

RAN_AWAY, STILL_GROWING = 100.0, 2.0
"""Largest running mean or deviation. ResNet-20 has 4 to 7; in a network that loses its sums they reach thousands. A network
whose numbers are large from the start is none: it must have doubled in the second half of the record."""

OSCILLATIONS, OF, SMALL_MOVE, OSCILLATING = 3, 8, 0.25, 0.1
"""A weight that changed its code in 3 of the last 8 pairs of observations, each time without moving more than a quarter of
the way, hangs at a threshold. Chance brings a few in a hundred there."""

EARLY_SHARE, EARLY_STEPS, LOSS_JUMP = 0.1, 100, 1.75
"""The loss of the first steps over that of the very first. FP32 at a good rate stays below 1.4; ResNet-29 in INT4 without
warm-up goes to 2.9."""

SCALE_MOVES, SCALE_LINES = 0.5, 8
"""Share of lines of the second half in which the loss scale moved. With an interval of 200 steps and a line every 10 it is
0.05."""

LEARNS_NOTHING, LEARNING_STEPS = 0.98, 30
"""Mean loss of the last quarter over the first loss, after so many steps."""

LEFT_OUT = 0.05
"""Share of the steps. A loss scale that finds its place leaves a few out."""


@dataclass(frozen=True)
class Sign:
    """`value` is the number that the sentence shows; of several the one with the largest `badness` is shown."""

    step: int
    value: float
    badness: float
    layer: str | None = None


def lasting(series: Series, bad: np.ndarray, badness: np.ndarray | None = None) -> Iterator[Sign]:
    """A sign for each layer where `bad` [T, L] holds in the newest LASTING observations that have a number, or more; the value
    is the median over them."""
    badness = series.values if badness is None else badness
    for column, layer in enumerate(series.layers):
        known = np.flatnonzero(np.isfinite(series.values[:, column]))
        holds = bad[known, column]
        since = len(holds) - int(np.argmin(holds[::-1])) if not holds.all() else 0
        if len(holds) - since >= LASTING:
            rows = known[since:]
            value, how_bad = np.median(series.values[rows, column]), np.median(badness[rows, column])
            yield Sign(int(series.steps[rows[0]]), float(value), float(how_bad), layer)


def not_finite(history: History) -> Iterator[Sign]:
    """A loss that is no number, where the run ended or stands."""
    steps, losses = history.numbers("step", "loss")
    ends = [line.get("stopped") for line in history.lines("final")[-1:]]
    if len(steps) and np.isnan(losses[-1]) and ends in ([], ["diverged"]):
        good = np.flatnonzero(np.isfinite(losses))
        yield Sign(int(steps[good[-1] + 1 if len(good) else 0]), float("nan"), 0)


def left_out(history: History) -> Iterator[Sign]:
    """Many steps without an update."""
    for kind in ("final", "epoch"):
        steps, skipped = history.numbers(kind, "skipped")
        if len(steps) and steps[-1] > 0:
            if (share := skipped[-1] / steps[-1]) > LEFT_OUT:
                yield Sign(int(steps[np.argmax(skipped > 0)]), float(share), float(share))
            return


def learns_nothing(history: History) -> Iterator[Sign]:
    """A loss that stays where it began. Only of losses that begin above zero, as cross entropy does."""
    steps, losses = history.numbers("step", "loss")
    if len(steps) < 4 or steps[-1] < LEARNING_STEPS or np.isnan(losses).any() or not history.first_loss > 0:
        return
    ratio = float(np.mean(losses[steps > 0.75 * steps[-1]])) / history.first_loss
    if ratio > LEARNS_NOTHING:
        yield Sign(int(steps[0]), ratio, ratio)


def early_jump(history: History) -> Iterator[Sign]:
    """A loss that rises far above its beginning in the first steps. Only of losses that begin above zero."""
    steps, losses = history.numbers("step", "loss")
    if not len(steps) or steps[-1] < LEARNING_STEPS or not history.first_loss > 0:
        return
    early = (steps <= max(EARLY_STEPS, EARLY_SHARE * steps[-1])) & np.isfinite(losses)
    if not early.any():
        return
    ratios = losses[early] / history.first_loss
    worst = int(np.argmax(ratios))
    if ratios[worst] > LOSS_JUMP:
        yield Sign(int(steps[early][worst]), float(ratios[worst]), float(ratios[worst]))


def scale_stuck(history: History) -> Iterator[Sign]:
    """A gradient far from the edge of its format, or beyond it, while the exponent stands still."""
    exponents = history.remembered("g_exponent")
    for slot in GRADIENTS:
        full = history.vital(slot, "full")
        with np.errstate(divide="ignore"):
            far = np.abs(np.log2(full.values))
        bad = ((full.values < FULL) & (full.values > 0)) | (full.values > OVERFULL)
        for sign in lasting(full, bad, far):
            if sign.layer not in exponents.layers:
                continue
            own = exponents.values[exponents.steps >= sign.step, exponents.layers.index(sign.layer)]
            if len(own) >= LASTING and np.isfinite(own).all() and np.ptp(own) == 0:
                yield sign


def scale_flips(history: History) -> Iterator[Sign]:
    """An exponent that goes far up and down again all the time."""
    series = history.remembered("g_exponent", "step")
    for column, layer in enumerate(series.layers):
        known = np.isfinite(series.values[:, column])
        steps, values = series.steps[known], series.values[known, column]
        steps, values = steps[len(steps) // 2 :], values[len(values) // 2 :]
        turns = _turning_points(values)
        swings = np.abs(np.diff(values[turns]))
        if len(swings) >= 4 and np.median(swings) >= SWING:
            yield Sign(int(steps[turns[0]]), float(np.median(swings)), float(np.median(swings)), layer)


def _turning_points(values: np.ndarray) -> np.ndarray:
    """Where the values turn round, both ends included."""
    moved = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    kept = values[moved]
    inner = [i for i in range(1, len(kept) - 1) if (kept[i] - kept[i - 1]) * (kept[i + 1] - kept[i]) < 0]
    ends = {0, len(kept) - 1} if moved else set[int]()
    return np.array([moved[i] for i in sorted(ends | set(inner))], dtype=int)


def underflow(history: History) -> Iterator[Sign]:
    """Numbers, and with them magnitude, that become zero."""
    for slot in (*GRADIENTS, "x_fprop", "w_fprop"):
        share, bias = history.statistic(slot, "underflow"), history.statistic(slot, "bias")
        yield from lasting(share, (share.values > UNDERFLOW) & (bias.values < -MAGNITUDE_LOST))


def saturation(history: History) -> Iterator[Sign]:
    """Numbers beyond the largest of the grid, in layers whose clip value has not collapsed."""
    collapsed = {sign.layer for sign in clip_collapse(history)}
    gradient, operand = (GRADIENTS_CLIPPED, MAGNITUDE_LOST), (OPERANDS_CLIPPED, CLIPPED_AWAY)
    for slot, (limit, lost) in (*((g, gradient) for g in GRADIENTS), ("x_fprop", operand), ("w_fprop", operand)):
        share = history.statistic(slot, "saturation")
        bias = history.statistic(slot, "bias")
        for sign in lasting(share, (share.values > limit) & (bias.values < -lost)):
            if sign.layer not in collapsed or slot in GRADIENTS:
                yield sign


def clip_collapse(history: History) -> Iterator[Sign]:
    """Clip values that fell far below their first one, or cut everything off."""
    alpha = history.remembered("x_alpha")
    first = np.array([next((v for v in row if np.isfinite(v)), np.nan) for row in alpha.values.T])
    yield from lasting(alpha, alpha.values < COLLAPSED * first, -alpha.values / first if len(first) else None)


def no_signal(history: History) -> Iterator[Sign]:
    """Operands of the forward pass that are half noise."""
    for slot in ("x_fprop", "w_fprop"):
        sqnr = history.statistic(slot, "sqnr_db")
        yield from lasting(sqnr, sqnr.values < NO_SIGNAL_DB, -sqnr.values)


def dead(history: History) -> Iterator[Sign]:
    """Operands that are zero throughout, before they are rounded."""
    for slot in ("x_fprop", *GRADIENTS):
        amax = history.statistic(slot, "amax")
        yield from lasting(amax, amax.values == 0)


def gradient_shrinks(history: History) -> Iterator[Sign]:
    """Magnitude of the gradient that goes on to the layer before, lost by rounding: in a layer, or in all together."""
    bias = history.statistic("g_dgrad", "bias")
    yield from lasting(bias, bias.values < -LAYER_SHRINKS, -bias.values)


def gradient_shrinks_with_depth(history: History) -> Iterator[Sign]:
    """The product of what all layers leave of it."""
    bias = history.statistic("g_dgrad", "bias")
    left = np.nanprod(1 + bias.values, axis=1, keepdims=True)
    for sign in lasting(Series(bias.steps, ("all",), left), left < SHRUNK, -left):
        yield Sign(sign.step, sign.value, sign.badness)


def broken_sums(history: History) -> Iterator[Sign]:
    """Channels whose gradient sums to zero, until it is rounded."""
    for slot in GRADIENTS:
        exact, rounded, count = (history.vital(slot, "sums", i) for i in range(3))
        chance = CHANCE / np.sqrt(np.maximum(count.values, 1))
        yield from lasting(rounded, (exact.values < ZERO_SUM) & (rounded.values > np.maximum(BROKEN_SUM, chance)))


def statistics_run_away(history: History) -> Iterator[Sign]:
    """Running means or deviations that grow without end."""
    for name in ("mean", "deviation"):
        series = history.norm(name)
        if len(series.steps) < 2 * LASTING:
            continue
        earlier = series.values[len(series.steps) // 2]
        grows = series.values[-1] > STILL_GROWING * earlier
        yield from lasting(series, (series.values > RAN_AWAY) & grows)


def oscillating_weights(history: History) -> Iterator[Sign]:
    """Weights that go to and fro over a threshold."""
    steps = [int(line["step"]) for line in history.lines("vitals")]
    for layer, (places, codes) in history.codes().items():
        places, codes = places[-OF - 1 :], codes[-OF - 1 :]
        jumped, moved = np.abs(np.diff(codes, axis=0)), np.abs(np.diff(places, axis=0))
        events = ((jumped > 0) & (moved < SMALL_MOVE * jumped)).sum(axis=0)
        share = float((events >= OSCILLATIONS).mean()) if len(codes) > OSCILLATIONS else 0.0
        if share > OSCILLATING:
            yield Sign(steps[-len(codes)], share, share, layer)


def loss_scale_unsettled(history: History) -> Iterator[Sign]:
    """A loss scale that moves most of the time, up and down."""
    steps, scales = history.numbers("step", "loss_scale")
    steps, scales = steps[len(steps) // 2 :], scales[len(scales) // 2 :]
    moves = np.diff(np.log2(scales)) if len(scales) >= SCALE_LINES else np.zeros(0)
    if not len(moves) or not (moves > 0).any() or not (moves < 0).any():
        return
    share = float((moves != 0).mean())
    if share > SCALE_MOVES:
        yield Sign(int(steps[0]), share, share)
