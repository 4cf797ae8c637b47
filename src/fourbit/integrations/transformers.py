"""transformers' Trainer in 4 bits, and `from_pretrained` of what it saved.

    from fourbit.integrations.transformers import FourBitTrainer

    trainer = FourBitTrainer(model, args, train_dataset=rows, recipe="ibm2020")
    trainer.train()                                          # train(resume_from_checkpoint=True) goes on to the bit
    model = AutoModelForCausalLM.from_pretrained(folder)     # converted, with the trained clip values and scales

Other trainers (Seq2SeqTrainer, those of TRL): `class Mine(FourBitMixin, Seq2SeqTrainer): ...`.

A folder that was saved holds float weights in model.safetensors as always, what layers remember of their quantization in
fourbit.safetensors under the names of modules, and recipe, seed, products, `only` and `skip` in config.json
(`quantization_config`). A program that has not imported this module loads the float weights, and transformers says so.

It is a Trainer and no TrainerCallback, because a callback neither makes the optimizer (whose clip values have a group of
their own) nor hears of the folder that a run is resumed from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from fourbit import nn as fnn
from fourbit import recipes
from fourbit._version import __version__
from fourbit.errors import UserError
from fourbit.integrations import _settings
from fourbit.integrations._settings import Settings
from fourbit.integrations._steps import by_layer, means, scheduler_of
from fourbit.nn import Observation
from fourbit.recipes import Choice

METHOD = "fourbit"
STATE_FILE = "fourbit.safetensors"


class FourBitConfig(QuantizationConfigMixin):
    """What config.json says of the recipe.

    Args:
        recipe: a name of the catalogue.
        seed, products: as of `fourbit.convert`.
        only, skip: as of `fourbit.convert`, regular expressions.
    """

    def __init__(
        self,
        recipe: str,
        seed: int = 0,
        products: str = "fast",
        only: str | None = None,
        skip: str | None = None,
        version: str = __version__,
        **_: Any,
    ):
        self.quant_method = METHOD  # type: ignore[assignment]
        self.recipe, self.seed, self.products, self.version = recipe, seed, products, version
        self.only, self.skip = only, skip

    @property
    def settings(self) -> Settings:
        """What the model is converted by."""
        return Settings(self.recipe, self.seed, self.products, self.only, self.skip)


class FourBitQuantizer(HfQuantizer):
    """Converts a model behind the loading of its float weights, and loads what its layers remembered."""

    requires_calibration = False
    quantization_config: FourBitConfig

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config: Any = self.quantization_config
        recipes.convert(model, **config.settings.as_dict())
        folder = str(model.config.name_or_path)
        found = cached_file(folder, STATE_FILE, _raise_exceptions_for_missing_entries=False)
        if found is None:
            raise UserError(
                f"{folder} has a config.json that names the recipe {config.recipe}, but no {STATE_FILE}: save the model with "
                "FourBitTrainer or save_pretrained of fourbit.integrations.transformers."
            )
        load_state(model, found)
        return model

    def is_serializable(self) -> bool:
        """Yes: by `save_pretrained` of this module, which FourBitTrainer calls."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Yes."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """All weights are trained."""
        return True


register_quantization_config(METHOD)(FourBitConfig)
register_quantizer(METHOD)(FourBitQuantizer)


