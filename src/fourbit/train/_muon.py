"""Muon for the matrices of hidden layers, AdamW for all else, as one optimizer.

Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024) makes the momentum of a matrix nearly
orthogonal before it is subtracted. As scaled by Liu et al. (arXiv 2502.16982), 0.2 sqrt(max(rows, columns)), its steps are as
long as AdamW's, so that both take the same learning rate. Both are torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fourbit.errors import UserError


class MuonWithAdamW(torch.optim.Optimizer):
    """Parameter groups as for any optimizer, each split in two; the groups of Muon have the name "muon".

    Args:
        groups: of `fourbit.param_groups`.
        matrices: the parameters that Muon trains, with momentum 0.95 by Nesterov.
        lr: learning rate of both.
        betas: of AdamW.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], matrices: Sequence[Tensor], lr: float, betas: tuple[float, float]
    ):
        chosen = {id(p) for p in matrices}
        parts = []
        for group in groups:
            muon = [p for p in group["params"] if id(p) in chosen]
            rest = [p for p in group["params"] if id(p) not in chosen]
            parts += [{**group, "name": "muon", "params": muon}] if muon else []
            parts += [{**group, "params": rest}] if rest else []
        self._muon = torch.optim.Muon([{"params": matrices}], lr, adjust_lr_fn="match_rms_adamw")
        others = [p for part in parts if part["name"] != "muon" for p in part["params"]]
        self._adamw = torch.optim.AdamW([{"params": others}], lr, betas)
        super().__init__([{**self._inner(part).defaults, **part} for part in parts], {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for inner in (self._muon, self._adamw):
            inner.state = self.state  # type: ignore[assignment]
            inner.param_groups = [group for group in self.param_groups if self._inner(group) is inner]
            inner.step()
        return loss

    def _inner(self, group: dict[str, Any]) -> torch.optim.Optimizer:
        return self._muon if group["name"] == "muon" else self._adamw


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The weights with two axes, without embeddings and the layer nearest to the output.

    Raises:
        UserError: there are none.
    """
    matrices = [
        (m, p) for m in model.modules() for p in m.parameters(recurse=False) if p.dim() == 2 and p.requires_grad
    ]
    outside = {id(p) for m, p in matrices if isinstance(m, nn.Embedding)}
    linear = [p for m, p in matrices if not isinstance(m, nn.Embedding)]
    found = {id(p): p for p in linear[:-1] if id(p) not in outside and p is not linear[-1]}
    if not found:
        raise UserError(
            "optimizer muon is for matrices of hidden layers, and this network has none: choose sgd, adam or adamw."
        )
    return list(found.values())
