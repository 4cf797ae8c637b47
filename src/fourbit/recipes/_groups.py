"""Parameter groups for the optimizer: PACT's clip values decay at a rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fourbit.nn import quantized_layers


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    alpha_weight_decay: float | None = None,
    no_decay_norm_bias: bool = False,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer.

    Args:
        weight_decay: of the weights.
        alpha_weight_decay: of PACT's clip values; None: the same as `weight_decay`, as the PACT paper has it.
        no_decay_norm_bias: whether parameters with fewer than two dimensions (biases, normalization) go without decay.

    Returns:
        Groups named "weights", "norm_bias" (if asked for) and "alpha", without empty ones. Each parameter appears once.

    >>> [g["name"] for g in param_groups(nn.Linear(2, 2), 1e-4, no_decay_norm_bias=True)]
    ['weights', 'norm_bias']
    """
    alphas = {id(p) for layer in quantized_layers(model).values() for p in layer.quant.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norm_bias": [], "alpha": []}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        name = "alpha" if id(p) in alphas else "norm_bias" if no_decay_norm_bias and p.dim() < 2 else "weights"
        groups[name].append(p)
    decay = {
        "weights": weight_decay,
        "norm_bias": 0.0,
        "alpha": weight_decay if alpha_weight_decay is None else alpha_weight_decay,
    }
    return [{"name": n, "params": ps, "weight_decay": decay[n]} for n, ps in groups.items() if ps]
