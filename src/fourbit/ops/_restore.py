"""What the rounding of a gradient has lost, given back to the products that it enters: see `QuantSpec.restore`."""

from __future__ import annotations

import torch
from torch import Tensor

from fourbit.quantizers import Quantized, QuantSpec


def restored(g: Tensor, quantized: Quantized | None, spec: QuantSpec | None, axis: int) -> Quantized | None:
    """`quantized`, the rounding of g, with a corrected scale (magnitude) or corrected numbers (sum).

    Args:
        axis: of the output channels in g.
    """
    if quantized is None or spec is None or not spec.restore:
        return quantized
    q, scale, _ = quantized.tensor
    exact, numbers = (
        g.to(torch.float32) / scale,
        q.to(torch.float32),
    )  # in units of the scale, where squares do not underflow
    if spec.restore == "magnitude":
        projection = (exact * numbers).sum()
        factor = torch.where(projection > 0, exact.square().sum() / projection, 1.0)
        return quantized._replace(tensor=quantized.tensor._replace(scale=scale * factor))
    dims = [d for d in range(g.dim()) if d != axis % g.dim()]
    lost = (exact - numbers).mean(dims, keepdim=True)
    return quantized._replace(tensor=quantized.tensor._replace(q=numbers + lost))
