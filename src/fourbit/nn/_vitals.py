"""Signs of health that the statistics of operands do not show, measured in the same look: what `fourbit.diagnosis` reads.

    full     of a gradient with GradScale: its largest number, scaled, over the one that GradScale brings it below
    sums     of a gradient: sum over channels of |sum of g| / sum |g|, exact and rounded, and how many numbers a channel has
    codes    of a few weights: where they lie in grid units, and the number of the grid that they became
    norms    of each batch normalization: the largest running mean and running deviation

Nothing is remembered from one observation to the next, so a run that was interrupted writes what it would have written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fourbit.quantizers import GradScale, QTensor

SAMPLED_WEIGHTS = 64
"""Of a layer, at even distances: a tenth of all that oscillate is then found as 0.1 +- 0.04."""

MAX_CODES = 256
"""Formats with more numbers do not show oscillation: their steps are as fine as the weights' own."""


def operand_vitals(layer: nn.Module, slot: str, x: Tensor, quantized: QTensor) -> dict[str, Any]:
    """`full` and `sums` of a gradient, `codes` of a weight: see above."""
    if x.numel() == 0:
        return {}
    x = x.to(torch.float32)
    grid, scales = quantized.format.grid, quantized.scales
    found: dict[str, Any] = {}
    spec = layer.spec.resolved(slot)  # type: ignore[union-attr,operator]
    if isinstance(spec.scaling, GradScale):
        found["full"] = float((x / scales).abs().max()) / spec.scaling.max
    if slot[0] == "g" and (channel := _channel_axis(layer, x)) is not None:
        others = [axis for axis in range(x.dim()) if axis != channel]
        magnitude = float(x.abs().sum(dtype=torch.float64))
        if magnitude > 0:
            exact, rounded = (
                float(t.sum(others, dtype=torch.float64).abs().sum()) / magnitude for t in (x, quantized.dequantize())
            )
            found["sums"] = [exact, rounded, x.numel() // x.shape[channel]]
    if slot == "w_fprop" and len(grid) <= MAX_CODES and not spec.rounding.draws:
        chosen = torch.linspace(0, x.numel() - 1, min(SAMPLED_WEIGHTS, x.numel()), device=x.device).long()
        found["codes"] = [
            [round(float(v), 3) for v in (t / scales).flatten()[chosen]] for t in (x, quantized.dequantize())
        ]
    return found


def norm_vitals(model: nn.Module) -> dict[str, dict[str, float]]:
    """{batch normalization: {"mean": largest |running mean|, "deviation": largest root of a running variance}}."""
    return {
        name: {
            "mean": float(module.running_mean.abs().max()),
            "deviation": float(module.running_var.max()) ** 0.5,  # type: ignore[union-attr]
        }
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_mean.numel()
    }


def _channel_axis(layer: nn.Module, g: Tensor) -> int | None:
    """The axis of g that counts output channels; None where g is laid out for its scales or belongs to a part of a layer."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return None
    axis = -1 if isinstance(layer, nn.Linear) else 1 if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else None
    if axis is None or (axis == 1 and g.dim() != weight.dim()) or g.shape[axis] != weight.shape[0]:
        return None
    return axis % g.dim()
