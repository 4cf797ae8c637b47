"""Which operations of each layer run in a kernel, and why the others do not: found by a training step of a copy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fourbit import backends
from fourbit.nn import quantized_layers
from fourbit.ops import LayerState, watch
from fourbit.recipes._chains import trained_once
from fourbit.recipes._input import Input, first_line, run_on


@dataclass(frozen=True)
class KernelExplanation:
    """One layer in a training step.

    Args:
        name: of the layer; "" where `declined` says why nothing is known.
        taken: the operations that kernels did, "operation (backend)".
        declined: of the others "operation (backend): why"; the reference did them.
    """

    name: str
    taken: tuple[str, ...]
    declined: tuple[str, ...]


class _Watcher:
    """Counts the answers of kernels by who computes."""

    def __init__(self, calls: Counter[backends.Call]):
        self.of: dict[LayerState | str, Counter[backends.Call]] = {}
        self._calls = calls

    @contextmanager
    def computing(self, who: LayerState | str, num_elements: int) -> Iterator[None]:
        before = Counter(self._calls)
        try:
            yield
        finally:
            self.of.setdefault(who, Counter()).update(self._calls - before)

    def owns(self, who: LayerState, tensors: Any) -> None:
        pass


def kernels_of(model: nn.Module, convert: Callable[[nn.Module], Any], input: Input) -> tuple[KernelExplanation, ...]:
    """The layers in the second training step of a copy of `model`, forward and backward.

    Args:
        convert: called with the copy, if it is not converted.
    """
    try:
        with trained_once(model, convert, input) as (twin, batch), backends.watching() as calls:
            watcher = _Watcher(calls)
            with watch(watcher):
                outputs = [t for t in tree_leaves(run_on(twin, batch)) if isinstance(t, Tensor) and t.requires_grad]
                torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
    except Exception as error:
        return (
            KernelExplanation("", (), (f"a copy of the model does not train on this input ({first_line(error)})",)),
        )
    layers = {layer.quant: name for name, layer in quantized_layers(twin).items()}
    return tuple(_explained(layers[who], found) for who, found in watcher.of.items() if who in layers)


def _explained(name: str, calls: Counter[backends.Call]) -> KernelExplanation:
    taken = {call.operation: f"{call.operation} ({call.backend})" for call in calls if not call.declined}
    declined = [
        f"{call.operation} ({call.backend}): {call.declined}"
        for call in calls
        if call.declined and not _is_only_faster(call.operation) and _is_left(call.operation, calls)
    ]
    return KernelExplanation(name, tuple(taken.values()), tuple(declined))


def _is_left(operation: str, calls: Counter[backends.Call]) -> bool:
    """Whether the reference had to do it at least once: no kernel took a call that the first was asked about."""
    asked: Counter[str] = Counter()
    for call, count in calls.items():
        if call.operation == operation:
            asked[call.backend] += count
    done = sum(count for call, count in calls.items() if call.operation == operation and not call.declined)
    return done < max(asked.values())


def _is_only_faster(operation: str) -> bool:
    """Whether it stands for others, which are asked where it declines."""
    return backends.OPERATIONS[operation].reference.startswith("(")
