"""What is measured on a trained network with one batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.recipes import Recipe
from fourbit.train import load


def one_batch(task: Any) -> tuple[Tensor, ...]:
    """The first training batch of an epoch that no run has seen."""
    return next(iter(task.batches("train", epoch=10_000)))


def sample(x: Tensor, count: int) -> Tensor:
    """So many elements at random, the same for the same size. (A regular choice would meet the same column of every image.)"""
    x = x.flatten()
    if x.numel() <= count:
        return x
    return x[torch.randint(x.numel(), (count,), generator=torch.Generator().manual_seed(x.numel()))]


def convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions of a network by name, from the input to the output."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def output_gradients(
    folder: Path,
    data_dir: Path | None,
    recipe: str | Recipe | None = None,
    epoch: int | None = None,
    change: Callable[[nn.Module], None] = lambda model: None,
) -> dict[str, Tensor]:
    """dL/dy of every convolution, float32: y is its output.

    Args:
        folder: of the run with the weights.
        recipe: how the network computes; None: as in the run.
        epoch: of a kept checkpoint.
        change: is done to the network before.
    """
    trained = load(folder, epoch=epoch, recipe=recipe, data_dir=data_dir, fuse=False)
    model = trained.model
    change(model)
    found: dict[str, Tensor] = {}
    for name, module in convolutions(model).items():

        def keep(_: nn.Module, inputs: Any, y: Tensor, name: str = name) -> None:
            y.register_hook(lambda g: found.__setitem__(name, g.detach().float()))

        module.register_forward_hook(keep)
    batch = one_batch(trained.task)
    trained.task.loss(model, batch)[0].backward()  # the first pass decides the clip values and exponents
    for parameter in model.parameters():
        parameter.grad = None
    found.clear()
    trained.task.loss(model, batch)[0].backward()
    return {name: found[name] for name in convolutions(model)}
