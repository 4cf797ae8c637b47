"""The command that finds which layers need 8 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from fourbit.cli._app import app
from fourbit.cli._config_file import ConfigFile
from fourbit.cli._terminal import make_table, say, show
from fourbit.train import TrainConfig
from fourbit.train._config import WHOLE


@app.command
def tune(
    config: Annotated[TrainConfig | None, Parameter(name="*")] = None,
    *,
    budget: float | None = None,
    max_loss: float | None = None,
    high: str = "hfp8",
    num_batches: Annotated[int, WHOLE] = 2,
    config_file: ConfigFile = None,
) -> int:
    """Find which layers need 8 bits, and write a recipe.

    Trains --max-steps steps (None: 200) by --recipe, measures what each product of each layer in 8 bits would gain for the
    gradients, and takes those with the greatest gain per cost until the budget is used up. Into --out come recipe.toml with a
    reason beside each rule, tune.png, and all numbers. Started again, the command goes on where it was.

    Args:
        budget: Share of all multiply-accumulates that may be taken to 8 bits. None: 0.05, unless there is --max-loss.
        max_loss: Instead: take as many as it needs, so that the test metric of the weights as they are is at most so many
            points worse than in full precision.
        high: Recipe that the 8-bit operands are of.
        num_batches: On which gradients are measured.
        config_file: TOML file with settings, by the names of the flags; a flag goes before the file.
    """
    from fourbit.tuning import tune as run

    config = config or TrainConfig()
    found = run(config, budget=budget, max_loss=max_loss, high=high, num_batches=num_batches, progress=config.progress)
    if found.steps:
        table = make_table("layer", "product", "before", "after", "cost")
        for step in found.steps:
            numbers = f"{step.before:.4f}", f"{step.after:.4f}", f"{step.cost:.2%}"
            table.add_row(step.candidate.layer, step.candidate.gemm, *numbers)
        show(table)
    else:
        say("nothing was chosen: no product in 8 bits that fits lowers what is measured.")
    energy = "" if found.energy is None else f", {found.energy - 1:+.1%} energy"
    say(
        f"gradient error {found.before.error:.4f} -> {found.after.error:.4f}; {found.share:.2%} of the multiply-accumulates "
        f"in 8 bits beside {found.kept:.2%} that the recipe keeps there{energy}"
    )
    if not found.reached:
        say("max_loss is not met even so: what is left comes from what this cannot change.")
    command = replace(config, recipe=str(found.path), out=None, max_steps=None).command()
    say(f"recipe: {found.path}\ntrain with it:\n  {command}")
    return 0
