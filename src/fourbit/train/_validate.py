"""All checks of a configuration, in one place, before anything is written.

Each rule is a row: field, test, and the words that complete "<field> is <value>, but must be ...". Names are looked up in
the catalogues, whose errors list the nearest valid names.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from fourbit._types import hints_of, require_types
from fourbit.errors import UserError, unknown
from fourbit.train._config import DEFAULT_LENGTH, MAX_THREADS, TRACKERS, CompareConfig, Settings, TrainConfig, label_of

DEFAULT_LR = {"sgd": 0.1, "adam": 1e-3, "adamw": 1e-3, "muon": 1e-3, "lars": 1e-2}
MIN_EVAL_BATCH_SIZE = 256

_AT_LEAST_1 = (lambda v: v >= 1, "at least 1")
_NOT_NEGATIVE = (lambda v: 0 <= v < math.inf, "0 or more")
_POSITIVE = (lambda v: 0 < v < math.inf, "more than 0")

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "epochs": _AT_LEAST_1,
    "max_steps": _AT_LEAST_1,
    "batch_size": _AT_LEAST_1,
    "eval_batch_size": _AT_LEAST_1,
    "max_test_batches": _AT_LEAST_1,
    "image_size": _AT_LEAST_1,
    "sequence_length": _AT_LEAST_1,
    "beam_size": _AT_LEAST_1,
    "seed": (lambda v: 0 <= v < 2**63, "0 to 2^63 - 1"),
    "lr": _POSITIVE,
    "momentum": (lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    "beta2": (lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    "weight_decay": _NOT_NEGATIVE,
    "alpha_weight_decay": _NOT_NEGATIVE,
    "alpha_lr_factor": _NOT_NEGATIVE,
    "milestones": (lambda v: all(0 < f < 1 for f in v) and list(v) == sorted(v), "ascending fractions between 0 and 1"),
    "lr_decay": (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    "decay_share": (lambda v: 0 < v <= 1, "more than 0 and at most 1"),
    "warmup_steps": _NOT_NEGATIVE,
    "label_smoothing": (lambda v: 0 <= v < 1, "at least 0 and less than 1"),
    "gradient_clip": _POSITIVE,
    "loss_scale_interval": _AT_LEAST_1,
    "grad_accumulation": _AT_LEAST_1,
    "threads": (lambda v: 1 <= v <= MAX_THREADS, f"1 to {MAX_THREADS}"),
    "workers": _NOT_NEGATIVE,
    "log_every": _AT_LEAST_1,
    "observe_every": _NOT_NEGATIVE,
    "checkpoint_every": _NOT_NEGATIVE,
    "keep_every": _NOT_NEGATIVE,
    "sample_tokens": _NOT_NEGATIVE,
}
"""Ranges; a field that is None is not tested."""


def validated(config: TrainConfig) -> TrainConfig:
    """`config` with its None filled in where they stand for another field's value.

    Raises:
        UserError: a value out of range, an unknown name, or fields that contradict each other.
    """
    require_types(config)
    _check_choices(config)
    for field, (test, words) in RULES.items():
        value = getattr(config, field)
        if value is not None and not test(value):
            raise UserError(f"{field} is {_shown(value)}, but must be {words}.")
    if config.nesterov and (config.optimizer != "sgd" or config.momentum == 0):
        raise UserError("nesterov needs optimizer sgd and a momentum above 0: set them, or leave nesterov out.")
    for name in config.log_to:
        if name not in TRACKERS:
            raise unknown("tracker", name, TRACKERS)
    _check_names(config)
    _check_device(config.device)
    return dataclasses.replace(
        config,
        sequence_length=_sequence_length(config),
        eval_batch_size=config.eval_batch_size or _eval_batch_size(config),
        lr=DEFAULT_LR[config.optimizer] if config.lr is None else config.lr,
        alpha_weight_decay=config.weight_decay if config.alpha_weight_decay is None else config.alpha_weight_decay,
        out=config.out or default_out(config),
    )


def validated_comparison(config: CompareConfig) -> list[TrainConfig]:
    """The runs of a comparison, each validated, one seed after the other.

    Raises:
        UserError: as `validated`; no recipe or seed; one that is listed twice; a recipe that does not fit the model.
    """
    require_types(config)
    for field, names in (("recipes", tuple(map(label_of, config.recipes))), ("seeds", config.seeds)):
        if not names:
            raise UserError(f"{field} is empty: name at least one, several separated by commas.")
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{field} has {name} twice: name each once.")
    runs = [validated(run) for run in config.runs()]
    _check_recipes_fit(config)
    return runs


def _eval_batch_size(config: TrainConfig) -> int:
    from fourbit import models

    return max(config.batch_size, MIN_EVAL_BATCH_SIZE if models.kind_of(config.model) == "image" else 0)


def _sequence_length(config: TrainConfig) -> int:
    from fourbit import models

    context, length = models.context_of(config.model), config.sequence_length
    if context is not None and length is not None and length > context:
        name, _, _ = config.model.partition("?")
        raise UserError(
            f"sequence_length is {length}, but {config.model} reads {context} tokens: give fewer, or a larger context, as in "
            f"{name}?context={length}."
        )
    return length or context or DEFAULT_LENGTH


def _check_choices(config: Settings) -> None:
    for field, hint in hints_of(type(config)).items():
        if typing.get_origin(hint) is Literal and getattr(config, field) not in typing.get_args(hint):
            raise unknown(field, getattr(config, field), typing.get_args(hint))


def _check_names(config: TrainConfig) -> None:
    from fourbit import data, models, recipes

    catalogues: tuple[tuple[str, str, Iterable[str]], ...] = (("data set", config.data, data.names()),)
    models.kind_of(config.model)
    recipes.get(config.recipe)
    for field in ("only", "skip"):
        recipes.require_choice(field, getattr(config, field))
    if config.data not in data.names() and os.path.exists(config.data):
        raise UserError(
            f"data is {config.data}, a place where files are, but must say what they hold: --data text --data-dir "
            f"{config.data}, or images, speech or translation."
        )
    for kind, name, names in catalogues:
        if name not in names and not (kind == "data set" and data.is_hub(name)):
            raise unknown(kind, name, names)


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch finds no GPU: use device cpu, or install a build of torch for it.")


def _check_recipes_fit(config: CompareConfig) -> None:
    """Find a recipe that does not fit the model now, and not after the runs before it."""
    import torch

    from fourbit import models, recipes

    place = (
        nullcontext() if ":" in config.model else torch.device("meta")
    )  # other libraries' are tried as they are built
    with place:
        model = models.build(config.model, num_classes=10)
    for recipe in config.recipes:
        recipes.explain(model, recipe, only=config.only, skip=config.skip)


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def default_out(config: TrainConfig) -> Path:
    """The folder of a run that names none."""
    model, data = (re.sub(r"[^\w.-]+", "_", name) for name in (config.model, config.data))
    return Path("runs") / f"{model}-{data}-{label_of(config.recipe)}-seed{config.seed}"
