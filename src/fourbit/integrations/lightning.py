"""Lightning's Trainer in 4 bits.

    from fourbit.integrations.lightning import FourBit

    trainer = lightning.Trainer(callbacks=[FourBit("ibm2020")])
    trainer.fit(module, data)                      # fit(..., ckpt_path=...) goes on to the bit

Lightning's checkpoints hold what layers remember beside the weights, under `state_dict`. Outside of a Trainer such a checkpoint
loads into a module that `fourbit.convert` has converted.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, WeightAveraging

from fourbit import nn as fnn
from fourbit import recipes
from fourbit.errors import UserError
from fourbit.integrations._settings import Settings, convert
from fourbit.integrations._steps import by_layer, scheduler_of
from fourbit.nn import Observation
from fourbit.recipes import Choice


class FourBit(Callback):
    """Converts the module before the Trainer makes its optimizers and loads a checkpoint, carries out a recipe's phases, lets
    processes agree on scales behind every backward pass, and logs underflow, saturation and signal-to-noise ratio of every
    layer's operands at the steps that the Trainer logs.

    Args:
        recipe: a name of the catalogue; None: the module is converted already.
        seed, products, fuse, only, skip: as of `fourbit.convert`. Checkpoints keep all but `fuse`, and a run goes on with the
            same alone.
        observe: whether layers' statistics are logged.

    Raises:
        UserError: as `fourbit.convert`; a module that is converted otherwise; a recipe that scales the loss; an optimizer
            without the clip values; a checkpoint of another recipe, seed, `only` or `skip`; or an average of weights that was
            copied before the conversion.
    """

    def __init__(
        self,
        recipe: str | None,
        *,
        seed: int = 0,
        products: str = "fast",
        fuse: bool = True,
        only: Choice | None = None,
        skip: Choice | None = None,
        observe: bool = True,
    ):
        if recipe is None and (only is not None or skip is not None):
            raise UserError("only and skip choose layers for a recipe: name one (FourBit('ibm2020', ...)).")
        self.recipe, self.observe = recipe, observe
        self._options: dict[str, Any] = {"seed": seed, "products": products, "fuse": fuse, "only": only, "skip": skip}
        self._settings: Settings | None = None
        self._open = ExitStack()
        self._current: Observation | None = None
        self._scheduler: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Conversion."""
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        if any(isinstance(callback, WeightAveraging) for callback in before):
            raise UserError(
                "an average of weights copies the module when it is set up: put FourBit before it among the callbacks."
            )
        if self.recipe is not None:
            self._settings = convert(pl_module, self.recipe, allow_converted=True, **self._options)
        elif not fnn.quantized_layers(pl_module):
            raise UserError("the module has no quantized layer: name a recipe (FourBit('ibm2020')).")
        if recipes.loss_scaler(pl_module) is not None:
            raise UserError(
                "the recipe scales the loss, which Lightning's Trainer has no place for: take one with GradScale, such as "
                "ibm2020."
            )

        pl_module.register_load_state_dict_pre_hook(self._require_recipe)

    def _require_recipe(self, module: Any, tensors: dict[str, Any], prefix: str, *_: Any) -> None:
        """The Trainer loads the module before its callbacks."""
        wanted = {name for name in module.state_dict() if ".quant." in name}
        found = {name.removeprefix(prefix) for name in tensors if ".quant." in name}
        if found and found != wanted:
            raise UserError(
                f"the checkpoint was not trained by {self.recipe or 'the recipe of the module'} in these layers: give the "
                "recipe, only and skip that it was trained with."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Are all clip values trained?"""
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        alphas = [g for g in recipes.param_groups(pl_module) if g["name"] == "alpha"]
        if held and any(id(p) not in held for group in alphas for p in group["params"]):
            raise UserError(
                "no optimizer has the clip values of the converted module: make it in configure_optimizers, from "
                "self.parameters() or fourbit.param_groups(self)."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Phases count the Trainer's steps."""
        if self.recipe is not None:
            total = trainer.estimated_stepping_batches
            self._scheduler = scheduler_of(pl_module, self.recipe, total, trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before a forward pass."""
        if self._scheduler is not None:
            self._scheduler.at(trainer.global_step)
        if self.observe and trainer.logger is not None and (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._current = self._open.enter_context(fnn.observe(pl_module))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Behind a backward pass."""
        fnn.synchronize(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """What was observed goes to the logger."""
        self._open.close()
        if self._current is not None:
            pl_module.log_dict(dict(by_layer(self._current)))
            self._current = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The observation ends."""
        self._open.close()

    def state_dict(self) -> dict[str, Any]:
        """What the module was converted by, for the checkpoint."""
        return {} if self._settings is None else self._settings.as_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuses a checkpoint of another recipe, seed, `only` or `skip`."""
        if self._settings is not None and state_dict.get("recipe") is not None:
            self._settings.require(state_dict, "the checkpoint")
