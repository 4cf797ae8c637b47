"""Whether training in 4 bits changes a model beyond its mean accuracy: classes and calibration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fourbit.report import panels, style
from fourbit.reproduce.figures._base import Studio, register, table
from fourbit.train import load

RECIPES = ("fp32", "int4-fwd", "ibm2020", "ibm2020-luq")
NUM_BINS = 15


def predictions(folder: Path, data_dir: Path | None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Probabilities [N, classes] and labels [N] of the test images, and the names of the classes."""
    trained = load(folder, data_dir=data_dir)
    model, task = trained.model.eval(), trained.task
    found = []
    with torch.no_grad():
        for x, y in task.batches("test"):
            found.append((model(x).float().softmax(-1), y))
    probabilities, labels = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return probabilities, labels, task.data.classes  # type: ignore[attr-defined]


def calibration_error(probabilities: np.ndarray, labels: np.ndarray, num_bins: int = NUM_BINS) -> float:
    """Expected calibration error: sum over bins of confidence of (share of images) |accuracy - mean confidence|.

    Guo et al., "On calibration of modern neural networks", arXiv 1706.04599, Eq. 5.

    >>> calibration_error(np.array([[0.8, 0.2]] * 10), np.array([0] * 8 + [1] * 2))
    0.0
    """
    confidence = probabilities.max(1)
    hit = probabilities.argmax(1) == labels
    which = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    error = 0.0
    for b in range(num_bins):
        mine = which == b
        if mine.any():
            error += mine.mean() * abs(hit[mine].mean() - confidence[mine].mean())
    return round(float(error), 12)


@register("bias")
def bias(studio: Studio) -> str:
    """Does training in 4 bits bias the model? Accuracy by class, and calibration, not the mean alone.

    A question of the paper's reviewers and of its own section on broader impact. Per class: accuracy minus that of fp32,
    mean over seeds. The yardstick is what another seed of fp32 changes: the root mean square over classes of the difference
    between two runs of fp32 (from two seeds on), after the mean difference is taken out.
    """
    runs = studio.train("residual", RECIPES)
    accuracies: dict[str, np.ndarray] = {}
    rows = []
    classes: tuple[str, ...] = ()
    for recipe in RECIPES:
        found, overall, errors, logs = [], [], [], []
        for seed in studio.seeds:
            probabilities, labels, classes = predictions(runs[recipe, seed], studio.data_dir)
            hit = probabilities.argmax(1) == labels
            found.append([hit[labels == c].mean() for c in range(len(classes))])
            overall.append(100 * hit.mean())
            errors.append(calibration_error(probabilities, labels))
            logs.append(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-12)).mean())
        accuracies[recipe] = 100 * np.array(found)
        scatter = _scatter(accuracies["fp32"], accuracies[recipe], recipe == "fp32")
        rows.append(
            (
                f"`{recipe}`",
                f"{np.mean(overall):.2f}",
                f"{100 * np.mean(errors):.2f}",
                f"{np.mean(logs):.3f}",
                "-" if np.isnan(scatter) else f"{scatter:.2f}",
            )
        )
    with style():
        figure, (axis,) = panels(1, "Accuracy by class, minus that of fp32", columns=1, height=3.4)
        width = 0.8 / (len(RECIPES) - 1)
        for i, recipe in enumerate(RECIPES[1:]):
            difference = accuracies[recipe] - accuracies["fp32"]
            x = np.arange(len(classes)) + (i - (len(RECIPES) - 2) / 2) * width
            spread = difference.std(0, ddof=1) if len(studio.seeds) > 1 else None
            axis.bar(x, difference.mean(0), width, yerr=spread, label=recipe, error_kw={"linewidth": 0.8})
        axis.axhline(0, color="#333333", linewidth=0.8)
        axis.set_xticks(range(len(classes)), list(classes))
        several = len(studio.seeds) > 1
        axis.set_xlabel("class; bars: mean over the seeds, lines: their standard deviation" if several else "class")
        axis.set_ylabel("points")
        axis.legend()
    head = ("recipe", "accuracy %", "calibration error %", "negative log likelihood", "scatter over classes, points")
    note = (
        "Scatter: root mean square over classes of the difference to fp32 of the same seed, mean difference taken out; of "
        f"`fp32` itself, between its seeds. {len(studio.seeds)} seed(s)."
    )
    by_class = [
        (
            name,
            f"{accuracies['fp32'][:, i].mean():.1f}",
            *(", ".join(f"{d:+.1f}" for d in (accuracies[r] - accuracies["fp32"])[:, i]) for r in RECIPES[1:]),
        )
        for i, name in enumerate(classes)
    ]
    classes_head = ("class", "accuracy %, `fp32`", *(f"`{r}` - `fp32`, by seed" for r in RECIPES[1:]))
    return "\n\n".join((studio.picture(figure, "bias"), table(head, rows), note, table(classes_head, by_class)))


def _scatter(reference: np.ndarray, found: np.ndarray, between_seeds: bool) -> float:
    """See `bias`; arrays [seeds, classes]."""
    differences = (
        np.array([a - b for i, a in enumerate(found) for b in found[:i]]) if between_seeds else found - reference
    )
    if not len(differences):
        return float("nan")
    centred = differences - differences.mean(1, keepdims=True)
    return float(np.sqrt((centred**2).mean()))
