"""Which module has which weights, and how much of them lies in which precision."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from fourbit.nn import SWAPS, Composed, torch_class_of
from fourbit.recipes._convert import EMBEDDINGS, Assignment
from fourbit.recipes._count import Call, Counts, makes_weights

ACTIVATIONS = "product of activations"
"""Why a call without parameters is outside the layers."""
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class MatrixExplanation:
    """Weights that are multiplied.

    Args:
        name: of the parameter, or of the part of a layer that has several products.
        numel: numbers in it.
        bits: of each as an operand of fprop.
        reason: why no rule is about it; empty for the weights of layers that one is about.
    """

    name: str
    numel: int
    bits: int
    reason: str = ""


class Owners:
    """The modules of a model by name, and the layers that they belong to."""

    def __init__(self, model: nn.Module, assignments: list[Assignment]):
        self.model, self.assignments = model, assignments
        self.names = {module: name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
        self.layers: dict[nn.Module, Assignment] = {}
        for a in assignments:
            for module in a.module.modules():
                self.layers.setdefault(module, a)

    def of(self, parameter: str) -> nn.Module:
        """The module that has a parameter."""
        return self.model.get_submodule(parameter.rpartition(".")[0])

    def reason(self, call: Call) -> str:
        """Why a call is no layer's."""
        if makes_weights(call.module):
            return "makes the weight of a layer"
        if isinstance(call.module, torch.jit.ScriptModule):
            return "TorchScript cannot be converted"
        if not call.weights:
            return ACTIVATIONS
        return ", ".join(dict.fromkeys(self._role(name, call.module) for name in call.weights))

    def _role(self, parameter: str, caller: nn.Module) -> str:
        module = self.of(parameter)
        if module in self.layers:
            return f"uses {parameter} outside its layer's forward"
        return f"uses its parameter {parameter.rpartition('.')[2]}" if module is caller else f"uses {parameter}"


def matrices_of(owners: Owners, counts: Counts | None, ran: Container[str]) -> tuple[MatrixExplanation, ...]:
    """The weights of all layers, and parameters with two or more axes that are no layer's; of embeddings and normalizations
    only those that are seen to be multiplied.

    Args:
        counts: of a forward pass: what it uses without multiplying it is left out, too.
        ran: the layers that have run in it.
    """
    multiplied = {name for call in counts.calls for name in call.weights} if counts else set()
    found: list[MatrixExplanation] = []
    seen: set[nn.Parameter] = set()
    for a in owners.assignments:
        spec = a.rule.spec if a.rule else None
        w = spec.resolved("w_fprop") if spec else None
        for name, weight, numel in weights_of(a):
            if isinstance(weight, nn.Parameter) and not a.part:
                if weight in seen:
                    continue  # tied
                seen.add(weight)
            bypassed = a.convertible and a.name not in ran and any(n.startswith(f"{a.name}.") for n in multiplied)
            bits = w.format.bits if w and not bypassed else 8 * weight.element_size()
            reason = "used outside its layer's forward" if bypassed else a.reason
            found.append(MatrixExplanation(name, numel, bits, reason))
    for name, p in owners.model.named_parameters():
        module = owners.of(name)
        aside = isinstance(module, (*EMBEDDINGS, *NORMS))
        if p.dim() < 2 or p in seen or module in owners.layers or (aside and name not in multiplied):
            continue
        if counts is None or name in multiplied or name not in counts.used:
            idle = counts is not None and name not in counts.used
            reason = f"parameter of {type(module).__name__}, {'which does not use it' if idle else 'not of a layer'}"
            found.append(MatrixExplanation(name, p.numel(), 8 * p.element_size(), reason))
    return tuple(found)


def weights_of(a: Assignment) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor, and how many of its numbers are this layer's."""
    if a.part:
        cls = torch_class_of(type(a.module))
        assert cls is not None
        parts = cast("type[Composed]", SWAPS[cls]).parts(a.module)  # type: ignore[arg-type]
        name = parts[a.part].weight
        if name:
            weight = getattr(a.module, name)
            yield a.name, weight, weight.numel() // sum(info.weight == name for info in parts.values())
    elif not a.convertible:
        prefix = f"{a.name}." if a.name else ""
        yield from ((f"{prefix}{name}", p, p.numel()) for name, p in a.module.named_parameters() if p.dim() > 1)
    elif isinstance(weight := getattr(a.module, "weight", None), Tensor):
        yield f"{a.name}.weight" if a.name else "weight", weight, weight.numel()
