"""Statistics of every operand of every layer, gathered without changing a number.

with fb.observe(model) as stats:
    loss = F.cross_entropy(model(x), y)
    loss.backward()
stats["layer1.conv"]["g_dgrad"].underflow
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import unknown
from fourbit.nn._base import quantized_layers
from fourbit.nn._vitals import norm_vitals, operand_vitals
from fourbit.ops import Observer
from fourbit.quantizers import QTensor

LOG2_EDGES = tuple(i / 4 for i in range(-100, 41))
"""Bin edges of histograms: log2 of magnitudes in grid units, four bins per octave from 2^-25 to 2^10."""


@dataclass(frozen=True)
class OperandStats:
    """One operand in one forward or backward pass; for a layer used several times, the last use.

    Attributes:
        numel: elements.
        amax: max|x|.
        scale: dequantization multiplier (the largest one where channels have their own).
        underflow: share of the non-zero elements that became 0.
        saturation: share of the elements whose magnitude in grid units exceeds the largest of the grid.
        sqnr_db: 10 log10(sum x^2 / sum (x - xq)^2) in decibels; infinite where nothing was lost.
        bias: sum (xq - x) sign(x) / sum |x|: relative change of magnitudes, negative where they shrink.
    """

    numel: int
    amax: float
    scale: float
    underflow: float
    saturation: float
    sqnr_db: float
    bias: float


class Observation(Mapping[str, dict[str, OperandStats]]):
    """{layer: {slot: OperandStats}}, filled while the `observe` block runs."""

    def __init__(self, histograms: bool, model: nn.Module | None = None):
        self._with_histograms, self._model = histograms, model
        self._vitals: dict[str, dict[str, Any]] = {}
        self._stats: dict[str, dict[str, OperandStats]] = {}
        self._histograms: dict[str, dict[str, dict[str, object]]] = {}

    def __getitem__(self, layer: str) -> dict[str, OperandStats]:
        if layer not in self._stats:
            raise unknown("layer", layer, self._stats)
        return self._stats[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def __repr__(self) -> str:
        lines = [f"{'layer':32} {'slot':9} {'underflow':>10} {'saturation':>11} {'SQNR dB':>8} {'bias':>7}"]
        for layer, slots in self._stats.items():
            for slot, s in slots.items():
                shares = f"{s.underflow:10.2%} {s.saturation:11.2%} {s.sqnr_db:8.1f} {s.bias:7.2%}"
                lines.append(f"{layer:32} {slot:9} {shares}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, dict[str, dict[str, float]]]:
        """Plain numbers, for JSON: {layer: {slot: {statistic: number}}}."""
        return {layer: {slot: asdict(s) for slot, s in slots.items()} for layer, slots in self._stats.items()}

    def histograms(self) -> dict[str, dict[str, dict[str, object]]]:
        """{layer: {slot: histogram}} of log2 |x / scale|: `log2_edges`, `counts`, `zeros` (elements that were 0 before),
        and the positive `grid` and `decision_points` of the format. Empty unless asked for."""
        return self._histograms

    def vitals(self) -> dict[str, dict[str, Any]]:
        """{"layers": {layer: {slot: what `fourbit.diagnosis` reads beside the statistics}}, "norms": {normalization: running
        statistics}}. Empty unless asked for."""
        return {} if self._model is None else {"layers": self._vitals, "norms": norm_vitals(self._model)}

    def _record(self, layer: str, module: nn.Module, slot: str, x: Tensor, quantized: QTensor) -> None:
        self._stats.setdefault(layer, {})[slot] = _stats_of(x, quantized)
        if self._model is not None:
            self._vitals.setdefault(layer, {})[slot] = operand_vitals(module, slot, x, quantized)
        if self._with_histograms:
            self._histograms.setdefault(layer, {})[slot] = _histogram_of(x, quantized)


@dataclass
class _LayerObserver:
    observation: Observation
    layer: str
    module: nn.Module
    outer: Observer | None

    def record(self, slot: str, x: Tensor, quantized: QTensor) -> None:
        self.observation._record(self.layer, self.module, slot, x, quantized)
        if self.outer is not None:
            self.outer.record(slot, x, quantized)


@contextmanager
def observe(model: nn.Module, histograms: bool = False, vitals: bool = False) -> Iterator[Observation]:
    """Watch the operands of all quantized layers of `model` while the block runs.

    Args:
        histograms: also count magnitudes in grid units (slower).
        vitals: also measure what `fourbit.diagnosis` needs: channel sums, a few weights, running statistics.

    Returns:
        An `Observation` that fills as forward and backward passes run. Numerics and gradients are unchanged.
    """
    observation = Observation(histograms, model if vitals else None)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        layer.quant.observer = _LayerObserver(observation, name, layer, layer.quant.observer)
    try:
        yield observation
    finally:
        for layer in layers.values():
            watching = layer.quant.observer
            layer.quant.observer = watching.outer if isinstance(watching, _LayerObserver) else None


def _stats_of(x: Tensor, quantized: QTensor) -> OperandStats:
    if x.numel() == 0:
        return OperandStats(0, 0.0, float(quantized.scale.max()), 0.0, 0.0, math.inf, 0.0)
    x = x.to(torch.float32)
    scale = quantized.scales
    xq = quantized.dequantize()
    magnitude = x.abs()
    total = magnitude.sum(dtype=torch.float64)
    nonzero = int((x != 0).sum())
    grid = quantized.format.grid
    limits = (grid[0] * scale, grid[-1] * scale)
    noise = float((x - xq).square_().sum(dtype=torch.float64))
    power = float(x.square().sum(dtype=torch.float64))
    return OperandStats(
        numel=x.numel(),
        amax=float(magnitude.max()),
        scale=float(quantized.scale.max() if quantized.each is None else quantized.each[0].max()),
        underflow=float(((xq == 0) & (x != 0)).sum()) / max(nonzero, 1),
        saturation=float(((x < limits[0]) | (x > limits[1])).sum()) / x.numel(),
        sqnr_db=10 * math.log10(power / noise) if noise > 0 and power > 0 else math.nan if noise != 0 else math.inf,
        bias=float(((xq - x) * x.sign()).sum(dtype=torch.float64) / total) if total > 0 else 0.0,
    )


def _histogram_of(x: Tensor, quantized: QTensor) -> dict[str, object]:
    magnitude = (x.to(torch.float32) / quantized.scales).abs()
    finite = magnitude[magnitude.isfinite() & (magnitude > 0)]
    logs = finite.log2_().clamp_(LOG2_EDGES[0], LOG2_EDGES[-1] - 1e-3)
    counts = torch.histc(logs, len(LOG2_EDGES) - 1, LOG2_EDGES[0], LOG2_EDGES[-1])
    format = quantized.format
    return {
        "log2_edges": list(LOG2_EDGES),
        "counts": counts.long().tolist(),
        "zeros": int((x == 0).sum()),
        "grid": [v for v in format.grid if v > 0],
        "decision_points": [v for v in format.decision_points if v > 0],
    }
