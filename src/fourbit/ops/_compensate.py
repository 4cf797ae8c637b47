"""What the rounding of a gradient has lost, given back to the products that it enters: see `QuantSpec.compensate`."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.ops._contraction import Contraction
from fourbit.quantizers import Quantized, QuantSpec


def compensated(
    g: Tensor, quantized: Quantized | None, spec: QuantSpec | None, contraction: Contraction
) -> Quantized | None:
    """`quantized`, the rounding of g, with a corrected scale (magnitude) or corrected numbers (sum, of each output channel)."""
    if quantized is None or spec is None or not spec.compensate:
        return quantized
    q, scale, *_ = quantized.tensor
    exact, numbers = (
        g.to(torch.float32) / scale,
        q.to(torch.float32),
    )  # in units of the scale, where squares do not underflow
    if spec.compensate == "magnitude":
        projection = (exact * numbers).sum()
        factor = torch.where(projection > 0, exact.square().sum() / projection, 1.0)
        return quantized._replace(tensor=quantized.tensor._replace(scale=scale * factor))
    orientation = contraction.orientation("wgrad", "g", g.shape)
    lost = orientation.spread(orientation.of(exact - numbers).mean((2, 3), keepdim=True))
    return quantized._replace(tensor=quantized.tensor._replace(q=numbers + lost))
