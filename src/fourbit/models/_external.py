"""Networks of other libraries by name, newly initialised:

    hf:gpt2                          a model type of Hugging Face transformers, with the defaults of its configuration
    hf:gpt2?n_layer=2&n_embd=128     with other values in it
    hf:path/to/folder                the configuration in a folder (config.json)
    hf:openai-community/gpt2         the configuration of a model of the hub
    timm:convnext_tiny               a network of timm
    torchvision:resnet18             a network of torchvision

What a transformers model reads follows from its configuration: text, if there is a causal language model of the type,
else images, if there is a classifier. The libraries are not needed for anything else.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn

from fourbit.errors import UserError, unknown

Kind = Literal["text", "image"]
HUB_TIMEOUT_S = 10


def is_external(name: str) -> bool:
    """Whether a name has one of the prefixes."""
    return name.partition(":")[0] in BUILDERS and ":" in name


def external_kind(name: str) -> Kind:
    """What the network reads. Raises UserError as `build_external`, as far as it can be known without building."""
    library, _, rest = name.partition(":")
    if library != "hf":
        _import(library)
        return "image"
    return _hf_kind(_hf_config(rest), rest)


def build_external(name: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """A network with so many classes (text: tokens).

    Raises:
        UserError: the library is missing, it has no such network, or the network cannot take such inputs.
    """
    library, _, rest = name.partition(":")
    return BUILDERS[library](rest, num_classes, in_channels, image_size)


class HfLanguageModel(nn.Module):
    """A causal language model of transformers with the interface of ours: tokens [T, B] -> logits [T, B, num_tokens] and a
    state, which is empty: every window is read anew."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        # some models number and mask by what is not padding, which here are all tokens
        self._takes = inspect.signature(model.forward).parameters

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Raises UserError for more tokens than the model has positions."""
        config: Any = self.model.config
        longest = getattr(config, "max_position_embeddings", None)
        if isinstance(longest, int) and 0 < longest < len(tokens):
            raise UserError(
                f"a row of {len(tokens)} tokens is longer than the {longest} positions of {config.model_type}: set a smaller "
                "sequence_length."
            )
        ids = tokens.t()
        given = {}
        if "position_ids" in self._takes:
            given["position_ids"] = torch.arange(len(tokens), device=ids.device).expand_as(ids)
        if "lengths" in self._takes:
            given["lengths"] = ids.new_full((len(ids),), len(tokens))
        return self.model(input_ids=ids, use_cache=False, **given).logits.transpose(0, 1), ()


class HfImageClassifier(nn.Module):
    """An image classifier of transformers: images [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.model(pixel_values=images).logits


def _import(library: str) -> Any:
    package = "transformers" if library == "hf" else library
    try:
        return importlib.import_module(package)
    except Exception as error:  # a build that does not fit torch raises all sorts of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{library}: names need the package {package}, which cannot be imported ({reason}): pip install {package}."
        ) from error


@lru_cache(maxsize=16)
def _hf_config(rest: str) -> Any:
    transformers = _import("hf")
    name, _, query = rest.partition("?")
    changes = {key: _value(value) for key, value in parse_qsl(query, keep_blank_values=True)}
    if not name:
        raise UserError(
            "hf: needs the name of a model, as in hf:gpt2, a folder with config.json, or a model of the hub."
        )
    try:
        if Path(name).expanduser().exists():
            config = transformers.AutoConfig.from_pretrained(str(Path(name).expanduser()), **changes)
        elif name in transformers.CONFIG_MAPPING:
            config = transformers.AutoConfig.for_model(name, **changes)
        else:
            config = _from_hub(name, changes)
    except Exception as error:  # network, JSON and validation errors of three packages
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"hf:{rest} has no configuration that can be read ({reason}): give a model type such as gpt2, a folder with "
            "config.json, or a model of the hub."
        ) from error
    known = type(config)()
    for key in changes:
        if not hasattr(known, key):
            raise unknown(f"value in the configuration of {config.model_type}", key, sorted(known.to_dict()))
    return config


