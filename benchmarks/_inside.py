"""Looking into one training step: which bytes wait for the backward pass, and where the time goes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks._ways import Training
from fourbit.kernels.cpu._library import library
from fourbit.kernels.cpu._structures import FUNCTIONS


def saved_bytes(training: Training, layers: Sequence[str]) -> dict[str, int | None]:
    """Bytes that autograd keeps from the forward to the backward pass: of the whole step, and of `layers` alone.

    A piece of memory counts once, however many nodes keep it. Parameters do not count: they are there anyway. `layers` take a
    pass of their own, with hooks that show when they run: those keep chains from being fused. Layers that run fused
    nevertheless cannot be told from their chain: None.
    """
    whole, by_layer = _Saved(training), _Saved(training, layers)
    inside = sum(by_layer.in_layers.values()) if by_layer.in_layers else None
    return {"total": sum(whole.everything.values()), "four_bit_layers": inside}


class _Saved:
    """One step, and the bytes by address that its forward pass leaves for backward."""

    def __init__(self, training: Training, layers: Sequence[str] = ()):
        self.everything: dict[int, int] = {}
        self.in_layers: dict[int, int] = {}
        self._owned = {p.untyped_storage().data_ptr() for p in training.model.parameters()}
        self._depth = 0
        self._kept: list[Tensor] = []  # holds the memory, so that no address is used twice
        handles = []
        for name in layers:
            module = training.model.get_submodule(name)  # of the same name in every way
            handles += [module.register_forward_pre_hook(self._enter), module.register_forward_hook(self._leave)]
        with training.context(), torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            training.loss().backward()
        for handle in handles:
            handle.remove()
        training.optimizer.zero_grad()
        self._kept.clear()

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self._owned:
            self._kept.append(t)
            self.everything[storage.data_ptr()] = storage.nbytes()
            if self._depth:
                self.in_layers[storage.data_ptr()] = storage.nbytes()
        return t

    def _enter(self, *_: Any) -> None:
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


CATEGORIES: dict[str, str] = {
    "optimizer": r"Optimizer\.|_foreach|aten::_fused",
    "quantize": r"fourbit::(clip|log_round|float_round|table_round|round_tiles|moments|split|unpack|unpack_tiles)$",
    "scale, round and mask results": r"fourbit::epilogue$",
    "fused normalization chain": r"fourbit::norm_",
    "our products, and cells": r"fourbit::(multiply|panel_count|pack_panels|conv_\w+|accumulate|lstm_\w+)$",
    "attention": r"attention",
    "products": r"\bmm\b|addmm|bmm|_int_mm|matmul|linear|convolution|conv2d|qconv|qlinear",
    "normalization": r"batch_norm|layer_norm|native_norm",
    "copies, layouts, dtypes": r"copy_|constant_pad|aten::(to|_to_copy|contiguous|clone|empty|zeros|fill_|zero_|ones|cat|pad|"
    r"view|reshape|slice|as_strided)",
    "ReLU, loss, other elementwise": r"aten::",
    "autograd and Python": r"",
}
"""Names of the profiler's events, tried in this order."""


def profile(training: Training, steps: int = 3) -> dict[str, float]:
    """Seconds per step by category (self time of each operation, so that they add up).

    The functions of this library are marked while it runs, because they are no operations of torch.
    """
    training()
    with _marked_functions(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            with torch.profiler.record_function("step"):
                training()
    found = dict.fromkeys(CATEGORIES, 0.0)
    for event in profiler.key_averages():
        category = next(c for c, pattern in CATEGORIES.items() if re.search(pattern, event.key))
        found[category] += event.self_cpu_time_total * 1e-6 / steps
    return found


@contextlib.contextmanager
def _marked_functions() -> Iterator[None]:
    """The functions of the C++ library are events of the profiler by their names, as fourbit::clip."""
    loaded = library()
    functions = {} if loaded is None else {name: getattr(loaded, name) for name in FUNCTIONS if hasattr(loaded, name)}

    def marked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            with torch.profiler.record_function(f"fourbit::{name}"):
                return function(*arguments)

        return call

    try:
        for name, function in functions.items():
            setattr(loaded, name, marked(name, function))
        yield
    finally:
        for name, function in functions.items():
            setattr(loaded, name, function)
