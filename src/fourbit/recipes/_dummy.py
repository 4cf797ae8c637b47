"""Arguments for a model that nobody has given data for, made from what transformers' models say of themselves."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_BATCH, _SAMPLES, _FRAMES, _SIDE = 2, 16_000, 100, 224
"""Examples; samples, frames and pixels, where a configuration does not say."""


def dummy_batch(model: nn.Module) -> dict[str, Any] | None:
    """The model's `dummy_inputs`; None if it has none.

    Those of transformers are tokens, whatever a model reads. For images, sound and features there are random numbers of the
    sizes in its `config` instead; an encoder-decoder gets tokens for its decoder too, and a model of images and text both.
    """
    found: Any = getattr(model, "dummy_inputs", None)
    if not isinstance(found, Mapping) or not found:
        return None
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    takes = inspect.signature(model.forward).parameters
    both = hasattr(config, "vision_config") and {"input_ids", "pixel_values"} <= set(takes)
    batch: dict[str, Any] = dict(found) if both or main in found or not isinstance(main, str) else {}
    for name in ("pixel_values",) if both else (main,):
        if isinstance(name, str) and name not in batch:
            shape = _shape(name, config)
            rows = len(batch["input_ids"]) if "input_ids" in batch else _BATCH
            batch[name] = torch.randn((rows, *shape), generator=torch.Generator().manual_seed(0))
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes:
        batch.setdefault("decoder_input_ids", batch.get("input_ids", torch.ones(_BATCH, 4, dtype=torch.int64)))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return {name: _like(value, parameter) for name, value in batch.items()}


def _like(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)


def _shape(name: str, config: Any) -> tuple[int, ...]:
    """Of one example."""
    config = getattr(config, "vision_config", config) if name == "pixel_values" else config

    def number(key: str, default: int) -> int:
        value = getattr(config, key, None)
        return value if isinstance(value, int) else default

    if name == "pixel_values":
        size = getattr(config, "image_size", None) or _SIDE
        frames = (number("num_frames", 1),) if hasattr(config, "num_frames") else ()
        return *frames, number("num_channels", 3), *((size, size) if isinstance(size, int) else size)
    if hasattr(config, "input_feat_per_channel"):
        return _FRAMES, number("input_feat_per_channel", 80)
    if not hasattr(config, "num_mel_bins"):
        return *((number("audio_channels", 1),) if hasattr(config, "audio_channels") else ()), _SAMPLES
    bins = number("num_mel_bins", 80)
    if name == "input_features":  # two frames are one position
        return bins, 2 * number("max_source_positions", _FRAMES // 2)
    return number("max_length", _FRAMES), bins
