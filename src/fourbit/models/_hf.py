"""Networks of Hugging Face transformers by model type or configuration, newly initialised, with the interfaces of ours."""

from __future__ import annotations

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
from fourbit.models._libraries import import_library, reason, tried
from fourbit.models._tokens import BEGIN, END, PAD

Kind = Literal["text", "image", "translation"]
HUB_TIMEOUT_S = 10


class HfLanguageModel(nn.Module):
    """A language model of transformers with the interface of ours: tokens [T, B] -> logits [T, B, num_tokens] and a state,
    which is empty: every window is read anew.

    Args:
        model: a causal one, or one that predicts masked words.
        masked: the latter: its attention is told which tokens are later ones.
    """

    def __init__(self, model: nn.Module, masked: bool = False):
        super().__init__()
        self.model, self.masked = model, masked
        # some models number and mask by what is not padding, which here are all tokens
        self._takes = inspect.signature(model.forward).parameters

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Raises UserError for more tokens than the model has positions."""
        config: Any = self.model.config
        longest = _num_positions(config)
        if longest is not None and longest < len(tokens):
            raise UserError(
                f"a row of {len(tokens)} tokens is longer than the {longest} positions of {config.model_type}: set a smaller "
                "sequence_length."
            )
        ids = tokens.t()
        given: dict[str, Any] = {}
        if self.masked:
            dtype = next(self.model.parameters()).dtype
            later = torch.full((len(tokens),) * 2, torch.finfo(dtype).min, dtype=dtype, device=ids.device).triu(1)
            given["attention_mask"] = later.expand(len(ids), 1, -1, -1)
        else:
            given["use_cache"] = False
        if "position_ids" in self._takes:
            given["position_ids"] = torch.arange(len(tokens), device=ids.device).expand_as(ids)
        if "lengths" in self._takes:
            given["lengths"] = ids.new_full((len(ids),), len(tokens))
        return self.model(input_ids=ids, **given).logits.transpose(0, 1), ()


class HfImageClassifier(nn.Module):
    """An image classifier of transformers: images [B, C, H, W] -> logits [B, num_classes]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return self.model(pixel_values=images).logits


class HfTranslator(nn.Module):
    """An encoder-decoder of transformers with the interface of `Transformer`: source [S, B] and target [T, B] with its begin
    mark, padded with the configuration's pad_token_id -> logits [T, B, num_tokens]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model
        self.max_length = _num_positions(model.config)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """See the class."""
        found = self.model(**self._source(source), decoder_input_ids=target.t(), use_cache=False)
        return found.logits.transpose(0, 1)

    @torch.no_grad()
    def translate(self, source: Tensor, beam_size: int = 1, longest: int | None = None) -> Tensor:
        """The best translations by the beam search of transformers, int64 [T, B], padded; without the begin mark.

        Args:
            source: [S, B].
            beam_size: hypotheses per sentence; 1 is greedy.
            longest: tokens that a translation may have; None: 10 more than twice those of the longest source.
        """
        config = self.model.config
        longest = 2 * len(source) + 10 if longest is None else longest
        found = self.model.generate(
            **self._source(source),
            num_beams=beam_size,
            do_sample=False,
            max_new_tokens=longest if self.max_length is None else min(longest, self.max_length - 1),
            suppress_tokens=[config.pad_token_id, config.bos_token_id],
            use_cache=False,
        )
        return found[:, 1:].t()

    def _source(self, source: Tensor) -> dict[str, Tensor]:
        ids = source.t()
        return {"input_ids": ids, "attention_mask": (ids != self.model.config.pad_token_id).long()}


def _num_positions(config: Any) -> int | None:
    """Tokens of the longest row, where the configuration has a limit."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


@lru_cache(maxsize=16)
def hf_config(rest: str) -> Any:
    """The configuration that `rest` names, with its changes. Raises UserError if there is none."""
    transformers = import_library("hf")
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
        raise UserError(
            f"hf:{rest} has no configuration that can be read ({reason(error)}): give a model type such as gpt2, a folder "
            "with config.json, or a model of the hub."
        ) from error
    known = type(config)()
    for key in changes:
        if not hasattr(known, key):
            raise unknown(f"value in the configuration of {config.model_type}", key, sorted(known.to_dict()))
    return config


def _from_hub(name: str, changes: dict[str, Any]) -> Any:
    """From the hub's cache, else from the hub, which is asked once: transformers would try for half a minute."""
    auto = import_library("hf").AutoConfig
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


def hf_builder(config: Any, rest: str) -> tuple[Kind, Any]:
    """What the model reads, and the class of transformers that builds it. Raises UserError if there is none for our tasks."""
    transformers = import_library("hf")
    kinds: list[tuple[Kind, Any]] = [
        ("text", transformers.AutoModelForCausalLM),
        ("image", transformers.AutoModelForImageClassification),
        ("text", transformers.AutoModelForMaskedLM),
    ]
    if getattr(config, "is_encoder_decoder", False):
        kinds[0] = ("translation", transformers.AutoModelForSeq2SeqLM)  # Whisper's decoder alone is not Whisper
    for kind, auto in kinds:
        if type(config) in auto._model_mapping:
            return kind, auto
    raise UserError(
        f"hf:{rest} ({config.model_type}) is no language model (as hf:gpt2 and hf:bert are), encoder-decoder for text "
        "(hf:t5, hf:bart) or image classifier (hf:vit): choose a type that is, or for speech our bilstm_speech."
    )