def _from_hub(name: str, changes: dict[str, Any]) -> Any:
    """From the hub's cache, else from the hub, which is asked once: transformers would try for half a minute."""
    auto = _import("hf").AutoConfig
    try:
        return auto.from_pretrained(name, local_files_only=True, **changes)
    except Exception:
        from huggingface_hub import HfApi

        HfApi().model_info(name, timeout=HUB_TIMEOUT_S)
        return auto.from_pretrained(name, **changes)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _hf_kind(config: Any, rest: str) -> Kind:
    transformers = _import("hf")
    if type(config) in transformers.AutoModelForCausalLM._model_mapping:
        return "text"
    if type(config) in transformers.AutoModelForImageClassification._model_mapping:
        return "image"
    raise UserError(
        f"hf:{rest} ({config.model_type}) is neither a causal language model nor an image classifier: choose a type that is."
    )


def _build_hf(rest: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    import copy

    transformers = _import("hf")
    config = copy.deepcopy(_hf_config(rest))
    text = _hf_kind(config, rest) == "text"
    if text:
        config.vocab_size = num_classes
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"):
            number = getattr(config, key, None)
            if isinstance(number, int) and number >= num_classes:
                setattr(config, key, None)
        if type(config) in transformers.AutoModelForMaskedLM._model_mapping:
            config.is_decoder = True  # it would see the words that it is to predict
        if hasattr(config, "causal"):  # the same in XLM's words, and in XLNet's
            config.causal = True
        if hasattr(config, "attn_type"):
            config.attn_type = "uni"
    else:
        config.num_labels = num_classes
        patch = getattr(config, "patch_size", None)
        if isinstance(patch, int) and image_size is not None and image_size < patch:
            raise UserError(
                f"hf:{rest} cuts images into patches of {patch}x{patch} pixels, but these have {image_size}x{image_size}: "
                f"set a smaller patch, as in hf:{rest.partition('?')[0]}?patch_size={max(1, image_size // 8)}."
            )
        for key, value in (("num_channels", in_channels), ("image_size", image_size)):
            if value is not None and hasattr(config, key):
                setattr(config, key, value)
    auto = transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageClassification
    try:
        model = auto.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever the model's code meets in a configuration that does not fit
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"hf:{rest} cannot be built ({reason}): change its configuration.") from error
    if not text:
        return HfImageClassifier(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            row, module.padding_idx = module.padding_idx, None  # its number is that of an ordinary token here
            with torch.no_grad():
                module.weight[row].normal_(0.0, float(module.weight.std()))
    found = HfLanguageModel(model)
    _require_causal(found, rest, num_classes)
    return found


def _require_causal(model: HfLanguageModel, rest: str, num_tokens: int) -> None:
    """UserError if the prediction for one token depends on the next."""
    training = model.training
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    tokens[2, 1] = num_tokens - 1
    try:
        with torch.no_grad():
            logits, _ = model.eval()(tokens)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"hf:{rest} cannot read text as rows of tokens ({reason}): choose another model.") from error
    model.train(training)
    if num_tokens > 1 and not torch.allclose(logits[:2, 0], logits[:2, 1], rtol=1e-3, atol=1e-5):
        raise UserError(f"hf:{rest} sees the tokens that it is to predict: choose a causal language model.")


def _build_timm(rest: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    timm = _import("timm")
    try:
        return timm.create_model(rest, num_classes=num_classes, in_chans=in_channels)
    except Exception as error:
        raise UserError(f"timm cannot build {rest} ({error}): timm.list_models() has the names.") from error


def _build_torchvision(rest: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    torchvision = _import("torchvision")
    if in_channels != 3:
        raise UserError(f"torchvision:{rest} takes images of 3 channels, not {in_channels}: choose another network.")
    try:
        return torchvision.models.get_model(rest, weights=None, num_classes=num_classes)
    except Exception as error:
        raise UserError(
            f"torchvision cannot build {rest} ({error}): torchvision.models.list_models() has the names."
        ) from error


BUILDERS: dict[str, Callable[[str, int, int, int | None], nn.Module]] = {
    "hf": _build_hf,
    "timm": _build_timm,
    "torchvision": _build_torchvision,
}
