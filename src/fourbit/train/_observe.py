"""What the quantized layers report, as the lines "layers" and "histograms" of metrics.jsonl."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fourbit.nn import Observation, quantized_layers
from fourbit.quantizers import UNSET

MAX_GRID = 256
"""Longest list of grid values in a line: the thousands of a 16-bit format would be all that the file consists of."""


def layer_lines(model: nn.Module, observation: Observation) -> dict[str, dict[str, Any]]:
    """{layer: {"g_exponent", "x_alpha", "slots": {slot: statistics}}} of every quantized layer."""
    slots = observation.as_dict()
    return {
        name: {
            "g_exponent": _exponent(layer.quant.g_exponent),
            "x_alpha": layer.quant.x_alpha.item() if isinstance(layer.quant.x_alpha, Tensor) else None,
            "slots": slots.get(name, {}),
        }
        for name, layer in quantized_layers(model).items()
    }


def histogram_lines(observation: Observation) -> dict[str, dict[str, dict[str, Any]]]:
    """{layer: {slot: histogram}}; the grid is left empty where it is too fine to be drawn (16-bit formats)."""

    def short(histogram: dict[str, Any]) -> dict[str, Any]:
        if len(histogram["grid"]) <= MAX_GRID:
            return histogram
        return histogram | {"grid": [], "decision_points": []}

    return {
        layer: {slot: short(histogram) for slot, histogram in slots.items()}
        for layer, slots in observation.histograms().items()
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
