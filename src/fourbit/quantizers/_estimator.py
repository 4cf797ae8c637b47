"""What the gradient of rounding is taken for, and what of an operand is not rounded at all.

Source: Wang et al., Optimizing Large Language Model Training Using FP4 Quantization, arXiv 2501.17116, and their code (MS-AMP).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.errors import UserError
from fourbit.formats import Format


@dataclass(frozen=True)
class DGE:
    """The differentiable gradient estimator: rounding between two neighbours l < h of the grid is taken for a power curve

        f(x) = l + d/2 (1 + sign(u) |u|^(1/k)),   f'(x) = 1/k |u|^(1/k - 1),   u = 2 (x - l) / d - 1,   d = h - l

    and a gradient is multiplied by f', at most `most`, in place of the straight-through 1. x is in units of the scale; beyond
    the ends of the grid it counts as the end. `Format.slope` is the same in pure Python.

    Args:
        k: how steep the curve is in the middle; 1 is straight-through.
        most: cap of f', which has a pole in the middle.

    >>> from fourbit.formats import FP4_E2M1
    >>> DGE().slope(torch.tensor([0.0, 0.25, 5.0, 4.5]), FP4_E2M1)
    tensor([0.2000, 3.0000, 3.0000, 0.3482])
    """

    k: float = 5.0
    most: float = 3.0

    def __post_init__(self) -> None:
        if not (self.k >= 1 and self.most > 0):
            raise UserError(f"DGE has k >= 1 and a cap above 0, not k={self.k!r} and most={self.most!r}")

    def slope(self, x: Tensor, format: Format) -> Tensor:
        """f'(x), float32, in the shape of `x`, which is in grid units; NaN where x is."""
        grid = torch.tensor(format.grid, dtype=torch.float32, device=x.device)
        x = x.to(torch.float32).clamp(format.min, format.max).contiguous()
        interval = (torch.bucketize(x, grid, right=True) - 1).clamp_(0, len(grid) - 2)
        low = grid[interval]
        u = (2 * (x - low) / (grid[interval + 1] - low) - 1).abs()
        return (u.pow(1 / self.k - 1) / self.k).clamp(max=self.most)

    def __str__(self) -> str:
        return f"gradient by DGE {self.k:g}"


def split_outliers(x: Tensor, quantile: float, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x clamped between two of its numbers, and the rest: their sum is x.

    Of the n numbers along `dims`, in ascending order and counted from 0, those at int((1 - quantile) n) and int(quantile n) are
    the ends.

    >>> split_outliers(torch.tensor([[1.0, -9.0, 2.0, 3.0]]), 0.75, (1,))
    (tensor([[1., 1., 2., 3.]]), tensor([[  0., -10.,   0.,   0.]]))
    """
    x = x.to(torch.float32)
    kept = [d for d in range(x.dim()) if d not in dims]
    n = 1
    for d in dims:
        n *= x.shape[d]
    if not x.numel():
        return x, torch.zeros_like(x)
    ordered = x.permute(*kept, *dims).reshape(*(x.shape[d] for d in kept), n).sort(-1).values
    view = [1 if d in dims else size for d, size in enumerate(x.shape)]
    low, high = (ordered[..., min(int(share * n), n - 1)].view(view) for share in (1 - quantile, quantile))
    inside = x.clamp(low, high)
    return inside, x - inside
