"""Networks of other libraries by name, newly initialised:

    hf:gpt2                          a model type of Hugging Face transformers, with the defaults of its configuration
    hf:gpt2?n_layer=2&n_embd=128     with other values in it
    hf:path/to/folder                the configuration in a folder (config.json)
    hf:openai-community/gpt2         the configuration of a model of the hub
    timm:convnext_tiny               a network of timm
    torchvision:resnet18             a network of torchvision

What a transformers model reads follows from its configuration: pairs of sentences, if it is an encoder-decoder (with
?is_encoder_decoder=false its decoder alone); else text, if there is a causal language model of the type; else images, if
there is a classifier; else text, if words that are masked can be predicted, with attention that sees no later token. The
libraries are not needed for anything else.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.models._hf import Kind, build_hf, hf_builder, hf_config
from fourbit.models._libraries import import_library, reason, tried


def is_external(name: str) -> bool:
    """Whether a name has one of the prefixes."""
    return name.partition(":")[0] in BUILDERS and ":" in name


def external_kind(name: str) -> Kind:
    """What the network reads. Raises UserError as `build_external`, as far as it can be known without building."""
    library, _, rest = name.partition(":")
    if library != "hf":
        import_library(library)
        return "image"
    return hf_builder(hf_config(rest), rest)[0]


def build_external(name: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """A network with so many classes (text: tokens).

    Raises:
        UserError: the library is missing, it has no such network, or the network cannot take such inputs.
    """
    library, _, rest = name.partition(":")
    model = BUILDERS[library](rest, num_classes, in_channels, image_size)
    if image_size is not None and external_kind(name) == "image":
        require_logits(model, name, num_classes, (2, in_channels, image_size, image_size))
    return model


def _with_options(build: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """`build` with those of the options that it takes."""
    try:
        return build(**options)
    except TypeError as error:
        refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in options:
            raise
        return _with_options(build, **{key: value for key, value in options.items() if key != refused[1]})


def _build_timm(rest: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    timm = import_library("timm")
    build = partial(timm.create_model, rest, num_classes=num_classes, in_chans=in_channels)
    try:
        return build() if image_size is None else _with_options(build, img_size=image_size)
    except Exception as error:
        raise UserError(f"timm cannot build {rest} ({reason(error)}): choose another of timm.list_models().") from error


def _build_torchvision(rest: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    torchvision = import_library("torchvision")
    if in_channels != 3:
        raise UserError(f"torchvision:{rest} takes images of 3 channels, not {in_channels}: choose another network.")
    build = partial(torchvision.models.get_model, rest, weights=None, num_classes=num_classes)
    options: dict[str, Any] = {"weights_backbone": None, "aux_logits": False}  # no download, logits alone in training
    if image_size is not None:
        options["image_size"] = image_size
    try:
        return _with_options(build, **options)
    except Exception as error:
        raise UserError(
            f"torchvision cannot build {rest} ({reason(error)}): choose another of torchvision.models.list_models()."
        ) from error


def require_logits(model: nn.Module, name: str, num_classes: int, shape: tuple[int, ...]) -> None:
    """UserError unless the network makes images of that shape into logits."""
    try:
        found = tried(model, lambda: model(torch.zeros(shape)))
    except Exception as error:
        size = "x".join(map(str, shape[1:]))
        raise UserError(f"{name} cannot read images of {size} ({reason(error)}): choose another network.") from error
    if not isinstance(found, Tensor) or found.shape != (shape[0], num_classes):
        what = f"a tensor {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"{name} gives {what} for {shape[0]} images, but logits [{shape[0]}, {num_classes}] are needed: choose a "
            "network that classifies images."
        )


BUILDERS: dict[str, Callable[[str, int, int, int | None], nn.Module]] = {
    "hf": build_hf,
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}