def build_hf(rest: str, num_classes: int, in_channels: int, image_size: int | None) -> nn.Module:
    """See `fourbit.models._external`."""
    import copy

    transformers = import_library("hf")
    config = copy.deepcopy(hf_config(rest))
    kind, auto = hf_builder(config, rest)
    if kind == "image":
        _adapt_to_images(config, rest, num_classes, in_channels, image_size)
    else:
        _adapt_to_tokens(config, num_classes)
    if kind == "translation":
        config.pad_token_id, config.bos_token_id, config.eos_token_id = PAD, BEGIN, END
        config.decoder_start_token_id, config.forced_bos_token_id, config.forced_eos_token_id = BEGIN, None, None
    elif kind == "text":
        if type(config) in transformers.AutoModelForMaskedLM._model_mapping:
            config.is_decoder = True  # it would see the words that it is to predict
        if hasattr(config, "causal"):  # the same in XLM's words, and in XLNet's
            config.causal = True
        if hasattr(config, "attn_type"):
            config.attn_type = "uni"
    try:
        model = auto.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever the model's code meets in a configuration that does not fit
        raise UserError(f"hf:{rest} cannot be built ({reason(error)}): change its configuration.") from error
    if kind == "image":
        return HfImageClassifier(model)
    if kind == "translation":
        translator = HfTranslator(model)
        _require_causal(lambda tokens: translator(torch.ones_like(tokens), tokens), translator, rest, num_classes)
        return translator
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            row, module.padding_idx = module.padding_idx, None  # its number is that of an ordinary token here
            with torch.no_grad():
                module.weight[row].normal_(0.0, float(module.weight.std()))
    found = HfLanguageModel(model, masked=auto is transformers.AutoModelForMaskedLM)
    _require_causal(lambda tokens: found(tokens)[0], found, rest, num_classes)
    return found


_LOOKED_AT = ("SpeechSeq2Seq", "CTC", "AudioClassification", "Seq2SeqLM", "CausalLM", "MaskedLM", "ImageClassification")
"""Auto classes for `build_hf_untouched`, the first that has the model."""


def build_hf_untouched(rest: str) -> nn.Module:
    """The network as transformers builds it from its configuration: of the class that this names, else of the first of
    `_LOOKED_AT`, else AutoModel. For `explain`, which needs none of our interfaces.

    Raises:
        UserError: as `hf_config`, or it cannot be built.
    """
    transformers = import_library("hf")
    config = hf_config(rest)
    named = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    autos = [getattr(transformers, f"AutoModelFor{what}") for what in _LOOKED_AT]
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), transformers.AutoModel)
    try:
        if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
            return named(config)
        return auto.from_config(config, dtype=torch.float32)
    except Exception as error:  # whatever the model's code meets in a configuration that does not fit
        raise UserError(f"hf:{rest} cannot be built ({reason(error)}): change its configuration.") from error


def _adapt_to_tokens(config: Any, num_tokens: int) -> None:
    """A vocabulary of that size, without the special tokens that lie beyond."""
    config.vocab_size = num_tokens
    if hasattr(config, "decoder_vocab_size"):
        config.decoder_vocab_size = num_tokens
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"):
        number = getattr(config, key, None)
        if isinstance(number, int) and number >= num_tokens:
            setattr(config, key, None)


def _adapt_to_images(config: Any, rest: str, num_classes: int, in_channels: int, image_size: int | None) -> None:
    """Classes, channels and size. Raises UserError for images smaller than a patch."""
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


def _require_causal(read: Callable[[Tensor], Tensor], model: nn.Module, rest: str, num_tokens: int) -> None:
    """UserError unless `read` makes tokens [T, B] into logits [T, B, num_tokens] that do not depend on later tokens."""
    tokens = torch.zeros(3, 2, dtype=torch.int64)
    tokens[2, 1] = num_tokens - 1
    try:
        logits = tried(model, lambda: read(tokens))
        if logits.shape != (3, 2, num_tokens):
            raise ValueError(f"its logits are {list(logits.shape)}, not {[3, 2, num_tokens]}")
    except Exception as error:
        raise UserError(
            f"hf:{rest} cannot read text as rows of tokens ({reason(error)}): choose another model."
        ) from error
    if num_tokens > 1 and not torch.allclose(logits[:2, 0], logits[:2, 1], rtol=1e-3, atol=1e-5):
        raise UserError(
            f"hf:{rest} sees the tokens that it is to predict: choose another model, such as hf:gpt2, or hf:t5 to translate."
        )
