"""Figures 4 and 5: what one phase of rounding and two do to the statistics of batch normalization, and to the loss around."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from fourbit.report import panels, style
from fourbit.reproduce.figures._base import Studio, color, register, table
from fourbit.reproduce.figures._probe import one_batch
from fourbit.train import load

RECIPES = ("fp32", "ibm2020-no-tpr", "ibm2020")
RESTORED = (*RECIPES[:2], "ibm2020-no-tpr-zerosum", "ibm2020", "ibm2020-zerosum")
"""With the sum of each channel's gradient restored as well."""
POINTS = 25
NUM_BATCHES = 8
"""Of which statistics are recomputed, and on which losses are measured."""


def _norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def batch_means(folder: Path, data_dir: Path | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each BatchNorm: the channels' means over one batch, and their distance to the running means in running deviations."""
    trained = load(folder, data_dir=data_dir, fuse=False)
    found = {}
    for name, norm in _norms(trained.model).items():
        running = norm.running_mean.clone(), norm.running_var.clone()  # type: ignore[union-attr]

        def keep(_: nn.Module, inputs: tuple[torch.Tensor, ...], name: str = name, running=running) -> None:
            mean = inputs[0].detach().mean((0, 2, 3))
            found[name] = mean.numpy(), ((mean - running[0]) / (running[1] + 1e-5).sqrt()).numpy()

        norm.register_forward_pre_hook(keep)
    with torch.no_grad():
        trained.task.loss(trained.model, one_batch(trained.task))
    return found


@register(
    "fig4",
    "at epoch 95 of ResNet-18 (ImageNet) the means stay near 0 in FP32 and with two phases; with one they reach "
    "~700 in layers 15 and 16, ~2900 in the last",
)
def fig4(studio: Studio) -> str:
    """Figure 4 and 5a: batch means before each BatchNorm at the end of training, without and with two-phase rounding.

    In the paper (ResNet-18 on ImageNet, epoch 95) FP4 without a second phase lets the means of the last layers explode to
    thousands, and two phases keep them near zero. Drift: distance of a batch's mean to the running mean that a test uses, in
    running deviations; root mean square over the channels. Beyond the paper: behind batch normalization the gradient sums to
    zero in each channel before it is rounded, and what rounding leaves moves the means; so there is each format with that
    sum restored, too. The picture and the table of layers are of the first seed.
    """
    runs = studio.train("residual", RESTORED)
    all_found = {
        key: batch_means(runs[key], studio.data_dir) for key in ((r, s) for r in RESTORED for s in studio.seeds)
    }
    found = {recipe: all_found[recipe, studio.seeds[0]] for recipe in RESTORED}
    names = list(found["fp32"])
    with style():
        figure, (left, right) = panels(2, "Statistics of batch normalization", columns=2, height=3.6, sharey=False)
        for recipe in RESTORED:
            means = [found[recipe][n][0] for n in names]
            x = range(len(names))
            line = left.plot(x, [np.abs(m).max() for m in means], label=recipe, color=color(recipe))[0]
            right.plot(x, [_drift(found[recipe][n][1]) for n in names], label=recipe, color=line.get_color())
        left.set_ylabel("largest batch mean of a channel")
        right.set_ylabel("drift, running deviations")
        for axis in (left, right):
            axis.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
            axis.legend()
    rows = [
        (
            n,
            *(f"{np.abs(found[r][n][0]).max():.2f}" for r in RESTORED),
            *(f"{_drift(found[r][n][1]):.3f}" for r in RESTORED),
        )
        for n in names
    ]
    head = ("layer", *(f"largest mean, `{r}`" for r in RESTORED), *(f"drift, `{r}`" for r in RESTORED))
    largest, drifts = [], []
    for r in RESTORED:
        seeds = [all_found[r, s].values() for s in studio.seeds]
        largest.append([max(float(np.abs(means).max()) for means, _ in layers) for layers in seeds])
        drifts.append([float(np.mean([_drift(distances) for _, distances in layers])) for layers in seeds])
    by_seed = [
        (f"`{r}`", ", ".join(f"{v:.1f}" for v in a), ", ".join(f"{v:.4f}" for v in b))
        for r, a, b in zip(RESTORED, largest, drifts, strict=True)
    ]
    summary = table(("recipe", "largest batch mean, by seed", "mean drift of the layers, by seed"), by_seed)
    return "\n\n".join((studio.picture(figure, "fig4"), summary, table(head, rows)))


def _drift(distances: np.ndarray) -> float:
    return float(np.sqrt(np.mean(distances**2)))


def _loss(trained, batches: list[tuple[torch.Tensor, ...]], recompute: list[tuple[torch.Tensor, ...]]) -> float:
    """Mean test loss, with statistics recomputed on some training batches if there are any."""
    model, task = trained.model, trained.task
    with torch.no_grad():
        if recompute:
            norms = _norms(model)
            for norm in norms.values():
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
            for name, module in model.named_modules():
                module.training = name in norms  # dropout and clip values stay as they are
            for batch in recompute:
                task.loss(model, batch)
        model.eval()
        sums = sum(task.loss(model, batch)[1] for batch in batches)
    return float(sums[0] / sums[2])  # type: ignore[index]


@register(
    "fig5",
    "with one phase the loss is ~1.2 at both ends and above 20 between, ~1.2 to 1.5 with recomputed statistics; "
    "with two phases it is flat, ~0.8 to 1.4",
)
def fig5(studio: Studio) -> str:
    """Figure 5b, c: the test loss on the line between two checkpoints, with interpolated and with recomputed statistics.

    In the paper (epochs 80 and 95) FP4 without a second phase has sharp minima at both ends and a loss above 20 between
    them, which recomputed statistics flatten: the loss depends on the statistics of batch normalization. With two phases
    the line is flat. At 0 lies the end of training, at 1 the checkpoint at four fifths of it.
    """
    seed = studio.seeds[0]
    runs = studio.train("residual", RECIPES, seeds=(seed,))
    epochs = studio.epochs("residual")
    earlier = round(epochs * 0.8)
    steps = np.linspace(-0.1, 1.1, POINTS if studio.scale != "smoke" else 13)  # 0 and 1 are among them
    curves = {}
    for recipe in RECIPES:
        ends = [load(runs[recipe, seed], epoch=e, data_dir=studio.data_dir, fuse=False) for e in (epochs, earlier)]
        states = [{k: v.clone() for k, v in end.model.state_dict().items()} for end in ends]
        trained = ends[0]
        test = [batch for batch, _ in zip(trained.task.batches("test"), range(NUM_BATCHES), strict=False)]
        train = [
            batch for batch, _ in zip(trained.task.batches("train", epoch=10_000), range(NUM_BATCHES), strict=False)
        ]
        for kind, recompute in (("interpolated", []), ("recomputed", train)):
            values = []
            for alpha in steps:
                mixed = {
                    k: torch.lerp(a, states[1][k], float(alpha)) if a.is_floating_point() else a
                    for k, a in states[0].items()
                }
                trained.model.load_state_dict(mixed)
                values.append(_loss(trained, test, recompute))
            curves[recipe, kind] = np.array(values)
    with style():
        figure, axes = panels(
            len(RECIPES), f"Loss on the line from epoch {epochs} to epoch {earlier}", columns=3, height=3.0
        )
        for axis, recipe in zip(axes, RECIPES, strict=True):
            for kind, dashes in (("interpolated", "-"), ("recomputed", "--")):
                axis.plot(steps, curves[recipe, kind], dashes, label=f"statistics {kind}")
            axis.set_title(recipe, loc="left")
            axis.set_xlabel(f"0: epoch {epochs}, 1: epoch {earlier}")
            axis.set_ylabel("test loss")
            axis.legend()
    inside = (steps > -1e-6) & (steps < 1 + 1e-6)
    rows = [
        (f"`{recipe}`", kind, f"{curve[inside][0]:.3f}", f"{curve[inside][-1]:.3f}", f"{curve[inside].max():.3f}")
        for (recipe, kind), curve in curves.items()
    ]
    head = ("recipe", "statistics", f"loss at epoch {epochs}", f"at epoch {earlier}", "largest between")
    return "\n\n".join((studio.picture(figure, "fig5"), table(head, rows)))
