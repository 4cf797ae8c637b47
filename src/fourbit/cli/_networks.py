"""Commands that look at a network without training it: explain, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fourbit.cli._app import app
from fourbit.cli._terminal import say
from fourbit.errors import UserError
from fourbit.train._config import WHOLE

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


@app.command
def explain(
    *,
    model: str = "resnet20",
    recipe: str = "ibm2020",
    input: str | None = None,
    classes: Annotated[int | None, WHOLE] = None,
    only: str | None = None,
    skip: str | None = None,
    kernels: bool = False,
) -> None:
    """Show what a recipe does to each layer of a network, and the share of the work in each precision.

    Args:
        model: Network; `fourbit models` lists them.
        recipe: Recipe; `fourbit recipes` lists them.
        input: Channels, height and width of an image (None: 3x32x32, for ImageNet 3x224x224), tokens of a row of text
            (None: 35, or the context of gpt), frames and features of an utterance (None: 50x40), or tokens of source and target
            (None: 20x20). Networks of transformers that are for none of these (hf:whisper, hf:deberta) are shown with the
            inputs that they are made for.
        classes: Number of classes (None: 10), or of the vocabulary's tokens (None: 10000).
        only: Quantize only layers whose dotted name contains a match of this regular expression, as in `fourbit train`.
        skip: Keep layers whose dotted name contains a match in full precision.
        kernels: Show also which operations of each layer run in a kernel in a training step, and why the others do not.
    """
    from fourbit.recipes import explain as explain_recipe
    from fourbit.recipes._explanation import kernel_lines

    network, batch = _build_to_look_at(model, input, classes)
    found = explain_recipe(network, recipe, batch, only=only, skip=skip)
    say("\n".join([str(found), "", *kernel_lines(found)] if kernels else [str(found)]))


@app.command
def memory(
    *,
    model: str = "resnet20",
    recipe: str = "ibm2020",
    input: str | None = None,
    batch_size: Annotated[int, WHOLE] = 128,
    classes: Annotated[int | None, WHOLE] = None,
) -> None:
    """Show what each layer of a network keeps for its backward pass, against FP32 and bf16.

    Args:
        model: Network; `fourbit models` lists them.
        recipe: Recipe; `fourbit recipes` lists them.
        input: Channels, height and width of an image (None: 3x32x32, for ImageNet 3x224x224), tokens of a row of text
            (None: 35, or the context of gpt), frames and features of an utterance (None: 50x40), or tokens of source and target
            (None: 20x20).
        batch_size: Images, or rows of text, per step.
        classes: Number of classes (None: 10), or of the vocabulary's tokens (None: 10000).
    """
    from fourbit.recipes import convert, memory_report
    from fourbit.recipes._memory import format_bytes

    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, but must be at least 1.")
    network, batch = build_network(model, input, classes, batch_size)
    before = memory_report(network, batch).total
    report = memory_report(convert(network, recipe), batch)
    say(f"{report}\nby the same network in FP32: {format_bytes(before)}; now {report.total / before:.3f}x of it")


def _build_to_look_at(model: str, input: str | None, classes: int | None) -> tuple[Module, Any]:
    """As `build_network`; and any network of transformers, with None for its `dummy_inputs`."""
    from fourbit.models import build_hf_untouched

    try:
        return build_network(model, input, classes, 1)
    except UserError:
        library, _, rest = model.partition(":")
        if library != "hf" or input is not None or classes is not None:
            raise
        return build_hf_untouched(rest), None


def build_network(
    model: str, input: str | None, classes: int | None, batch_size: int
) -> tuple[Module, Tensor | tuple[int, ...] | tuple[Tensor, ...]]:
    """The network for such inputs, and a batch of them or its shape."""
    import torch

    from fourbit.models import MIN_IMAGE_SIZE, build, context_of, kind_of, min_image_size

    kind = kind_of(model)
    image = "3x224x224" if min_image_size(model) > MIN_IMAGE_SIZE else "3x32x32"
    defaults = {"image": image, "text": str(context_of(model) or 35), "speech": "50x40", "translation": "20x20"}
    sizes = defaults[kind] if input is None else input.lower()
    parts = sizes.split("x")
    numbers = [int(part) for part in parts if part.isdigit() and int(part) > 0]
    if kind == "text":
        if len(parts) != 1 or not numbers:
            raise UserError(f"input is {input!r}, but {model} reads text: give the tokens of a row, such as 35.")
        network = build(model, num_classes=10_000 if classes is None else classes)
        return network, torch.zeros(numbers[0], batch_size, dtype=torch.int64)
    if kind == "translation":
        if len(parts) != 2 or len(numbers) != 2:
            raise UserError(
                f"input is {input!r}, but {model} translates: give tokens of source and target, such as 20x20."
            )
        network = build(model, num_classes=10_000 if classes is None else classes)
        return network, tuple(torch.ones(length, batch_size, dtype=torch.int64) for length in numbers)
    if kind == "speech":
        if len(parts) != 2 or len(numbers) != 2:
            raise UserError(f"input is {input!r}, but {model} reads speech: give frames and features, such as 50x40.")
        network = build(model, num_classes=10 if classes is None else classes, in_channels=numbers[1])
        return network, (numbers[0], batch_size, numbers[1])
    if len(parts) != 3 or len(numbers) != 3 or numbers[1] != numbers[2]:
        raise UserError(f"input is {input!r}, but must be channels, height and width of a square image: 3x32x32.")
    channels, size = numbers[:2]
    network = build(model, num_classes=10 if classes is None else classes, in_channels=channels, image_size=size)
    return network, (batch_size, channels, size, size)
