"""Synthetic run folders: what the trainer would write, without training anything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

EVEN = [4.0**n for n in range(-3, 4)]

METRICS: dict[str, Callable[[float], float]] = {
    "accuracy %": lambda a: 100 * a,
    "perplexity": lambda a: 100 / a,
    "word error rate %": lambda a: 100 * (1 - a),
    "BLEU": lambda a: 40 * a,
}
"""What a run shows as its metric, from the share of hits."""


def layer_names(count: int) -> list[str]:
    return [f"layer{1 + i // 6}.{(i // 2) % 3}.conv{1 + i % 2}" for i in range(count)]


def _slots(rng: np.random.Generator, depth: float, done: float) -> dict[str, Any]:
    base = {"numel": 4096, "amax": 1.0, "scale": 0.01, "bias": 0.0}
    slots = {}
    for slot, under, sqnr in (
        ("x_fprop", 0.02, 20.0), ("w_fprop", 0.12, 18.0), ("g_dgrad", 0.25, 9.0), ("g_wgrad", 0.18, 8.5)
    ):  # fmt: skip
        slots[slot] = {
            **base,
            "underflow": float(np.clip(under + 0.2 * depth * done + 0.01 * rng.normal(), 0, 1)),
            "saturation": float(np.clip(0.001 + 0.02 * rng.random() * (slot == "x_fprop"), 0, 1)),
            "sqnr_db": float(sqnr - 3 * depth + rng.normal()),
        }
    return slots


def _histograms(rng: np.random.Generator, names: Iterable[str], mean: float) -> dict[str, Any]:
    edges = np.arange(-24, 8.01, 0.5)
    found = {}
    for i, name in enumerate(names):
        counts, _ = np.histogram(rng.normal(mean - 0.2 * i, 3.0, 20_000).clip(-23.9, 7.0), edges)
        found[name] = {}
        for slot, shift in (("g_dgrad", 1.0), ("g_wgrad", 0.5)):
            grid = [shift * v for v in EVEN]
            found[name][slot] = {
                "log2_edges": edges.tolist(),
                "counts": counts.tolist(),
                "zeros": 300,
                "grid": grid,
                "decision_points": [v / 1.6 for v in grid],
                "rounding": "nearest",
                "reused": False,
            }
    return found


def write_run(
    folder: Path,
    *,
    recipe: str = "fp32",
    seed: int = 0,
    epochs: int = 5,
    steps_per_epoch: int = 100,
    layers: int = 0,
    accuracy: float = 0.9,
    metric: str | None = "accuracy %",
    stopped: str | None = "done",
    diverges_at: int | None = None,
    **config: Any,
) -> Path:
    """Write a plausible run folder; `layers=0` as for full precision, `stopped=None` for one that is still going,
    `metric=None` for one of a trainer that wrote no metric. BLEU is measured in the last epoch alone."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, *recipe.encode()])
    asked = {"model": "resnet20", "data": "cifar10", "recipe": recipe, "seed": seed, "out": str(folder), "epochs": 10}
    asked |= {"batch_size": 128, "lr": 0.1, "weight_decay": 1e-4, **config, "fourbit_version": "0.1.0"}
    env = {"python": "3.11.9", "torch": "2.13.0", "cpu": "Some CPU", "cores": 2, "device": "cpu"}
    env["started"] = f"2025-01-01T00:0{seed % 10}:00"
    (folder / "config.json").write_text(json.dumps(asked))
    (folder / "env.json").write_text(json.dumps(env))
    names, lines = layer_names(layers), []
    total = epochs * steps_per_epoch
    for step in range(10, total + 1, 10):
        done = step / total
        epoch = (step - 1) // steps_per_epoch
        lost = diverges_at is not None and step >= diverges_at
        loss = None if lost else 0.3 + 2.0 * math.exp(-4 * done) + 0.05 * rng.normal() + (0.9 - accuracy)
        lines.append({"kind": "step", "step": step, "epoch": epoch, "loss": loss, "accuracy": 0.5, "lr": 0.1})
        lines[-1]["images_per_s"] = 900.0
        if names and step % 50 == 0:
            entry = {}
            for i, name in enumerate(names):
                depth = i / len(names)
                exponent = round(20 - 5 * depth - 3 * done + 0.4 * rng.normal())
                entry[name] = {
                    "g_exponent": exponent,
                    "x_alpha": float(8 - (3 + 3 * depth) * (1 - math.exp(-5 * done))),
                }
                entry[name]["slots"] = _slots(rng, depth, done)
            lines.append({"kind": "layers", "step": step, "layers": entry})
        if names and (step == 50 or step % steps_per_epoch == 0):
            lines.append({"kind": "histograms", "step": step, "histograms": _histograms(rng, names, -1 - 2 * done)})
        if step % steps_per_epoch == 0:
            test = 0.1 if lost else accuracy * (1 - 0.6 * math.exp(-5 * done)) + 0.003 * rng.normal()
            lines.append({"kind": "epoch", "step": step, "epoch": epoch, "train_loss": loss, "train_accuracy": 0.8})
            lines[-1] |= {"test_loss": 0.5, "test_accuracy": float(test), "seconds": 30.0 + seed}
            if metric:
                known = metric != "BLEU" or step == total
                lines[-1] |= {"metric": metric, "test_metric": METRICS[metric](float(test)) if known else None}
    if stopped:
        judged = {k: lines[-1][k] for k in ("test_accuracy", "metric", "test_metric") if k in lines[-1]}
        lines.append({"kind": "final", "step": total, "epoch": epochs - 1, **judged})
        lines[-1] |= {"test_loss": 0.5, "seconds": 31.0 * epochs, "stopped": stopped}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
