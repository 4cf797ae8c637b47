"""The experts of transformers' mixtures, whose weights are parameters with three axes. Imported when a model has such a layer.

transformers marks such a class by a decorator, `use_experts_implementation`, whose arguments say how the weights lie and
whether there are gates, biases and a norm behind; whatever is marked can be computed in one way. So the twin of a class is made
from that description: no list of names.

Parts: `gate_up` (`up` where there is no gate) and `down`. Each expert's weight has a scale of its own; the clip value of the
activations and the exponent of the gradients are one for all experts of a product. Router, activation function, biases, norm
and the weighting of the experts stay in full precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.nn._base import SWAPS, require_input
from fourbit.nn._parts import Composed, PartInfo
from fourbit.ops import LinearMap, ProductSize, as_written, grouped


class Experts(Composed):
    """A class of experts with quantized products, for each token's row x and each expert e that it is routed to:

    y = sum_e weight_e (down_e(act(up_e(x))) + b),   up_e(x) = Q(x) Q(w_e)^T + b_e, and so on
    """

    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    num_experts: int

    def parts(self) -> dict[str, PartInfo]:
        """Two products, one after the other; none where the parameters are not what the class's description says."""
        up = "gate_up" if getattr(self, "has_gate", True) else "up"
        weights = {name: getattr(self, f"{name}_proj", None) for name in (up, "down")}
        if not all(isinstance(w, Tensor) and w.dim() == 3 and w.is_floating_point() for w in weights.values()):
            return {}
        columns = 2 if getattr(self, "is_transposed", False) else 1
        return {n: PartInfo(n, f"{n}_proj", cast("Tensor", w).shape[columns]) for n, w in weights.items()}

    def part_weight(self, name: str) -> Tensor:
        """[experts, outputs, inputs]."""
        weight = getattr(self, f"{name}_proj")
        return weight.transpose(1, 2) if self.is_transposed else weight

    def sizes(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> list[tuple[str, ProductSize, bool]]:
        """One product for each expert with rows."""
        x, index, _ = _arguments(self, inputs, named)
        found = []
        for position, name in enumerate(Experts.parts(self)):
            _, n, k = Experts.part_weight(self, name).shape
            rows = [m for m in _rows_of(index, self.num_experts) if m]
            found += [(name, LinearMap().size((m, k), (n, k), (m, n)), position > 0 or x.requires_grad) for m in rows]
        return found

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """As the class's own: rows [T, K], the experts of each [T, k], their weights [T, k] -> [T, K].

        A number that is no expert's (of another process) adds nothing.
        """
        if all(self.part(name).spec.is_identity for name in self.parts()):
            return super().forward(*inputs, **named)
        return self._mix(*_arguments(self, inputs, named))  # type: ignore[call-arg]

    @as_written
    def _mix(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        up, down = self.parts()
        require_input(x, self, -1, self.part_weight(up).shape[2], (2,))
        if index.shape != weights.shape or index.shape[:-1] != x.shape[:-1]:
            shapes = f"{tuple(index.shape)} and {tuple(weights.shape)}"
            raise UserError(
                f"{type(self).__name__} got experts and weights of shapes {shapes} for {x.shape[0]} rows: it needs one "
                "weight for each expert of each row"
            )
        sizes, chosen = _rows_of(index, self.num_experts), index.reshape(-1)
        order = chosen.argsort(stable=True)[: sum(sizes)]
        expert = chosen[order]
        y = self._product(up, x[order // max(1, index.shape[-1])], sizes, expert)
        y = self._apply_gate(y) if self.has_gate else self.act_fn(y)  # type: ignore[operator]
        y = self._product(down, y, sizes, expert)
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)  # type: ignore[operator]
        y = y * weights.reshape(-1)[order].unsqueeze(-1)
        whole = y.new_zeros(chosen.shape[0], y.shape[1]).index_copy(0, order, y)
        return whole.view(*index.shape, y.shape[1]).sum(1).to(x.dtype)

    def _product(self, name: str, x: Tensor, sizes: list[int], expert: Tensor) -> Tensor:
        weight, part = self.part_weight(name), self.part(name)
        if part.spec.is_identity:
            y = torch.cat([F.linear(rows, w) for rows, w in zip(x.split(sizes), weight, strict=True)])
        else:
            y = grouped(x, weight, sizes, part.quant)
        return y + getattr(self, f"{name}_proj_bias")[expert].to(y.dtype) if self.has_bias else y

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the class of transformers: ours is made when it is met."""
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (_own_class(self),), *state


def learn(cls: type[nn.Module]) -> None:
    """Enter the twin of a class of experts into `SWAPS`."""
    if cls not in SWAPS:
        SWAPS[cls] = type(cls.__name__, (Experts, cls), {"__module__": __name__, "__doc__": Experts.__doc__})


def _blank(cls: type[nn.Module]) -> nn.Module:
    learn(cls)
    return SWAPS[cls].__new__(SWAPS[cls])


def _own_class(module: nn.Module) -> type[nn.Module]:
    """The class of transformers, whether the module is converted or not."""
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, Composed))


def _arguments(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, numbers of experts, and their weights, however the class calls them."""
    if len(inputs) != 3:
        inputs = tuple(inspect.signature(_own_class(module).forward).bind(module, *inputs, **named).arguments.values())[
            1:
        ]
    x, index, weights = inputs
    return x, index, weights


def _rows_of(index: Tensor, num_experts: int) -> list[int]:
    """How many rows each expert gets."""
    return torch.bincount(index.reshape(-1), minlength=num_experts)[:num_experts].tolist()