def quantizer_state(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state_dict, what layers remember of their quantization."""
    return {name: t for name, t in tensors.items() if ".quant." in f".{name}"}


def save_pretrained(model: PreTrainedModel, folder: str | Path, state_dict: Mapping[str, Any] | None = None) -> None:
    """Like `model.save_pretrained(folder)` of a converted model, so that `from_pretrained(folder)` gives the same numbers.

    Args:
        state_dict: of the whole model, where it is not `model.state_dict()` (of a sharded one).

    Raises:
        UserError: the model was not converted by `convert` or the trainer of this module, so its recipe is not known.
    """
    if not isinstance(getattr(model.config, "quantization_config", None), FourBitConfig):
        raise UserError(
            "the model's config does not say which recipe it has: convert it with fourbit.integrations.transformers.convert."
        )
    tensors = model.state_dict() if state_dict is None else state_dict
    state = quantizer_state(tensors)
    model.save_pretrained(folder, state_dict={name: t for name, t in tensors.items() if name not in state})
    save_state(state, folder, settings_of(model))


def settings_of(model: nn.Module) -> Settings | None:
    """What a model was converted by, where its config says so."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config.settings if isinstance(config, FourBitConfig) else None


def save_state(state: Mapping[str, Any], folder: str | Path, settings: Settings | None = None) -> None:
    """Write what layers remember, and what the model was converted by."""
    whole = {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().contiguous() for name, t in state.items()
    }
    metadata = {"format": "pt", "fourbit": __version__}
    if settings is not None:
        metadata["settings"] = json.dumps(settings.as_dict())
    safetensors.torch.save_file(whole, Path(folder) / STATE_FILE, metadata=metadata)


def load_state(model: nn.Module, file: str | Path, settings: Settings | None = None) -> None:
    """Give the layers of a converted model what those of the saved one remembered.

    Args:
        settings: what the model was converted by; None: not known.

    Raises:
        UserError: the file is damaged, of a model with other layers, or of one that was converted by other settings.
    """
    try:
        with safetensors.safe_open(file, "pt") as opened:
            before = json.loads((opened.metadata() or {}).get("settings", "{}"))
            saved = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({error}): take another checkpoint.") from error
    if settings is not None and isinstance(before, dict):
        settings.require(before, f"the model in {Path(file).parent}")
    wanted = quantizer_state(model.state_dict())
    missing, strange = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or strange:
        what, name = ("lacks", missing[0]) if missing else ("has", strange[0])
        raise UserError(
            f"{file} {what} {name}: it belongs to another model or recipe than the one that is converted here."
        )
    model.load_state_dict(saved, strict=False)


def convert(
    model: PreTrainedModel,
    recipe: str,
    *,
    seed: int = 0,
    products: str = "fast",
    only: Choice | None = None,
    skip: Choice | None = None,
) -> PreTrainedModel:
    """`fourbit.convert`, which also notes its arguments in the model's config: a predicate as the regular expression of the
    names that it has chosen. The recipe is a name of the catalogue."""
    _convert(model, recipe, seed=seed, products=products, only=only, skip=skip)
    return model


def _convert(model: Any, recipe: str, **options: Any) -> Settings:
    settings = _settings.convert(model, recipe, **options)
    if getattr(model, "config", None) is not None:
        model.config.quantization_config = FourBitConfig(**settings.as_dict())
    return settings


_Base: Any = object  # the Trainer is among the bases of who mixes it in


class FourBitMixin(_Base):
    """What makes a Trainer train in 4 bits; before the Trainer's class among the bases.

    Args:
        recipe: a name of the catalogue; None: the model is converted already (by `convert` or `from_pretrained`).
        seed, products, only, skip: as of `fourbit.convert`. Checkpoints keep them, and `train` goes on with the same alone.
        alpha_weight_decay: of PACT's clip values, which have a group of their own; None: that of the weights.
        observe: whether underflow, saturation and signal-to-noise ratio of every layer's operands go to whatever the Trainer
            reports to, at the steps that it logs; their means over layers are among the logged numbers.

    Raises:
        UserError: as `fourbit.convert`; a recipe that scales the loss, for which the Trainer has no place; an optimizer
            of yours without the clip values; or a checkpoint that was trained with another recipe, seed, `only` or `skip`.
    """

    def __init__(
        self,
        *args: Any,
        recipe: str | None = None,
        seed: int = 0,
        products: str = "fast",
        only: Choice | None = None,
        skip: Choice | None = None,
        alpha_weight_decay: float | None = None,
        observe: bool = True,
        **kwargs: Any,
    ):
        self._recipe = recipe
        self._convert_options: dict[str, Any] = {"seed": seed, "products": products, "only": only, "skip": skip}
        if recipe is None and (only is not None or skip is not None):
            raise UserError("only and skip choose layers for a recipe: name one (recipe='ibm2020').")
        self._alpha_weight_decay = alpha_weight_decay
        super().__init__(*args, **kwargs)
        self._steps = _Steps(observe and not self.args.torch_compile, recipe)
        self._settings = self._convert(self.model)
        self.add_callback(self._steps)

    def _convert(self, model: Any) -> Settings | None:
        if self._recipe is not None:
            settings = _convert(model, self._recipe, **self._convert_options)
        elif not fnn.quantized_layers(model):
            raise UserError("the model has no quantized layer: name a recipe (recipe='ibm2020').")
        else:
            settings = settings_of(model)
        if recipes.loss_scaler(model) is not None:
            raise UserError(
                "the recipe scales the loss, which transformers' Trainer has no place for: take one with GradScale, such as "
                "ibm2020."
            )
        return settings

    def call_model_init(self, trial: Any = None) -> Any:
        """The fresh model of `model_init`, converted."""
        model = super().call_model_init(trial)
        if hasattr(self, "_steps"):
            self._convert(model)
        return model

    def create_optimizer(self, *args: Any) -> Any:
        """The Trainer's optimizer, with a group of their own for clip values."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(*args)
        model = args[0] if args and args[0] is not None else self.model
        alphas = [p for p in _clip_values(model) if p.requires_grad]
        ids = {id(p) for p in alphas}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not ids <= held:
            raise UserError(
                "the optimizer does not have the clip values of the converted model: make it behind the conversion, from "
                "fourbit.param_groups(model)."
            )
        if fresh and alphas:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            decay = self.args.weight_decay if self._alpha_weight_decay is None else self._alpha_weight_decay
            optimizer.add_param_group({"params": alphas, "weight_decay": decay})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means over layers of the last observed step; each layer's go to the reporting integrations."""
        observation = self._steps.taken()
        if observation is not None and "loss" in logs:
            logs |= means(observation)
            self._report(dict(by_layer(observation)))
        super().log(logs, *args, **kwargs)

    def _report(self, layers: dict[str, float]) -> None:
        for callback in self.callback_handler.callbacks:
            if type(callback).on_log is not TrainerCallback.on_log and not isinstance(
                callback, PrinterCallback | ProgressCallback
            ):
                callback.on_log(self.args, self.state, self.control, logs=dict(layers), model=self.model)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        tensors = self.accelerator.unwrap_model(self.model).state_dict() if state_dict is None else state_dict
        state = quantizer_state(tensors)
        super()._save(output_dir, state_dict={name: t for name, t in tensors.items() if name not in state})
        if self.args.should_save:
            save_state(state, output_dir or self.args.output_dir, self._settings)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Also what layers remember, and the weights of models whose modules have other names in files than in memory, which
        the Trainer would leave as they are."""
        file = Path(resume_from_checkpoint) / STATE_FILE
        if not file.is_file():
            raise UserError(f"{resume_from_checkpoint} has no {STATE_FILE}: it was not saved by this trainer.")
        mine = self.accelerator.unwrap_model(self.model if model is None else model)
        if isinstance(mine, PreTrainedModel) and not _has_names_of(Path(resume_from_checkpoint), mine):
            saved = type(mine).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
            mine.load_state_dict(fnn.float_state_dict(saved) | quantizer_state(mine.state_dict()))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_state(mine, file, self._settings)


class FourBitTrainer(FourBitMixin, Trainer):
    """transformers' Trainer in 4 bits: see `FourBitMixin`."""


class _Steps(TrainerCallback):
    """What happens between the steps: phases, the agreement of processes, observation."""

    def __init__(self, observe: bool, recipe: str | None):
        self.observe, self.recipe = observe, recipe
        self._open = ExitStack()
        self._current: Observation | None = None
        self._scheduler: Any = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Phases count the Trainer's steps."""
        name = self.recipe or getattr(getattr(model.config, "quantization_config", None), "recipe", None)
        self._scheduler = None if name is None else scheduler_of(model, name, state.max_steps, optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before the first of the passes of a step."""
        if self._scheduler is not None:
            self._scheduler.at(state.global_step)
        if self.observe and state.logging_steps and (state.global_step + 1) % state.logging_steps == 0:
            self._current = self._open.enter_context(fnn.observe(model))

    def on_substep_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Behind a backward pass without a step."""
        fnn.synchronize(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Behind the last backward pass of a step."""
        fnn.synchronize(model)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The observation ends."""
        self._open.close()

    def taken(self) -> Observation | None:
        """The last observation, once."""
        found, self._current = self._current, None
        return found


def _clip_values(model: nn.Module) -> list[nn.Parameter]:
    return [p for group in recipes.param_groups(model) if group["name"] == "alpha" for p in group["params"]]


def _has_names_of(folder: Path, model: nn.Module) -> bool:
    """Whether weights lie in the files of a checkpoint under the names that they have in the model."""
    names = set(fnn.float_state_dict(model))
    for file in folder.glob("model*.safetensors"):
        with safetensors.safe_open(file, "pt") as saved:
            if not names.issuperset(saved.keys()):
                return False
    return True
