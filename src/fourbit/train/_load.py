"""The network of a finished or unfinished run, for whoever wants to look into it or use it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fourbit import data as datasets
from fourbit import models, recipes
from fourbit._types import require_types
from fourbit.errors import UserError
from fourbit.nn import quantized_layers
from fourbit.train import _checkpoint
from fourbit.train._config import TrainConfig
from fourbit.train._folder import (
    RunFolder,
    has_run,
    read_json,
    recipe_of,
    require_no_links,
    require_own,
    require_same_data,
)
from fourbit.train.tasks import Task, make_task


@dataclass(frozen=True)
class Trained:
    """A network with its task (data, batches, loss) and the configuration of its run."""

    config: TrainConfig
    model: nn.Module
    task: Task


def load(
    folder: Path,
    epoch: int | None,
    recipe: str | recipes.Recipe | None,
    data_dir: Path | None,
    fuse: bool | None,
    model_file: str | None,
) -> Trained:
    """See `fourbit.train.load`."""
    folder = Path(folder)
    config = _config_of(folder)
    config = dataclasses.replace(config, out=folder, data_dir=data_dir or config.data_dir)
    if models.is_own(config.model):
        if model_file is None:
            raise UserError(
                f"the network of {folder} is code, {config.model}, which is not run because a folder says so: name it "
                "yourself, with --model (model= of load)."
            )
        config = dataclasses.replace(config, model=model_file)
    require_types(config)
    own = recipe_of(folder, config.recipe)
    run = RunFolder(folder, active=False)
    place = run.checkpoint if epoch is None else run.kept_checkpoint(epoch)
    found = _checkpoint.newest(place, lambda c: require_own(c.state, config, "", place))
    if found is None:
        which = "" if epoch is None else f" of epoch {epoch}"
        raise UserError(f"{folder} has no checkpoint{which}: name another run, or another epoch.")
    path, checkpoint = found
    task = make_task(config, torch.device("cpu"), 0, 1)
    require_same_data(folder, config, datasets.identity(task.data))
    model = task.build()
    options = {"fuse": config.fuse if fuse is None else fuse, **config.convert_options()}
    if recipe is None or recipe in (config.recipe, own):
        recipes.convert(model, own, **options)
        _checkpoint.restore_model(model, checkpoint.model, path)
    else:
        recipes.convert(model, own, **options)
        added = tuple(f"{name}.quant." for name in quantized_layers(model))
        recipes.restore(model)
        weights = {key: t for key, t in checkpoint.model.items() if not (added and key.startswith(added))}
        _checkpoint.restore_model(model, weights, path)
        recipes.convert(model, recipe, **options)
    return Trained(config, model, task)


def _config_of(folder: Path) -> TrainConfig:
    if not has_run(folder):
        raise UserError(f"there is no run in {folder}: name the folder of one.")
    require_no_links(folder)
    written = read_json(folder / "config.json")
    fields = {field.name: written[field.name] for field in dataclasses.fields(TrainConfig) if field.name in written}
    for name in ("data_dir", "out"):
        if fields.get(name) is not None:
            fields[name] = Path(fields[name])
    for name, value in fields.items():
        if isinstance(value, list):
            fields[name] = tuple(value)
    return TrainConfig(**fields)
