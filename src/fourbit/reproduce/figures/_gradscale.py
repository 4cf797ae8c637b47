"""Figure 3: the scale of each layer's gradient over training, and what one scale for all layers costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fourbit.report import panels, step_axis, style
from fourbit.reproduce.figures._base import Studio, color, register, table

RECIPES = ("ibm2020", "ibm2020-global-scale", "ibm2020-radix2", "ibm2020-radix2-global-scale")


def _exponents(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and log2 of each layer's scale at each; NaN where it is not set."""
    steps, layers = [], {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "step" and "scales" in record:
            steps.append(record["step"])
            for name, found in record["scales"].items():
                value = found.get("g_exponent")
                layers.setdefault(name, {})[record["step"]] = np.nan if value is None else float(np.mean(value))
    return np.array(steps), {n: np.array([v.get(s, np.nan) for s in steps]) for n, v in layers.items()}


def _accuracies(folder: Path) -> list[float]:
    records = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [r["test_accuracy"] for r in records if r["kind"] == "epoch"]


@register("fig3")
def fig3(studio: Studio) -> str:
    """Figure 3: GradScale's exponent of each layer over training, and GradScale against one loss scale for all layers.

    The paper shows scales of 2^14 to 2^23 that fall as training goes on and differ by up to 2^6 between layers (ResNet-18),
    and more than one percent of accuracy between GradScale and the loss scaling of APEX, with FP8 for dW. Here both radix 4
    and radix 2, because the paper compares the radices with one loss scale only.
    """
    seed = studio.seeds[0]
    runs = studio.train("residual", ["fp32", *RECIPES])
    steps, layers = _exponents(runs["ibm2020", seed])
    spread = [float(np.nanmax(v) - np.nanmin(v)) for v in np.array(list(layers.values())).T]
    with style():
        figure, (left, right) = panels(2, "GradScale", columns=2, height=3.4, sharey=False)
        for i, values in enumerate(layers.values()):
            left.plot(steps, values, color=_depth(i / max(1, len(layers) - 1)), linewidth=1)
        left.set_ylabel("log2 of the scale; dark: near the input")
        step_axis(left)
        for recipe in ("fp32", *RECIPES):
            mean = np.mean([_accuracies(runs[recipe, s]) for s in studio.seeds], axis=0)
            right.plot(range(1, len(mean) + 1), 100 * mean, label=recipe, color=color(recipe))
        right.set_xlabel("epoch")
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
            f"The layers' scales lie 2^{np.nanmin(spread):.0f} to 2^{np.nanmax(spread):.0f} apart at one time (median "
            f"2^{np.nanmedian(spread):.0f}).",
        )
    )


def _depth(share: float):
    import matplotlib

    return matplotlib.colormaps["viridis"](0.9 * share)
