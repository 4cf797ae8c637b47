"""`memory_report`: what each layer keeps between forward and backward, against the same layer in FP32 and bf16.

A layer of matrix products needs both operands again in its backward pass: x for dw, w for dx. In FP32 that is 4 bytes per
element of either. A 4-bit layer keeps the codes, half a byte each, and one bit per element of a clipped operand:

    PACT: 4 + 1 bits of 32, 0.156        SAWB: 4 bits of 32, 0.125

The report runs a forward pass, and sees through `torch.autograd.graph.saved_tensors_hooks` what autograd is given to keep.
Each piece of memory counts once, and a view counts as the whole that it keeps alive. Weights count on both sides, although
in FP32 they are the parameters themselves, kept by reference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fourbit.nn import Part, QuantizedLayer, quantized_layers
from fourbit.ops import LayerState, watch
from fourbit.recipes._input import Input, batch_for, run_on


@dataclass(frozen=True)
class LayerMemory:
    """One quantized layer, over all its uses in one forward pass.

    Args:
        bits: of the wider operand that is kept, x or w; 32 for full precision.
        saved_bytes: what is kept for backward.
        float_bytes: the part of it in floating-point dtypes; a 4-bit layer has only its scales there.
        fp32_bytes: x and w in FP32.
    """

    name: str
    type: str
    bits: int
    saved_bytes: int
    float_bytes: int
    fp32_bytes: int

    @property
    def bf16_bytes(self) -> int:
        """x and w in bf16."""
        return self.fp32_bytes // 2

    @property
    def ratio(self) -> float:
        """saved_bytes / fp32_bytes."""
        return self.saved_bytes / self.fp32_bytes if self.fp32_bytes else 0.0


@dataclass(frozen=True)
class MemoryReport:
    """What a training step keeps for backward. `print` it, or read `layers`, `others` and `total`.

    Args:
        layers: the quantized layers.
        others: bytes kept by everything else, by the class of the module in which it happens.
    """

    layers: tuple[LayerMemory, ...]
    others: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes kept by the whole model."""
        return sum(layer.saved_bytes for layer in self.layers) + sum(self.others.values())

    def ratio(self, bits: int | None = None) -> float:
        """saved_bytes / fp32_bytes over the layers of so many bits (None: over all)."""
        chosen = [layer for layer in self.layers if bits in (None, layer.bits)]
        whole = sum(layer.fp32_bytes for layer in chosen)
        return sum(layer.saved_bytes for layer in chosen) / whole if whole else 0.0

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def memory_report(model: nn.Module, input: Input) -> MemoryReport:
    """What `model` keeps for backward in one training step.

    Args:
        model: converted or not. It runs forward twice, in training mode if it is in evaluation; its parameters, buffers,
            scales, gradients and modes, and torch's random numbers, are afterwards what they were. What is recomputed in
            backward (gradient checkpointing) is not kept, and does not count.
        input: one batch (several tensors where the model takes several, a dictionary where it takes them by name), or its
            shape (random numbers then). Bytes grow in proportion to the batch, up to the weights.

    Returns:
        MemoryReport, in bytes. The layers of a model that is not converted yet count among `others`.

    Raises:
        UserError: the model does not run on the input.

    >>> import fourbit as fb
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    >>> report = memory_report(fb.convert(net, "ibm2020"), (128, 64))
    >>> [layer.bits for layer in report.layers], report.ratio(4) < 0.17
    ([16, 4, 16], True)
    """
    batch = batch_for(model, input)
    layers = quantized_layers(model)
    watcher = _Watcher(model, layers)
    with _unchanged(model):
        with torch.no_grad():
            run_on(model, batch)  # the first batch decides what PACT and fused chains will do with the next
        for layer in layers.values():
            layer.quant.settle()
        hooks = torch.autograd.graph.saved_tensors_hooks(watcher.keep, _unpack)
        with watch(watcher), watcher.modules(), torch.enable_grad(), hooks:
            run_on(model, batch)
    found = watcher.found()
    others = {who: sum(map(_num_bytes, tensors)) for who, tensors in found.items() if isinstance(who, str)}
    reports = [
        _layer(name, layer, found.get(layer.quant, []), watcher.inputs[layer.quant])
        for name, layer in layers.items()
        if layer.quant in watcher.inputs
    ]
    return MemoryReport(tuple(reports), dict(sorted(others.items(), key=lambda item: -item[1])))


