"""What all quantized layers share, and the table from torch's classes to ours.

A quantized layer *is* the torch layer (a subclass with the same parameters, attributes and constructor) plus one child,
`quant`, that holds the spec and the state. Conversion therefore assigns `__class__` and adds the child: parameters,
hooks, ties between layers and references held elsewhere all survive, and `restore` takes it back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from fourbit.errors import UserError
from fourbit.ops import Contraction, LayerSpec, LayerState, Products
from fourbit.quantizers import require_numbers

SWAPS: dict[type[nn.Module], type[nn.Module]] = {}
"""torch class -> quantized class."""

_FOREIGN = {
    ("transformers.pytorch_utils", "Conv1D"): "fourbit.nn._transformers",
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"): "fourbit.nn._falcon",
}
"""Classes of other libraries: the module that has their twin, imported when a model has such a layer."""

_DECORATED = {"transformers.integrations.moe": "fourbit.nn._experts"}
"""Modules of other libraries whose decorators put a `forward` of their own into a class: the module that makes its twin."""


def learn_class(cls: type[nn.Module]) -> None:
    """Enter the twin of a class of another library, if there is one, into `SWAPS`."""
    module = _FOREIGN.get((cls.__module__, cls.__name__))
    if module is not None and cls not in SWAPS:
        importlib.import_module(module)
    maker = _DECORATED.get(getattr(getattr(cls, "forward", None), "__globals__", {}).get("__name__", ""))
    if maker is not None and cls not in SWAPS:
        importlib.import_module(maker).learn(cls)


Q = TypeVar("Q", bound="type[nn.Module]")


def swaps(torch_class: type[nn.Module]) -> Callable[[Q], Q]:
    """Class decorator: the decorated layer replaces `torch_class` in `convert`."""

    def enter(quantized_class: Q) -> Q:
        SWAPS[torch_class] = quantized_class
        return quantized_class

    return enter


def traced(layer: nn.Module, input: Any, *others: Any) -> Any:
    """The first question of every `forward`: None, except in a symbolic trace (torch.fx), of which a layer is one node, as
    torch's layers are.

    Raises:
        UserError: in torch.jit.trace, which cannot record it.
    """
    if isinstance(input, Proxy):
        tracer: Any = input.tracer
        while others and others[-1] is None:  # was not given
            others = others[:-1]
        return tracer.create_proxy("call_module", tracer.path_of_module(layer), (input, *others), {})
    if torch._C._get_tracing_state() is not None:
        raise UserError(
            "torch.jit.trace cannot record quantized layers: use torch.export, or take the conversion back with "
            "restore(model)"
        )
    return None


class QuantizedLayer(nn.Module):
    """Mixin of every quantized layer. The constructors take torch's arguments, and by keyword:

    Args:
        spec: the six slots; by default nothing is quantized.
        seed, index: coordinates of the layer's random words; layers of one model need different indices (`convert` numbers
            them).
        products: how backends may multiply, "fast" or "exact" (see `fourbit.ops.Products`).
    """

    quant: LayerState

    def __prepare_scriptable__(self) -> Any:
        """What torch.jit.script is to compile."""
        raise UserError(
            "torch.jit.script cannot compile quantized layers: use torch.export, or take the conversion back with "
            "restore(model)"
        )

    def __init__(
        self,
        *args: Any,
        spec: LayerSpec | None = None,
        seed: int = 0,
        index: int = 0,
        products: Products = "fast",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        self.attach(spec or LayerSpec(), seed, index, products)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As torch's."""
        if "." in name:
            raise UserError(
                f"torch's parallelize_module divides layers before they are quantized: call it first, and convert behind it "
                f"({type(self).__name__} has {name} for itself)"
            )
        super().register_parameter(name, param)

    @property
    def spec(self) -> LayerSpec:
        """The six slots."""
        return self.quant.spec

    @property
    def num_channels(self) -> int:
        """Output channels."""
        for name in ("out_features", "out_channels"):
            if hasattr(self, name):
                return getattr(self, name)
        return 1

    def attach(self, spec: LayerSpec, seed: int = 0, index: int = 0, products: Products = "fast") -> None:
        """Give the layer a spec and fresh state; clip values are frozen if the weight is."""
        self.quant = LayerState(spec, self.num_channels, seed, index, products)
        with torch.enable_grad():  # a weight that is computed from parameters says whether they are trained
            weight = getattr(self, "weight", None)
        if isinstance(weight, Tensor):
            self.quant.to(weight.device)
            if not weight.requires_grad:
                self.quant.freeze()
        self.quant.train(self.training)

    def contraction(self) -> Contraction:
        """The bilinear map that the layer computes. It reads torch's attributes only, so that `explain` can ask it of a
        layer that is not converted."""
        raise TypeError(f"{type(self).__name__} defines no contraction")

    def extra_repr(self) -> str:
        """torch's description plus the operands."""
        spec = self.spec
        return f"{super().extra_repr()}; x: {spec.x_fprop}; w: {spec.w_fprop}; g: {spec.g_dgrad} | {spec.g_wgrad}"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by name, in order of definition; a shared layer appears once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def nonfinite_layers(model: nn.Module) -> dict[str, dict[str, int]]:
    """Layers that met NaN or infinity: {layer: {"x": count, "w": count, "g": count}}, counted in tensors."""
    counts = {name: layer.quant.nonfinite for name, layer in quantized_layers(model).items()}
    if not counts:
        return {}
    return {
        name: dict(zip("xwg", row, strict=True))
        for name, row in zip(counts, _fetch(list(counts.values())), strict=True)
        if any(row)
    }


def _fetch(tensors: list[Tensor]) -> list[list[int]]:
    return torch.stack([t.to(tensors[0].device) for t in tensors]).tolist()


def float_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict without what quantization added: it loads into the unconverted model, strictly."""
    added = tuple(f"{name}.quant." if name else "quant." for name in quantized_layers(model))
    return {key: value for key, value in model.state_dict().items() if not (added and key.startswith(added))}


def upgraded(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A state_dict of an earlier version in today's form (`load_state_dict` takes both)."""
    found = dict(tensors)
    for name, layer in quantized_layers(model).items():
        layer.quant.upgrade(found, f"{name}.quant." if name else "quant.")
    return found


def require_input(x: Tensor, layer: nn.Module, axis: int, size: int, num_dims: tuple[int, ...] = ()) -> None:
    """Reject an input that the layer cannot multiply, in a sentence that says what it takes."""
    name = type(layer).__name__
    require_numbers(x, name)
    if (num_dims and x.dim() not in num_dims) or x.dim() < -axis or x.shape[axis] != size:
        axes = f" and {' or '.join(map(str, num_dims))} axes" if num_dims else ""
        raise UserError(
            f"{name} got an input of shape {tuple(x.shape)}, but needs {size} elements on axis {axis}{axes}"
        )
