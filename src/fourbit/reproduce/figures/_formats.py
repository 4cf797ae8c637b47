"""Figures 1a and 2b: number formats, and the multiplier that decides between their numbers."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from fourbit import formats
from fourbit.quantizers import round_to_format
from fourbit.report import legend, panels, style
from fourbit.reproduce.figures._base import Studio, register, table
from fourbit.reproduce.figures._probe import output_gradients, sample

FOUR_BITS = ("fp4_121", "fp4_r2", "fp4_r4_even", "fp4_r8", "fp4_r16")
MULTIPLIERS = tuple(1.0 + 0.05 * i for i in range(61))


def quantized(x: Tensor, format: formats.Format, amax: float | None = None) -> Tensor:
    """`x` rounded to a format after GradScale: a power of two lifts max|x| into (32, 64]; float64.

    Args:
        amax: max|x|, if x is a part of the tensor.
    """
    x = x.double()
    largest = float(x.abs().max()) if amax is None else amax
    scale = 2.0 ** np.floor(np.log2(64.0 / largest)) if largest > 0 else 1.0
    return round_to_format((x * scale).float(), format).double() / scale


def _lognormal(sigma: float, n: int = 1 << 16) -> Tensor:
    """Magnitudes exp(sigma z) with random signs."""
    generator = torch.Generator().manual_seed(0)
    magnitude = (sigma * torch.randn(n, generator=generator, dtype=torch.float64)).exp()
    return magnitude * torch.randint(0, 2, (n,), generator=generator).mul(2).sub(1)


@register(
    "fig1a",
    "ResNet-18 on CIFAR-10 ends at ~93 % in FP32 and with radix 4, ~88 % with radix 2 (1-3-0), ~76 % with 1-2-1",
)
def fig1a(studio: Studio) -> str:
    """Figure 1a: what 4-bit formats can represent, and how much of a wide distribution they lose.

    The paper draws radix 2 ([1,2,1] and [1,3,0]) and radix 4; 8 and 16 are a question of its reviewers. Errors are of
    log-normal numbers, whose spread sigma is that of gradients: about 1.5 within a layer, more across layers.
    """
    sigmas = np.linspace(0.25, 4.0, 16)
    rows, curves = [], {}
    for name in FOUR_BITS:
        format = formats.get(name)
        found = []
        for sigma in sigmas:
            x = _lognormal(float(sigma))
            errors = []
            for level in np.linspace(32.5, 64.0, 8):
                scaled = x * (level / float(x.abs().max()))
                errors.append(float((quantized(scaled, format) - scaled).square().sum() / scaled.square().sum()))
            found.append(np.mean(errors))
        curves[name] = 10 * np.log10(1 / np.array(found))
        at = int(np.argmin(np.abs(sigmas - 1.5)))
        x = _lognormal(1.5)
        lost = float(((quantized(x, format) == 0) & (x != 0)).double().mean())
        octaves = np.log2(format.max / format.smallest)
        rows.append((f"`{name}`", f"2^{octaves:g}", f"{curves[name][at]:.1f}", f"{100 * lost:.1f}"))
    with style():
        figure, (left, right) = panels(2, "Formats of four bits", columns=2, height=3.2, sharey=False)
        for i, name in enumerate(FOUR_BITS):
            values = [v for v in formats.get(name).grid if v > 0]
            left.plot(np.log2(values), [i] * len(values), "o", markersize=5)
            right.plot(sigmas, curves[name], label=name)
        left.set_yticks(range(len(FOUR_BITS)), FOUR_BITS)
        left.invert_yaxis()
        left.set_xlabel("log2 of the magnitudes after scaling")
        right.set_xlabel("sigma of log-normal numbers")
        right.set_ylabel("signal to noise, dB")
        right.legend()
    return "\n\n".join(
        (
            studio.picture(figure, "fig1a"),
            table(("format", "range", "dB at sigma 1.5", "underflow at 1.5, %"), rows),
            "The range of radix 4 costs precision: on narrow distributions radix 2 has less noise, on wide ones it loses the "
            "small numbers. What is lost by number is little by energy, so signal to noise alone does not show what training "
            "needs.",
        )
    )


@register(
    "fig2b",
    "the squared error of 16 convolutions of ResNet-18 (ImageNet) is least at 1.6 in each",
)
def fig2b(studio: Studio) -> str:
    """Figure 2b: the multiplier of radix-4 rounding against its error, and against the bias of the magnitudes.

    The paper sweeps it over 16 convolutions of ResNet-18 and finds the least squared error at 1.6 in each. Here: the output
    gradients of the convolutions of a trained network, in full precision, each scaled as GradScale does, and log-normal
    numbers.
    """
    runs = studio.train("residual", ["fp32"], seeds=(studio.seeds[0],))
    gradients = output_gradients(next(iter(runs.values())), studio.data_dir)
    sets = {name: g.flatten() for name, g in gradients.items()} | {"log-normal, sigma 1.5": _lognormal(1.5)}
    rows, errors, biases = [], {}, {}
    for name, x in sets.items():
        x, amax = sample(x, 1 << 16).double(), float(x.abs().max())
        error, bias = [], []
        for m in MULTIPLIERS:
            format = replace(formats.FP4_R4_EVEN, multiplier=Fraction(m).limit_denominator(100))
            q = quantized(x, format, amax)
            error.append(float((q - x).square().sum() / x.square().sum()))
            bias.append(float((q.abs().sum() - x.abs().sum()) / x.abs().sum()))
        errors[name], biases[name] = np.array(error), np.array(bias)
        best = MULTIPLIERS[int(np.argmin(error))]
        crossing = next((m for m, b in zip(MULTIPLIERS, bias, strict=True) if b >= 0), float("nan"))
        at = MULTIPLIERS.index(min(MULTIPLIERS, key=lambda m: abs(m - 1.6)))
        rows.append((name, f"{best:.2f}", f"{crossing:.2f}", f"{error[at]:.3f}", f"{100 * bias[at]:+.1f}"))
    with style():
        figure, (left, right) = panels(2, "Multiplier of radix-4 rounding", columns=2, height=3.2, sharey=False)
        drawn = {}
        for axis, curves, label in (
            (left, errors, "squared error / squared norm"),
            (right, biases, "change of the mean magnitude"),
        ):
            for name, values in curves.items():
                synthetic = name.startswith("log-normal")
                color, alpha = ("#D55E00", 1.0) if synthetic else ("#0072B2", 0.45)
                line = axis.plot(MULTIPLIERS, values, color=color, alpha=alpha)[0]
                drawn[name if synthetic else "output gradient of a convolution"] = line
            drawn["1.6, the paper's"] = axis.axvline(1.6, color="#333333", linewidth=0.8)
            drawn["1.85"] = axis.axvline(1.85, color="#333333", linewidth=0.8, linestyle=":")
            axis.set_xlabel("multiplier")
            axis.set_ylabel(label)
        left.set_yscale("log")
        right.axhline(0, color="#333333", linewidth=0.8)
        legend(figure, drawn)
    best = [float(row[1]) for row in rows[:-1]]
    zero = [float(row[2]) for row in rows[:-1]]
    return "\n\n".join(
        (
            studio.picture(figure, "fig2b"),
            table(("gradient of", "least error at", "no bias from", "error at 1.6", "bias at 1.6, %"), rows),
            f"Least squared error at {min(best):.2f} to {max(best):.2f} (median {np.median(best):.2f}; the paper: 1.6 in every "
            f"layer). The mean magnitude is kept from {np.nanmin(zero):.2f} to {np.nanmax(zero):.2f} (median "
            f"{np.nanmedian(zero):.2f}): at 1.6 every layer's gradient comes out too small.",
        )
    )
