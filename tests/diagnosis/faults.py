"""Runs with a fault put in on purpose: what is changed about a run that would learn well."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fourbit import formats, recipes
from fourbit import nn as fnn
from fourbit.errors import NonFiniteError
from fourbit.nn import quantized_layers
from fourbit.ops import REUSE
from fourbit.quantizers import Amax, FixedScale, GradScale
from fourbit.recipes import Recipe
from fourbit.train import TrainConfig, train
from fourbit.train._loop import Loop
from fourbit.train._session import Session

DIGITS = {"model": "digits_cnn", "data": "digits", "lr": 0.05, "batch_size": 32, "max_steps": 33, "epochs": 1}
GPT = {"model": "gpt?width=32&depth=2&heads=2&context=32&hidden=64&tied=false", "data": "text", "optimizer": "adamw"}
GPT |= {"lr": 3e-3, "batch_size": 8, "max_steps": 33, "epochs": 1}
RECORDS = {"log_every": 1, "observe_every": 3, "log_to": (), "progress": False, "checkpoint_every": 0}
RECORDS |= {"max_test_batches": 1, "sample_tokens": 0, "device": "cpu", "threads": 1}

LAYER = "features.4.0"
"""The layer in which faults are put, in the middle of the network."""

OnStep = Callable[[Session, int], None]


@dataclass(frozen=True)
class Fault:
    """`kind` is what the diagnosis is to call it; `settings` are the run's, `recipe` changes the one that it names, `on_step`
    is called before every step, `patches` are put in for the run, `where` is a layer that must be named."""

    kind: str
    what: str
    settings: dict[str, Any] = field(default_factory=dict)
    recipe: Callable[[Recipe], Recipe] | None = None
    on_step: OnStep | None = None
    patches: tuple[tuple[Any, str, Any], ...] = ()
    where: str = ""


def every_slot(*slots: str, **changes: Any) -> Callable[[Recipe], Recipe]:
    """A recipe whose rules with these operands in 4 bits have them changed."""

    def change(recipe: Recipe) -> Recipe:
        def of(rule: recipes.Rule) -> recipes.Rule:
            spec = rule.spec
            own = {slot: getattr(spec, slot, None) for slot in slots}
            if spec is None or any(s in (None, REUSE) or len(s.format.grid) > 16 for s in own.values()):
                return rule
            faulty = {slot: dataclasses.replace(s, **changes) for slot, s in own.items()}
            return dataclasses.replace(rule, spec=dataclasses.replace(spec, **faulty))

        return dataclasses.replace(recipe, name="faulty", rules=tuple(map(of, recipe.rules)))

    return change


def layer_of(session: Session, name: str = LAYER) -> Any:
    return quantized_layers(session.bare)[name]


def norm_behind(session: Session) -> nn.Module:
    return session.bare.get_submodule(LAYER.rpartition(".")[0] + ".1")


def freeze_scale_far_off(session: Session, step: int) -> None:
    if step == 3:
        for layer in quantized_layers(session.bare).values():
            layer.quant.g_exponent.sub_(7)


def shake_scale(session: Session, step: int) -> None:
    for layer in quantized_layers(session.bare).values():
        if step:
            layer.quant.g_exponent.add_(4 if step % 4 < 2 else -4)


def shrink_clip_value(session: Session, step: int) -> None:
    if step >= 4:
        with torch.no_grad():
            layer_of(session).quant.x_alpha.mul_(0.7)


def kill_layer(session: Session, step: int) -> None:
    if step >= 6:
        with torch.no_grad():
            norm_behind(session).weight.zero_()  # type: ignore[union-attr,operator]
            norm_behind(session).bias.fill_(-1.0)  # type: ignore[union-attr,operator]


def blow_up_weight(session: Session, step: int) -> None:
    with torch.no_grad():
        layer_of(session).weight.mul_(1.4)


def rock_weights(session: Session, step: int) -> None:
    """A third of the weights lies now on this, now on that side of a threshold."""
    layer = layer_of(session)
    with torch.no_grad():
        scale = float(fnn.nearest_weight(layer, layer.weight).abs().unique()[1])
        place = (layer.weight / scale).flatten()
        place[::3] = 1.5 + (0.03 if step // 3 % 2 else -0.03)
        layer.weight.copy_((place * scale).view_as(layer.weight))


def poison(session: Session, step: int) -> None:
    """The loss of every fourth step is NaN."""
    task = session.task
    if not hasattr(task, "sound_loss"):
        task.sound_loss = task.loss  # type: ignore[attr-defined]

    def loss(*given: Any) -> tuple[Tensor, Tensor]:
        value, counts = task.sound_loss(*given)  # type: ignore[attr-defined]
        return value * (float("nan") if step % 4 == 3 else 1.0), counts

    task.loss = loss  # type: ignore[method-assign]


def shrink_loss_scale(session: Session, step: int) -> None:
    assert session.scaler is not None
    session.scaler._undecided = False
    session.scaler.value = 2.0**-6


FAULTS = (
    Fault("not-finite", "a learning rate of 1e8", {"lr": 1e8}),
    Fault("steps-left-out", "NaN in every fourth loss, left out", {"on_nonfinite": "skip"}, on_step=poison),
    Fault("learns-nothing", "a learning rate of 1e-8", {"lr": 1e-8}),
    Fault("rate-too-high", "a learning rate of 10, two hundred times too high", {"lr": 10.0}),
    Fault(
        "scale-stuck",
        "gradient scales that stand still, 2^7 too low",
        on_step=freeze_scale_far_off,
        patches=((GradScale, "step", lambda self, exponent, votes: exponent),),
    ),
    Fault("scale-flips", "gradient scales shaken by 2^8", on_step=shake_scale),
    Fault("underflow", "a loss scale of 2^-6", {"recipe": "ibm2020-radix2-global-scale"}, on_step=shrink_loss_scale),
    Fault("saturation", "weights scaled to a quarter", recipe=every_slot("w_fprop", scaling=FixedScale(0.005))),
    Fault(
        "clip-collapse",
        "a clip value that loses 0.3 of itself in every step",
        on_step=shrink_clip_value,
        where=LAYER,
    ),
    Fault(
        "signal-lost", "activations on a grid with steps of 20", recipe=every_slot("x_fprop", scaling=FixedScale(20.0))
    ),
    Fault(
        "dead-layer", "a batch normalization closed for good after six steps", on_step=kill_layer, where="features.6.0"
    ),
    Fault(
        "gradient-shrinks",
        "gradients scaled up to 512, where the format ends at 64",
        recipe=every_slot("g_dgrad", "g_wgrad", scaling=GradScale(max=512.0)),
    ),
    Fault("gradient-shrinks-with-depth", "thirty layers", {"model": "deep", "max_steps": 10}),
    Fault(
        "sums-broken",
        "gradients in a format without negative numbers",
        recipe=every_slot("g_wgrad", format=formats.UINT4, scaling=Amax()),
    ),
    Fault(
        "statistics-run-away",
        "a weight before batch normalization grows by 1.4 in each step",
        on_step=blow_up_weight,
        where="features.4.1",
    ),
    Fault(
        "oscillating-weights", "a third of a layer's weights rocked over a threshold", on_step=rock_weights, where=LAYER
    ),
    Fault(
        "loss-scale-unsettled",
        "a loss scale that doubles after each step",
        {"recipe": "ibm2020-global-scale", "loss_scale_interval": 1},
    ),
)

DEEP = '''
from torch import nn

def deep(num_classes, in_channels):
    """Thirty layers in a row."""
    layers = [nn.Conv2d(in_channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for _ in range(30):
        layers += [nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 64, num_classes))
'''

HEALTHY = (
    *(
        DIGITS | {"recipe": r}
        for r in ("ibm2020", "ibm2020-luq", "int4-fwd", "ibm2020-dw8", "luq", "nvfp4", "mxfp4-ceil")
    ),
    *(DIGITS | {"recipe": "ibm2020", "seed": s} for s in (1, 2)),
    *(GPT | {"recipe": r} for r in ("ibm2020", "nvfp4", "ibm2020-luq", "quartet")),
)


def write_text(folder: Path) -> Path:
    """A text of few words."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, words = (
        random.Random(0),
        [
            "the",
            "cat",
            "sat",
            "on",
            "a",
            "mat",
            "and",
            "saw",
            "one",
            "red",
            "bird",
            "fly",
            "over",
            "its",
            "old",
            "tree",
        ],
    )
    for name, count in (("train", 6000), ("test", 600)):
        (folder / f"{name}.txt").write_text(" ".join(drawn.choice(words) for _ in range(count)))
    return folder


