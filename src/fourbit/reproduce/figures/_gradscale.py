"""Figure 3: the scale of each layer's gradient over training, and what one scale for all layers costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fourbit.nn import quantized_layers
from fourbit.quantizers import QuantSpec
from fourbit.report import panels, step_axis, style
from fourbit.reproduce.figures._base import Studio, color, register, table
from fourbit.train import load

RECIPES = ("ibm2020", "ibm2020-global-scale", "ibm2020-radix2", "ibm2020-radix2-global-scale")


def _records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def _exponents(folder: Path, data_dir: Path | None) -> tuple[list[int], dict[str, np.ndarray]]:
    """Steps, and log2 of the scale of each layer with 4-bit gradients at each; NaN where it is not set."""
    lines = [line for line in _records(folder, "step") if "scales" in line]
    layers = {}
    for name, layer in quantized_layers(load(folder, data_dir=data_dir).model).items():
        gradient = layer.spec.g_dgrad
        if isinstance(gradient, QuantSpec) and gradient.format.bits == 4:
            found = [line["scales"].get(name, {}).get("g_exponent") for line in lines]
            layers[name] = np.array([np.nan if v is None else float(np.mean(v)) for v in found])
    return [line["step"] for line in lines], layers


def _accuracies(folder: Path) -> list[float]:
    return [line["test_accuracy"] for line in _records(folder, "epoch")]


@register(
    "fig3",
    "log2 of the scales starts at ~21 to 23, later spreads over ~14 to 20, layers up to ~2^6 apart (ResNet-18, "
    "ImageNet); GradScale gains more than 1 % over one loss scale",
)
def fig3(studio: Studio) -> str:
    """Figure 3: GradScale's exponent of each layer over training, and GradScale against one loss scale for all layers.

    The paper shows scales of 2^14 to 2^23 that fall as training goes on and differ by up to 2^6 between layers (ResNet-18),
    and more than one percent of accuracy between GradScale and the loss scaling of APEX, with FP8 for dW. Here both radix 4
    and radix 2, because the paper compares the radices with one loss scale only. Layers in FP16 (the first, the last) are left
    out, as in the paper; the dashed line is the one scale of `ibm2020-global-scale`.
    """
    seed = studio.seeds[0]
    runs = studio.train("residual", ["fp32", *RECIPES])
    steps, layers = _exponents(runs["ibm2020", seed], studio.data_dir)
    shared = [line for line in _records(runs["ibm2020-global-scale", seed], "step") if "loss_scale" in line]
    spread = [float(np.nanmax(v) - np.nanmin(v)) for v in np.array(list(layers.values())).T]
    with style():
        figure, (left, right) = panels(2, "GradScale", columns=2, height=3.4, sharey=False)
        for i, values in enumerate(layers.values()):
            left.plot(steps, values, color=_depth(i / max(1, len(layers) - 1)), linewidth=1)
        left.plot(
            [line["step"] for line in shared],
            [np.log2(line["loss_scale"]) for line in shared],
            color="black",
            linestyle="--",
            label="one scale for all layers",
        )
        for place, share in (("first", 0.0), ("last", 1.0)):
            left.plot([], [], color=_depth(share), label=f"GradScale, {place} layer in 4 bits")
        left.set_ylabel("log2 of the scale")
        left.legend()
        step_axis(left)
        for recipe in ("fp32", *RECIPES):
            mean = np.mean([_accuracies(runs[recipe, s]) for s in studio.seeds], axis=0)
            right.plot(range(1, len(mean) + 1), 100 * mean, label=recipe, color=color(recipe))
        step_axis(right, "epoch")
        right.set_ylabel("test accuracy %")
        right.legend()
    rows = []
    for recipe in ("fp32", *RECIPES):
        last = [100 * _accuracies(runs[recipe, s])[-1] for s in studio.seeds]
        rows.append((f"`{recipe}`", f"{np.mean(last):.2f}", ", ".join(f"{v:.2f}" for v in last)))
    return "\n\n".join(
        (
            studio.picture(figure, "fig3"),
            table(("recipe", "test accuracy %", "by seed"), rows),
            f"The scales of the {len(layers)} layers with 4-bit gradients lie 2^{np.nanmin(spread):.0f} to "
            f"2^{np.nanmax(spread):.0f} apart at one time (median 2^{np.nanmedian(spread):.0f}).",
        )
    )


def _depth(share: float):
    import matplotlib

    return matplotlib.colormaps["viridis"](0.9 * share)