class _Watcher:
    """Notes what autograd is given to keep, and by whom: a layer, a fused chain, or a module of another class."""

    def __init__(self, model: nn.Module, layers: Mapping[str, QuantizedLayer]):
        self.inputs: dict[LayerState, int] = {}
        self._known = set(model.modules())
        self._states = {layer.quant for layer in layers.values()}
        self._stack: list[LayerState | str] = ["the model"]
        self._kept: list[tuple[LayerState | str, Tensor]] = []
        self._owners: dict[int, LayerState] = {}

    @contextmanager
    def computing(self, who: LayerState | str, num_elements: int) -> Iterator[None]:
        """`who` computes; layers are never inside one another."""
        if isinstance(who, LayerState) and who in self._states:
            self.inputs[who] = self.inputs.get(who, 0) + num_elements
        self._stack.append(who if isinstance(who, str) or who in self._states else "other products")
        try:
            yield
        finally:
            self._stack.pop()

    def owns(self, who: LayerState, tensors: Iterable[Tensor | None]) -> None:
        """They are in use until autograd has them: no address can be another tensor's."""
        self._owners.update({t.untyped_storage().data_ptr(): who for t in tensors if t is not None})

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Follow the calls of modules, by hooks that are not the modules' own: those would keep chains from being fused."""

        def enter(module: nn.Module, arguments: Any) -> None:
            if module in self._known:
                self._stack.append(type(module).__name__)

        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            if module in self._known:
                self._stack.pop()

        with ExitStack() as handles:
            handles.callback(register_module_forward_pre_hook(enter).remove)
            handles.callback(register_module_forward_hook(leave).remove)
            yield

    def keep(self, t: Tensor) -> None:
        """The hook of autograd."""
        self._kept.append((self._owners.get(t.untyped_storage().data_ptr(), self._stack[-1]), t.detach()))

    def found(self) -> dict[LayerState | str, list[Tensor]]:
        """One tensor for each piece of memory; what a layer shares with others is the layer's."""
        found: dict[LayerState | str, list[Tensor]] = defaultdict(list)
        seen: set[int] = set()
        for who, tensor in sorted(self._kept, key=lambda item: isinstance(item[0], str)):
            address = tensor.untyped_storage().data_ptr()
            if address not in seen:
                seen.add(address)
                found[who].append(tensor)
        return found


def _unpack(_: None) -> Tensor:
    raise RuntimeError("memory_report runs no backward pass")


def _num_bytes(t: Tensor) -> int:
    return t.untyped_storage().nbytes()


def _layer(name: str, layer: QuantizedLayer, kept: list[Tensor], num_inputs: int) -> LayerMemory:
    weight = getattr(layer, "weight", None)
    num_weights = layer.num_weights if isinstance(layer, Part) else weight.numel() if isinstance(weight, Tensor) else 0
    num_elements = num_inputs + num_weights
    resolved = [layer.spec.resolved(slot) for slot in ("x_wgrad", "w_dgrad")]
    return LayerMemory(
        name,
        type(layer).__name__,
        max(spec.format.bits if spec else 32 for spec in resolved),
        sum(map(_num_bytes, kept)),
        sum(_num_bytes(t) for t in kept if t.is_floating_point()),
        4 * num_elements,
    )


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Training mode for the block; modes, buffers, layers' states and random numbers as before after it."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(m, name, t, t.clone()) for m in model.modules() for name, t in m._buffers.items() if t is not None]
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with ExitStack() as states:
        states.enter_context(torch.random.fork_rng(devices))
        for layer in quantized_layers(model).values():
            states.enter_context(layer.quant.preserved())
        if not model.training:
            model.train()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    module._buffers[name] = buffer.copy_(before)


def format_bytes(num_bytes: float) -> str:
    """In the unit that suits.

    >>> format_bytes(320 * 1024)
    '320 KiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return ""


def _lines(report: MemoryReport) -> list[str]:
    width = max([len(layer.name) for layer in report.layers] + [5])
    head = f"{'layer':{width}}  {'type':16} {'bits':>4} {'saved':>10} {'FP32':>10} {'bf16':>10} {'of FP32':>8}"
    lines = [head] if report.layers else []
    for layer in report.layers:
        numbers = (layer.saved_bytes, layer.fp32_bytes, layer.bf16_bytes)
        cells = " ".join(f"{format_bytes(n):>10}" for n in numbers)
        lines.append(f"{layer.name:{width}}  {layer.type:16} {layer.bits:4} {cells} {layer.ratio:7.3f}x")
    lines += [""] if report.layers else []
    for bits in sorted({layer.bits for layer in report.layers}):
        chosen = [layer for layer in report.layers if layer.bits == bits]
        saved, fp32 = (sum(getattr(layer, f"{which}_bytes") for layer in chosen) for which in ("saved", "fp32"))
        share = f"{format_bytes(saved)} of {format_bytes(fp32)} in FP32, {report.ratio(bits):.3f}x"
        lines.append(f"{bits}-bit layers: {share}")
    if report.others:
        lines.append("everything else: " + ", ".join(f"{name} {format_bytes(n)}" for name, n in report.others.items()))
    return [*lines, f"saved for backward in all: {format_bytes(report.total)}"]