@contextmanager
def put_in(fault: Fault) -> Iterator[None]:
    """The fault is there while the block runs."""
    step = Loop._step

    def with_fault(self: Loop, *args: Any) -> None:
        if fault.on_step is not None:
            fault.on_step(self.session, self.state.step)
        step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", with_fault)
        for target, name, value in fault.patches:
            patch.setattr(target, name, value)
        yield


def run_with(fault: Fault, folder: Path) -> Path:
    """Trains; returns the folder of the run."""
    settings: dict[str, Any] = {**DIGITS, "recipe": "ibm2020", **RECORDS, **fault.settings, "out": folder / "run"}
    folder.mkdir(parents=True, exist_ok=True)
    if settings["model"] == "deep":
        (folder / "deep.py").write_text(DEEP)
        settings["model"] = f"{folder / 'deep.py'}:deep"
    if fault.recipe is not None:
        settings["recipe"] = str(folder / "faulty.toml")
        recipes.write_recipe(fault.recipe(recipes.get("ibm2020")), folder / "faulty.toml")
    with put_in(fault), suppress(NonFiniteError):
        train(TrainConfig(**settings))
    return folder / "run"


def run_healthy(settings: dict[str, Any], folder: Path, text: Path) -> Path:
    """Trains without a fault."""
    where = {"data_dir": text} if settings["data"] == "text" else {}
    train(TrainConfig(**{**settings, **RECORDS, **where, "out": folder}))
    return folder
