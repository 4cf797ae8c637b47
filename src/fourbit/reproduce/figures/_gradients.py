"""Figures 1b and 6a, and sums behind normalization: the gradients of a trained network, layer by layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fourbit import recipes
from fourbit.quantizers import Amax, QuantSpec, Rounding, quantize, stream_key
from fourbit.report import PALETTE, legend, panels, style
from fourbit.reproduce.figures._base import Studio, color, register, table
from fourbit.reproduce.figures._formats import quantized
from fourbit.reproduce.figures._probe import output_gradients
from fourbit.train import gradient_fidelity
from fourbit.train._fidelity import exact_gradients

FRACTIONS = (0.001, 0.01, 0.25, 0.5, 0.75, 0.99, 0.999)


def _log2_quantiles(g: Tensor) -> tuple[np.ndarray, float]:
    """Quantiles of log2 |g| over the elements that are not zero, and the share of zeros."""
    magnitudes = g.flatten().abs().double()
    nonzero = magnitudes[magnitudes > 0]
    if not len(nonzero):
        return np.full(len(FRACTIONS), np.nan), 1.0
    logs = nonzero.log2()
    return torch.quantile(logs, torch.tensor(FRACTIONS, dtype=torch.float64)).numpy(), 1 - len(nonzero) / len(
        magnitudes
    )


@register(
    "fig1b",
    "log2 of the gradients of ResNet-18 (ImageNet) lies within ~-50 to -16 at epoch 0, ~-43 to -8 at epoch 100",
)
def fig1b(studio: Studio) -> str:
    """Figure 1b: the range of the output gradients of each layer, early and late in training.

    The paper shows one range for all layers of ResNet-18 at epochs 0 and 100, and its reviewers asked which layers they
    are. Here each convolution is named, from the input to the output; full precision, one batch, quantiles of log2 |dL/dy|.
    """
    folder = next(iter(studio.train("residual", ["fp32"], seeds=(studio.seeds[0],)).values()))
    epochs = studio.epochs("residual")
    keep = max(1, epochs // 20) if studio.scale != "paper" else 8
    first = output_gradients(folder, studio.data_dir, epoch=keep)
    last = output_gradients(folder, studio.data_dir)
    rows = []
    with style():
        figure, axes = panels(2, "Range of dL/dy by layer", columns=2, height=3.6)
        shown = {}
        for axis, gradients, name in zip(
            axes, (first, last), (f"after epoch {keep}", f"after epoch {epochs}"), strict=True
        ):
            found = [_log2_quantiles(g) for g in gradients.values()]
            values, x = np.array([q for q, _ in found]), range(len(found))
            shown = {
                "0.1 to 99.9 %": axis.fill_between(x, values[:, 0], values[:, -1], color="#56B4E9", alpha=0.35),
                "1 to 99 % (table)": axis.fill_between(x, values[:, 1], values[:, 5], color="#56B4E9", alpha=0.6),
                "25 to 75 %": axis.fill_between(x, values[:, 2], values[:, 4], color="#0072B2", alpha=0.5),
                "median": axis.plot(x, values[:, 3], color="#333333")[0],
            }
            axis.set_title(name, loc="left")
            axis.set_xticks(list(x), list(gradients), rotation=90, fontsize=6)
            axis.set_ylabel("log2 |dL/dy|")
        legend(figure, shown)
    for name in first:
        (a, zeros_a), (b, zeros_b) = _log2_quantiles(first[name]), _log2_quantiles(last[name])
        cells = (f"{q[1]:.1f} to {q[5]:.1f}" for q in (a, b))
        rows.append((name, *cells, f"{100 * zeros_a:.0f}", f"{100 * zeros_b:.0f}"))
    within = [float(q[5] - q[1]) for q, _ in map(_log2_quantiles, last.values())]
    medians = [float(q[3]) for q, _ in map(_log2_quantiles, last.values())]
    head = ("layer", f"epoch {keep}, 1 to 99 %", f"epoch {epochs}, 1 to 99 %", "zeros, %", "zeros, % (late)")
    return "\n\n".join(
        (
            studio.picture(figure, "fig1b"),
            table(head, rows),
            f"Within a layer 98 % of the gradients that are not zero span 2^{min(within):.0f} to 2^{max(within):.0f}; radix 4 "
            f"spans 2^12 and radix 2 2^6 (both in three exponent bits). The layers' medians differ by "
            f"2^{max(medians) - min(medians):.1f}: the part that a scale per layer takes care of.",
        )
    )


FIG6 = ("ibm2020", "ibm2020-bottom1x1fp8", "ibm2020-top1x1fp8", "ibm2020-1x1fp8", "ibm2020-3x3fp8")
MORE = ("ibm2020-corrected", "ibm2020-m185", "ibm2020-luq")


@register(
    "fig6",
    "near the input of ResNet-50 the variance is ~4.6e-10 in FP32, ~8.6e-12 with TPR FP4, ~3.0e-11, ~2.8e-11 and "
    "~1.1e-10 with the bottom, top and all 1x1 in FP8; top-1 74.01, 74.99 (bottom), ~74.6 (top), 75.51 % (all)",
)
def fig6(studio: Studio) -> str:
    """Figure 6a: the variance of dL/dy from the output to the input, for each choice of FP8 layers.

    The paper trains ResNet-50 with each choice and finds the variance near the input 50 times too small with FP4 in all
    layers, 4 times with FP8 in the 1x1 convolutions. Here every recipe gets the weights of one run in full precision and
    the same batch, so that nothing but the gradients' formats differs: the ratio of the variance to that with exact
    gradients. 3x3 in FP8, and three ways to keep the magnitude in 4 bits, are questions beyond the paper. The projection is
    <dw_q, dw> / |dw|^2 of the weight gradient, 1 where nothing shrinks, averaged over the first third of the layers; the
    cosine likewise.
    """
    folder = next(iter(studio.train("bottleneck", ["fp32"], seeds=(studio.seeds[0],)).values()))
    exact = output_gradients(folder, studio.data_dir, exact_gradients(recipes.get("ibm2020")))
    left = gradient_fidelity(folder, (*FIG6, *MORE), data_dir=studio.data_dir)
    rows, curves = [], {}
    for recipe in (*FIG6, *MORE):
        found = output_gradients(folder, studio.data_dir, recipe)
        ratios = np.array([float(found[n].double().var() / exact[n].double().var()) for n in exact])
        curves[recipe] = ratios
        layers = list(left[recipe].values())
        first = layers[: max(1, len(layers) // 3)]
        projection, cosine = np.mean([f.projection for f in first]), np.mean([f.cosine for f in first])
        rows.append((f"`{recipe}`", f"{1 / ratios[0]:.1f}", f"{projection:.2f}", f"{cosine:.2f}"))
    with style():
        figure, axes = panels(2, "Variance of dL/dy, relative to exact gradients", columns=2, height=3.8)
        for axis, names, name in zip(
            axes, (FIG6, ("ibm2020", *MORE)), ("FP8 in some layers", "all in 4 bits"), strict=True
        ):
            for recipe in names:
                axis.plot(curves[recipe], label=recipe, color=PALETTE[(*FIG6, *MORE).index(recipe)])
            axis.axhline(1, color="#333333", linewidth=0.8)
            axis.set_yscale("log", base=2)
            axis.set_title(name, loc="left")
            axis.set_xticks(range(len(exact)), list(exact), rotation=90, fontsize=5)
            axis.set_ylabel("Var(dL/dy) / Var exact")
            axis.legend()
    return "\n\n".join(
        (
            studio.picture(figure, "fig6"),
            table(("recipe", "variance at the first layer, exact / rounded", "projection of dW", "cosine of dW"), rows),
        )
    )


SUM_FORMATS = ("fp8_152", "fp4_r4_even", "fp4_r4_even_185", "fp4_r4_odd", "fp4_r2", "fp5_r2")


@register("sums")
def sums(studio: Studio) -> str:
    """Behind BatchNorm the exact gradient sums to zero in each channel: how far does each format break that?

    For each convolution before a BatchNorm: |sum over the channel of dL/dy| / sum of |dL/dy|, the median over channels,
    before and after rounding (in full precision it is rounding error). "r4 stochastic" and "LUQ" round at random and are
    unbiased.
    """
    folder = next(iter(studio.train("residual", ["fp32"], seeds=(studio.seeds[0],)).values()))
    gradients = output_gradients(folder, studio.data_dir)
    columns: dict[str, list[float]] = {}
    for number, g in enumerate(gradients.values()):
        x = g.double()
        rounded = {"exact": x} | {name: quantized(x, _format(name)) for name in SUM_FORMATS}
        for label, format in (("r4 stochastic", "fp4_r4_even"), ("LUQ", "fp4_r2")):
            spec = QuantSpec(_format(format), Amax(), rounding=Rounding.STOCHASTIC)
            rounded[label] = quantize(g, spec, key=stream_key(1, number)).dequantize().double()
        for name, q in rounded.items():
            share = q.sum((0, 2, 3)).abs() / q.abs().sum((0, 2, 3)).clamp_min(1e-300)
            columns.setdefault(name, []).append(float(share.median()))
    names = list(gradients)
    rows = [(n, *(f"{100 * columns[c][i]:.2g}" for c in columns)) for i, n in enumerate(names)]
    means = ("mean", *(f"{100 * np.mean(values):.2g}" for values in columns.values()))
    with style():
        figure, (axis,) = panels(1, "Channel sums of rounded gradients", columns=1, height=3.8)
        for name, values in columns.items():
            axis.plot([100 * v if v else np.nan for v in values], label=name, color=color(name))
        axis.set_yscale("log")
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        axis.set_ylabel("|sum| / sum of magnitudes, %, median channel")
        axis.legend(ncols=3)
    return "\n\n".join(
        (
            studio.picture(figure, "sums"),
            table(("layer (values in %)", *columns), [*rows, means]),
            "Whether restoring the sum repairs anything is a matter of training: recipe `ibm2020-zerosum`, row `zerosum` of "
            "the questions.",
        )
    )


def _format(name: str):
    from fourbit.formats import get

    return get(name)
