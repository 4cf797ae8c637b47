"""Which chains of a model are fused in training, and why the others are not: found by a training step of a copy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fourbit import backends
from fourbit.chains import Link, watch_chains
from fourbit.nn import quantized_layers
from fourbit.ops import LayerState
from fourbit.recipes._input import Batch, Input, batch_for, first_line, run_on


@dataclass(frozen=True)
class ChainExplanation:
    """One chain: the layers and operations in it, in order, and where it ends.

    Args:
        steps: names of layers, "sum" and "activation".
        end: the layer that takes the result as codes; or what else needs it, or why there is no chain.
        handed_over: whether the former.
    """

    steps: tuple[str, ...]
    end: str
    handed_over: bool

    @property
    def fused(self) -> bool:
        """Whether more than one step is computed at once."""
        return len(self.steps) > 1

    def __str__(self) -> str:
        chain = " > ".join(self.steps)
        if self.handed_over:
            return f"{chain} > codes for {self.end}"
        return f"{chain}, then {self.end}" if self.fused else f"{chain}: not fused, {self.end}"


def chains_of(model: nn.Module, convert: Any, input: Input) -> tuple[ChainExplanation, ...]:
    """The chains of the second training step of a copy of `model`, and its batch normalizations and convolutions without one.

    Args:
        convert: called with the copy, if it is not converted.
    """
    norms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    if not norms:
        return ()
    everything = tuple(sorted(norms))
    if not any(kernel.operation == "norm_apply" for kernel in backends.kernels()):
        return (
            ChainExplanation(everything[:1], "nor is any other: no backend of this machine has the kernels", False),
        )
    found: list[tuple[Link, LayerState | str]] = []
    try:
        with (
            trained_once(model, convert, input) as (twin, batch),
            watch_chains(lambda link, end: found.append((link, end))),
        ):
            run_on(twin, batch)
    except Exception as error:
        reason = f"a copy of the model does not train on this input ({first_line(error)})"
        return (ChainExplanation(everything[:1], reason, False),)
    return tuple(_explained(twin, found))


@contextmanager
def trained_once(model: nn.Module, convert: Any, input: Input) -> Iterator[tuple[nn.Module, Batch]]:
    """A copy of `model` in training, which has seen the batch once: the first decides what PACT will do with the next."""
    twin = copy.deepcopy(model, _results_stored_on(model))
    if not quantized_layers(twin):
        convert(twin)
    twin.train()
    batch = batch_for(twin, input)
    with torch.random.fork_rng(), torch.enable_grad():
        run_on(twin, batch)
        for layer in quantized_layers(twin).values():
            layer.quant.settle()
        yield twin, batch


def _results_stored_on(model: nn.Module) -> dict[int, Any]:
    """What stands, in a copy, for the tensors with a graph that a forward pass has left on modules: these cannot be copied."""
    stored = [t for m in model.modules() for t in tree_leaves(list(vars(m).values())) if isinstance(t, Tensor)]
    return {id(t): t.detach() for t in stored if t.grad_fn is not None}


def _explained(model: nn.Module, found: list[tuple[Link, LayerState | str]]) -> list[ChainExplanation]:
    layers = {layer.quant: name for name, layer in quantized_layers(model).items()}
    norms: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            norms |= {id(t): name for t in (module.weight, module.running_mean) if t is not None}
    result, seen = [], set()
    for last, end in found:
        steps, link = [], last
        while link is not None:
            if link.kind == "product":
                steps.append(layers.get(link.state, "a convolution"))  # type: ignore[arg-type]
            elif link.kind == "norm":
                known = () if link.norm is None else (id(link.norm.gamma), id(link.norm.running_mean))
                steps.append(next((norms[i] for i in known if i in norms), "batch normalization"))
            else:
                steps.append({"sum": "sum", "act": "activation"}[link.kind])
            link = link.before
        steps.reverse()
        seen.update(steps)
        taken = isinstance(end, LayerState)
        reason = f"its result goes to {end}" if len(steps) == 1 else str(end)
        result.append(ChainExplanation(tuple(steps), layers[end] if taken else reason, taken))
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name not in seen:
            why = "no convolution in low precision stands before it, or it does not run in training mode"
            result.append(ChainExplanation((name,), why, False))
    return result
