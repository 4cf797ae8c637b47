"""How much of the exact gradient of each weight is left under a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from fourbit import recipes
from fourbit.errors import UserError
from fourbit.nn import Upkeep, quantized_layers
from fourbit.ops import REUSE, LayerSpec
from fourbit.train._config import MAX_THREADS
from fourbit.train._display import make_console
from fourbit.train._load import load
from fourbit.train.tasks import Batch, Task

LOSS_SCALE = 2.0**12

UNSEEN = 10_000
"""An epoch that no run has come to."""


class Fidelity(NamedTuple):
    """See `fourbit.train.gradient_fidelity`."""

    projection: float
    cosine: float


def exact_gradients(recipe: recipes.Recipe) -> recipes.Recipe:
    """The forward pass of a recipe, and gradients that are not quantized, with the forward's operands; their sums have the form
    of its outputs."""
    exact: dict[str, Any] = {"g_dgrad": None, "w_dgrad": REUSE, "g_wgrad": None}

    def of(spec: LayerSpec) -> LayerSpec:
        split = spec.x_fprop is not None and spec.x_fprop.outliers is not None  # fprop's numbers are not all of x
        return replace(spec, **exact, x_wgrad=None if split else REUSE)

    rules = tuple(replace(rule, spec=None if rule.spec is None else of(rule.spec)) for rule in recipe.rules)
    return replace(recipe, name=f"{recipe.name}, exact gradients", rules=rules, phases=(), upkeep=())


def weight_gradients(
    folder: Path, recipe: str | recipes.Recipe, data_dir: Path | None, model_file: str | None = None
) -> dict[str, Tensor]:
    """dL/dW of every matrix and kernel, float64, flat: of one training batch under a recipe with the float weights of the run.
    No epoch of the run has seen a batch of the same images; of a text it is the first window. See `gradients_of`.
    """
    trained = load(folder, None, recipe, data_dir, None, model_file)
    batch = next(iter(trained.task.batches("train", epoch=UNSEEN)))
    return gradients_of(trained.model, trained.task, batch, trained.config.seed)[0]


def gradients_of(model: nn.Module, task: Task, batch: Batch, seed: int) -> tuple[dict[str, Tensor], float]:
    """dL/dW of every matrix and kernel, float64, flat, by the name of its layer; and the loss. A pass before it sets clip
    values, exponents, or the loss scale; without one the loss is multiplied by 2^12, so that sums in FP16 do not underflow."""
    for layer in quantized_layers(model).values():
        for child in layer.quant.children():
            if isinstance(child, Upkeep) and child.seen() < 0:
                child.at(0, layer)
    scaler, scale, restore = recipes.loss_scaler(model), LOSS_SCALE, task.snapshot()
    loss = torch.zeros(())
    for _ in range(2):
        torch.manual_seed(seed)  # dropout
        restore()
        for parameter in model.parameters():
            parameter.grad = None
        scale = scaler.value if scaler else LOSS_SCALE
        loss = task.loss(model, batch)[0]
        (loss * scale).backward()
        if scaler:
            scaler.update()
    found = {
        name.removesuffix(".weight"): parameter.grad.detach().double().flatten() / scale
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.dim() > 1
    }
    return found, float(loss.detach())


def fidelity(
    folder: Path, names: Sequence[str], data_dir: Path | None, threads: int | None, progress: bool, model: str | None
) -> dict[str, dict[str, Fidelity]]:
    """See `fourbit.train.gradient_fidelity`."""
    if threads is not None:
        if not 1 <= threads <= MAX_THREADS:
            raise UserError(f"threads is {threads}, but must be 1 to {MAX_THREADS}.")
        torch.set_num_threads(threads)
    console = make_console()
    found: dict[str, dict[str, Fidelity]] = {}
    known: dict[recipes.Recipe, dict[str, Tensor]] = {}
    for recipe in track(
        [recipes.get(name) for name in names],
        description="recipes",
        console=console,
        transient=True,
        disable=not (progress and console.is_terminal),
    ):
        name = recipe.name
        reference = exact_gradients(recipe)
        same_forward = replace(reference, name="", summary="", source="")
        if same_forward not in known:
            known[same_forward] = weight_gradients(folder, reference, data_dir, model)
        rounded = weight_gradients(folder, recipe, data_dir, model)
        found[name] = {}
        for layer, exact in known[same_forward].items():
            dw = rounded[layer]
            square, product = float(exact @ exact), float(dw @ exact)
            if square:
                length = float(dw.norm()) * square**0.5
                found[name][layer] = Fidelity(product / square, product / length if length else 0.0)
    return found
