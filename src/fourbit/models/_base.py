"""The catalogue of networks: a name, and a function that builds it.

A builder takes the number of classes and of input channels and returns a module that maps images [B, C, H, W] to logits
[B, num_classes]. Registering it is all there is to adding a model:

    @register("my_net")
    def my_net(num_classes: int, in_channels: int) -> nn.Module: ...

Keyword parameters of a builder are options of the name, as in my_net?depth=3.
"""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import parse_qsl

from torch import nn

from fourbit._registry import Registry
from fourbit.errors import UserError, unknown
from fourbit.models._external import build_external, external_kind, is_external, require_logits
from fourbit.models._own import build_own, is_own, own_kind

Builder = Callable[..., nn.Module]
Kind = Literal["image", "text", "speech", "translation"]
"""What a network reads: images [B, C, H, W] of floats; text [T, B] of token numbers, with the state before it; speech,
frames of features [T, B, C] with the number of frames of each utterance [B]; or translation, token numbers of source [S, B]
and target [T, B]."""

MODELS: Registry[Builder] = Registry("model")
_kinds: dict[str, Kind] = {}
_min_sizes: dict[str, int] = {}


# The networks for small images halve the image three times (VGG five times, but its pools round up), which takes 8 pixels to 1.
MIN_IMAGE_SIZE = 8


def register(name: str, kind: Kind = "image", min_size: int = MIN_IMAGE_SIZE) -> Callable[[Builder], Builder]:
    """Decorator that enters a builder, called with the number of classes (text, translation: of tokens) and of input channels
    (speech: of features; text, translation: 0). `min_size`: pixels of the smallest image."""

    def enter(builder: Builder) -> Builder:
        _kinds[name], _min_sizes[name] = kind, min_size
        return MODELS.register(name)(builder)

    return enter


def names(kind: Kind | None = None) -> list[str]:
    """Names that `build` knows, of one kind or all.

    >>> "resnet20" in names(), names("text")
    (True, ['gpt', 'lstm_200', 'lstm_650'])
    """
    return [name for name in MODELS if kind in (None, _kinds[name])]


def kind_of(name: str) -> Kind:
    """What the network reads; UserError for an unknown name or option."""
    if is_own(name):
        return own_kind(name)
    if is_external(name):
        return external_kind(name)
    return _kinds[_parsed(name)[0]]


def context_of(name: str) -> int | None:
    """Tokens of the longest row that a network of ours for text reads; None: of any length, or another network.

    >>> context_of("gpt?context=64"), context_of("lstm_200")
    (64, None)
    """
    if is_own(name) or is_external(name):
        return None
    base, options = _parsed(name)
    parameter = inspect.signature(MODELS[base]).parameters.get("context")
    return None if parameter is None else options.get("context", parameter.default)


def is_recurrent(name: str) -> bool:
    """Whether a network for text carries a state from row to row."""
    return kind_of(name) == "text" and not (is_own(name) or is_external(name)) and context_of(name) is None


def _parsed(name: str) -> tuple[str, dict[str, Any]]:
    """The name in the catalogue, and the options behind it. Raises UserError for those that it does not have."""
    base, _, query = name.partition("?")
    builder = MODELS[base]
    known = [p.name for p in inspect.signature(builder).parameters.values() if p.kind is p.KEYWORD_ONLY]
    hints, options = typing.get_type_hints(builder), {}
    for key, text in parse_qsl(query, keep_blank_values=True):
        if not known:
            raise UserError(f"{base} has no options: leave out ?{query}.")
        if key not in known:
            raise unknown(f"option of {base}", key, known)
        options[key] = _value(base, key, text, typing.get_args(hints[key]) or (hints[key],))
    return base, options


def _value(base: str, key: str, text: str, kinds: tuple[type, ...]) -> Any:
    try:
        value = json.loads(text.lower())
    except ValueError:
        value = text
    if type(value) not in kinds:
        must = "true or false" if bool in kinds else "a number" if float in kinds else "a whole number"
        raise UserError(f"{key} of {base} is {text}, but must be {must}.")
    return value


def min_image_size(name: str) -> int:
    """Pixels of the smallest image that a network takes, as far as that is known."""
    return _min_sizes.get(name.partition("?")[0], 1)


def build(name: str, *, num_classes: int, in_channels: int = 3, image_size: int | None = None) -> nn.Module:
    """A newly initialised network in full precision.

    Args:
        name: one of `names()`, with options where the network has some (gpt?width=128&depth=2); a network of another
            library: hf:NAME, timm:NAME, torchvision:NAME (see `_external`); or your own: path/to/file.py:function (see `_own`).
        num_classes: number of logits, 1 or more; of a network for text or translation the size of the vocabulary.
        in_channels: channels of the input: 3 for colour, 1 for grey; of speech the features of a frame.
        image_size: height and width of the images that it will see, to check that it takes them (None: not). The weights of
            our networks do not depend on it.

    Raises:
        UserError: unknown name or option (with the nearest ones), or a number out of range.

    Weights are drawn from torch's global generator: call `torch.manual_seed` first for a repeatable start.

    >>> sum(p.numel() for p in build("resnet20", num_classes=10).parameters())
    269722
    """
    kind = kind_of(name)
    if num_classes < 1:
        raise UserError(f"num_classes is {num_classes}: a model needs at least 1 class.")
    if kind not in ("text", "translation") and in_channels < 1:
        raise UserError(
            f"in_channels is {in_channels}: give 1 for grey or 3 for colour images, of speech the features."
        )
    smallest = min_image_size(name)
    if kind == "image" and image_size is not None and image_size < smallest:
        raise UserError(
            f"image_size is {image_size}, too small for {name}: use images of at least {smallest}x{smallest} pixels."
        )
    if is_own(name):
        network = build_own(name, num_classes, in_channels, image_size)
        if kind == "image" and image_size is not None:
            require_logits(network, name, num_classes, (2, in_channels, image_size, image_size))
        return network
    if is_external(name):
        return build_external(name, num_classes, in_channels, image_size)
    base, options = _parsed(name)
    return MODELS[base](num_classes, 0 if kind in ("text", "translation") else in_channels, **options)


def initialise(model: nn.Module) -> None:
    """He initialisation in place: convolutions N(0, 2/fan_out), BatchNorm weight 1 and bias 0, classifier bias 0.

    fan_out = out_channels * kernel area, the choice of the reference implementation of residual networks (He et al.,
    "Delving deep into rectifiers", arXiv 1502.01852, section 2.2). Classifier weights are left at torch's default,
    U(-1/sqrt(fan_in), 1/sqrt(fan_in)).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


def conv_bn(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution with "same" padding and without bias (BatchNorm's own would cancel it), then BatchNorm."""
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    )
