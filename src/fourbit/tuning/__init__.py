"""Which layers need 8 bits, found by measuring.

products    what a recipe multiplies, for the hardware model
candidates  each GEMM of each layer in 4 bits, with its form in 8 bits and what that costs
probe       the error of the gradient and the loss under a recipe, on the weights of a short run
choice      by gain per cost, each gain measured with what is chosen already
output      a recipe file with a reason beside each rule, a picture, all numbers
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourbit.train import TrainConfig
    from fourbit.tuning._tune import Tuned


def tune(
    config: TrainConfig,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    high: str = "hfp8",
    num_batches: int = 2,
    progress: bool = True,
) -> Tuned:
    """Choose GEMMs of layers that are computed in 8 bits, and write the recipe.

    A run of `config.max_steps` steps (None: 200) under `config.recipe` gives weights. On them, and on batches that no epoch has
    seen, the weights' gradients g^ under a recipe are compared with those in full precision, g. Of each layer

        projection = <g^, g> / |g|^2        noise = |g^ - projection g| / |g|
        error = e / (1 + e)                 e = |g^ - g|^2 / |g|^2 = (1 - projection)^2 + noise^2

    and the mean error over the layers is what a choice is to lower. A GEMM in 8 bits costs the energy that the hardware model
    says (`fourbit.hardware.estimate`; multiply-accumulates where it has no unit for a format). The one with the greatest
    gain per cost is taken, its gain measured together with those that are taken already, until nothing that fits lowers it.

    Args:
        config: model, data, base recipe, seed and all else of the run; `config.out` is the folder (None:
            runs/tune-MODEL-DATA-RECIPE-seedSEED), in which a later call goes on.
        budget: share of all multiply-accumulates of a training step that may be taken to 8 bits, beside what the recipe itself
            keeps there; above 0 and at most 1. None: 0.05, unless there is `max_loss`.
        max_loss: instead, products of the forward pass are taken to 8 bits until the test metric, with the weights as they are,
            is at most so far from that in full precision (points of a percentage, else units).
        high: recipe of which the 8-bit operands are: those of its last rule.
        num_batches: on which gradients are measured.
        progress: show a bar, if the output is a terminal.

    Returns:
        The recipe, what was chosen and why. `config.out` has recipe.toml, tune.json, tune.png, measured.jsonl and the run.

    Raises:
        UserError: both or none in range of `budget` and `max_loss`, a recipe without 4-bit layers for the model, one without
            8-bit operands, a folder of other settings, or as `fourbit.train.train`.
    """
    from fourbit.tuning._tune import tune as run

    return run(config, budget, max_loss, high, num_batches, progress)
