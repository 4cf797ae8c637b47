"""The table of all that is looked for in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fourbit.diagnosis import _signs as signs
from fourbit.diagnosis._history import History
from fourbit.diagnosis._signs import Sign


@dataclass(frozen=True)
class Rule:
    """One thing that can be wrong.

    Attributes:
        kind: its name.
        test: yields where it is so; the thresholds, each with its reason, stand beside it in `_signs`.
        sentence: says so; `{layers}`, `{value}` and `{step}` are filled in.
        remedy: which setting or recipe mends it.
    """

    kind: str
    test: Callable[[History], Iterator[Sign]]
    sentence: str
    remedy: str


RULES: tuple[Rule, ...] = (
    Rule(
        "not-finite",
        signs.not_finite,
        "The loss became NaN or infinite at step {step}.",
        "Lower --lr, give --warmup-steps 200 or --gradient-clip 1; --on-nonfinite skip leaves such steps out.",
    ),
    Rule(
        "steps-left-out",
        signs.left_out,
        "{value:.0%} of the steps were left out because of NaN or infinity, the first before step {step}.",
        "Lower --lr or give --gradient-clip 1; with a loss scale take a recipe with GradScale, such as ibm2020.",
    ),
    Rule(
        "learns-nothing",
        signs.learns_nothing,
        "The loss is at {value:.0%} of that of the first step: the network has not learned.",
        "Train with --recipe fp32 first: if that learns no better, lower or raise --lr tenfold, and look at the data.",
    ),
    Rule(
        "rate-too-high",
        signs.early_jump,
        "The first steps drove the loss to {value:.1f} times its beginning, by step {step}: the learning rate is "
        "too high for them.",
        "Give --warmup-steps 200, or a fifth of --lr. Four bits add noise that a deep network bears less of at the"
        " start.",
    ),
    Rule(
        "scale-stuck",
        signs.scale_stuck,
        "The gradient scale of {layers} has stood still since step {step}, and the largest gradient is {value:.2g}"
        " times what it is to be.",
        "The scale must move with the gradient: use GradScale() in the recipe, in training mode, and "
        "fourbit.synchronize in several processes.",
    ),
    Rule(
        "scale-flips",
        signs.scale_flips,
        "The gradient scale of {layers} has gone up and down by 2^{value:.0f} again and again since step {step}.",
        "Give --gradient-clip or a larger --batch-size, so that batches agree; scaling by Amax() follows every "
        "batch at once.",
    ),
    Rule(
        "underflow",
        signs.underflow,
        "{value:.0%} of the numbers of {layers} have become zero since step {step}, and more than a quarter of the"
        " magnitude with them.",
        "A scale for each layer in place of one for all (ibm2020 has GradScale), a format with more exponents "
        "(radix 4 in place of 2), or stochastic underflow (luq).",
    ),
    Rule(
        "saturation",
        signs.saturation,
        "{value:.0%} of the numbers of {layers} have lain beyond the largest of their format since step {step}, "
        "and much of the magnitude is cut off with them.",
        "Scale by the largest number (Amax()), or a larger clip value (ClipValue(init=...)); gradients: GradScale "
        "with a smaller init.",
    ),
    Rule(
        "clip-collapse",
        signs.clip_collapse,
        "The clip values of {layers} have collapsed since step {step}, to {value:.2g}: nearly all activations are "
        "cut off there.",
        "Give --alpha-lr-factor 0.1 (0: they stay what the first batch made them) and --alpha-weight-decay 0, or "
        "scale by Amax().",
    ),
    Rule(
        "signal-lost",
        signs.no_signal,
        "The forward pass of {layers} has had a signal-to-noise ratio of {value:.1f} dB since step {step}.",
        "Keep these layers at 8 bits or in full precision (--skip NAME), or change their scaling to Amax().",
    ),
    Rule(
        "dead-layer",
        signs.dead,
        "Everything is zero in {layers} since step {step}: these layers learn nothing more.",
        "Lower --lr, and look at their biases: an activation that never opens passes nothing on.",
    ),
    Rule(
        "gradient-shrinks",
        signs.gradient_shrinks,
        "Rounding takes {badness:.0%} of the gradient's magnitude away in {layers} since step {step}; layers "
        "before them get what is left.",
        "Take ibm2020-corrected, which restores the magnitude, or rounding that keeps it on average (ibm2020-luq).",
    ),
    Rule(
        "gradient-shrinks-with-depth",
        signs.gradient_shrinks_with_depth,
        "Rounding leaves {value:.1%} of the gradient's magnitude over all layers together, since step {step}.",
        "Take ibm2020-corrected, or FP8 gradients in the 1x1 convolutions (ibm2020-1x1fp8, ibm2020-bottom1x1fp8).",
    ),
    Rule(
        "sums-broken",
        signs.broken_sums,
        "The gradient of each channel of {layers} sums to zero, but {value:.0%} of its magnitude after rounding, "
        "since step {step}: running means will drift.",
        "Take a second phase of rounding (ibm2020 in place of ibm2020-no-tpr), or restore the sums (ibm2020-zerosum).",
    ),
    Rule(
        "statistics-run-away",
        signs.statistics_run_away,
        "The running statistics of {layers} run away: {value:.3g}, and growing, since step {step}.",
        "Give --weight-decay 1e-4 or a lower --lr; restore the sums of the gradient (ibm2020-zerosum).",
    ),
    Rule(
        "oscillating-weights",
        signs.oscillating_weights,
        "{value:.0%} of the weights of {layers} go to and fro over a threshold of the grid since step {step}.",
        "Let the learning rate fall (--schedule cosine), or take a recipe that stops it: Q-EMA, OsciReset or "
        "Q-Ramping.",
    ),
    Rule(
        "loss-scale-unsettled",
        signs.loss_scale_unsettled,
        "The loss scale moved in {value:.0%} of the lines since step {step}, and does not settle.",
        "Give a longer --loss-scale-interval, or take a recipe with a scale for each layer (ibm2020).",
    ),
)
"""In the order in which they are told: what spoils a run first."""
