"""What the quantized layers report, as the lines "layers" and "histograms" of metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn import quantized_layers
from fourbit.nn._observe import Observation
from fourbit.quantizers import UNSET


def layer_lines(model: nn.Module, observation: Observation) -> dict[str, dict[str, Any]]:
    """{layer: {"g_exponent", "x_alpha", "slots": {slot: statistics}}} of every quantized layer."""
    slots = observation.as_dict()
    return {
        name: {
            "g_exponent": _exponent(layer.quant.g_exponent),
            "x_alpha": None if layer.quant.x_alpha is None else float(layer.quant.x_alpha),
            "slots": slots.get(name, {}),
        }
        for name, layer in quantized_layers(model).items()
    }


def exponents(model: nn.Module) -> dict[str, int]:
    """GradScale's exponent of every layer that has one and has seen a gradient."""
    found = {name: _exponent(layer.quant.g_exponent) for name, layer in quantized_layers(model).items()}
    return {name: value for name, value in found.items() if value is not None}


def _exponent(stored: Tensor | None) -> int | None:
    """One number for the layer: the median over channels where they have scales of their own; None if still unset."""
    if stored is None:
        return None
    known = stored[stored != UNSET]
    return int(torch.median(known)) if known.numel() else None
