"""A linear layer's output and gradients, with a bias, against float64.

Inputs, weights and gradients lie on a grid that all formats have, with the largest in each block of 16 along either axis, so
quantization changes nothing, and the output and all gradients must be exact. A layer that transforms its operands first
(a Hadamard rotation) rounds all the same; its mean error over repeated passes then has to be small.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.conform._report import Result
from fourbit.errors import UserError

N, K, M = 64, 128, 96
EXACT = 1e-5
"""Relative error that sums in float32 explain."""
LOOSE = 0.25
"""Largest relative error of one pass of a layer that rounds on-grid operands: E2M1 has 0.1 per operand."""
REPEATS = 8


def run(make: Callable[..., Any]) -> list[Result]:
    """Build the layer and check y, dx, dw and db."""
    try:
        layer = make(K, M)
    except Exception as error:
        raise UserError(
            f"making the layer ({K}, {M}) failed: {type(error).__name__}: {' '.join(str(error).split())}."
        ) from error
    if not isinstance(layer, nn.Module) or not all(
        isinstance(getattr(layer, n, None), Tensor) for n in ("weight", "bias")
    ):
        raise UserError("the function for --linear must return a torch module with parameters weight and bias.")
    generator = torch.Generator().manual_seed(0)
    x, w, g = (_on_grid(rows, columns, generator) for rows, columns in ((N, K), (M, K), (N, M)))
    bias = torch.randint(-8, 9, (M,), generator=generator).float() * 16
    with torch.no_grad():
        for name, value in (("weight", w), ("bias", bias)):
            getattr(layer, name).copy_(value)
    exact = {"y": x.double() @ w.double().T + bias.double(), "dx": g.double() @ w.double()}
    exact |= {"dw": g.double().T @ x.double(), "db": g.double().sum(dim=0)}
    passes: list[dict[str, Tensor]] = []
    try:
        for _ in range(REPEATS):
            passes.append(_pass(layer, x, g))
            if all(_error(passes[0][name], exact[name]) < EXACT for name in exact):
                break
    except Exception as error:
        return [Result("linear", "fail", f"raised {type(error).__name__}: {' '.join(str(error).split())[:120]}")]
    words = {"y": "output", "dx": "gradient of the input", "dw": "gradient of the weight", "db": "gradient of the bias"}
    return [_judge(f"linear: {words[name]}", [p[name] for p in passes], exact[name], bias) for name in exact]


def _on_grid(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Numbers of +-{0, 1, 2, 4, 6} with a 6 on every sixteenth diagonal: in each block of 16 along either axis."""
    values = torch.tensor([0.0, 1.0, 2.0, 4.0])[torch.randint(4, (rows, columns), generator=generator)]
    diagonal = (torch.arange(rows)[:, None] + torch.arange(columns)) % 16 == 0
    values[diagonal] = 6.0
    return values * (torch.randint(2, (rows, columns), generator=generator) * 2 - 1)


def _pass(layer: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(g.to(y.dtype))
    found = {"y": y, "dx": x.grad, "dw": layer.weight.grad, "db": layer.bias.grad}  # type: ignore[union-attr]
    return {name: torch.zeros(1) if each is None else each.detach().double().clone() for name, each in found.items()}  # type: ignore[union-attr]


def _error(found: Tensor, exact: Tensor) -> float:
    if found.shape != exact.shape:
        return float("inf")
    error = float((found - exact).norm() / exact.norm())
    return error if error == error else float("inf")


def _judge(name: str, found: list[Tensor], exact: Tensor, bias: Tensor) -> Result:
    error = _error(found[0], exact)
    mean = _error(torch.stack(found).mean(dim=0), exact)
    if error < EXACT:
        return Result(name, "pass", f"relative error {error:.1e}", exact.numel())
    if name.endswith("output") and _error(found[0] + bias.double(), exact) < EXACT:
        return Result(name, "fail", "the bias is left out", exact.numel(), exact.numel())
    if found[0].shape != exact.shape:
        return Result(name, "fail", "there is none", exact.numel(), exact.numel())
    detail = f"relative error {error:.3f} on numbers of the grid, {mean:.3f} in the mean of {len(found)} passes"
    return Result(
        name, "fail" if error > LOOSE or name.endswith("bias") else "open", detail, exact.numel(), int(error > LOOSE)
    )
