"""What the quantized layers report: the lines "layers" and "histograms" of metrics.jsonl, and the scales in "step"."""

from __future__ import annotations

from typing import Any

from torch import nn

from fourbit.nn._base import quantized_layers
from fourbit.nn._observe import Observation
from fourbit.ops import REUSE

MAX_GRID = 256
"""Longest list of grid values in a line: the thousands of a 16-bit format would be all that the file consists of."""


def layer_lines(model: nn.Module, observation: Observation) -> dict[str, dict[str, Any]]:
    """{layer: {"g_exponent", "x_alpha", "slots": {slot: statistics}}} of every quantized layer."""
    slots = observation.as_dict()
    return {name: {**layer, "slots": slots.get(name, {})} for name, layer in scales(model).items()}


def histogram_lines(model: nn.Module, observation: Observation) -> dict[str, dict[str, dict[str, Any]]]:
    """{layer: {slot: histogram}}, with how the slot is rounded and whether the gradient serves the other product too.

    The grid is left empty where it is too fine to be drawn (16-bit formats).
    """
    layers = quantized_layers(model)

    def line(layer: str, slot: str, histogram: dict[str, Any]) -> dict[str, Any]:
        spec = layers[layer].spec
        used = spec.resolved(slot)
        fine = {"grid": [], "decision_points": []} if len(histogram["grid"]) > MAX_GRID else {}
        rounding = {"rounding": used.rounding.value} if used else {}
        return histogram | fine | rounding | {"reused": slot == "g_dgrad" and spec.g_wgrad is REUSE}

    return {
        layer: {slot: line(layer, slot, histogram) for slot, histogram in slots.items()}
        for layer, slots in observation.histograms().items()
    }


def scales(model: nn.Module) -> dict[str, dict[str, Any]]:
    """{layer: {"g_exponent", "x_alpha", ...}} of every quantized layer: what its scalings remember, as numbers. GradScale's
    exponent and PACT's clip value are always there, or None."""
    return {
        name: {"g_exponent": None, "x_alpha": None}
        | {f"{operand}_{what}": n for operand, s in layer.quant.scalings.items() for what, n in s.numbers().items()}
        for name, layer in quantized_layers(model).items()
    }
