"""Batch normalization of evaluation mode, folded into the layer in front of it.

    gamma (w * x + b - mean) / sqrt(var + eps) + beta  =  (f w) * x + (b - mean) f + beta        f = gamma / sqrt(var + eps)

per output channel. A packed weight keeps its codes and takes |f| into the scales of its rows, which costs each of them one
rounding in float32; where f is negative the codes change sign, and where it is 0 they become 0. A row that holds a number
without an opposite (-8 of int4) and scales in a format of their own (E8M0, E4M3) cannot be folded into; such layers keep their
normalization. The rounding of a layer's result to 16 bits, which lies between the two, is left out of a folded layer.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fourbit.exports._trace import traced
from fourbit.exports._weights import LAYERS, PackedWeight, weight_of
from fourbit.nn import QuantizedLayer

PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
FLOAT32 = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class Fold:
    """A normalization to be folded into the layer in front of it.

    Args:
        norm: its name.
        factor: f, float32 [output channels].
        bias: of the folded layer, float32 [output channels].
    """

    norm: str
    factor: Tensor
    bias: Tensor

    def into(self, weight: Tensor) -> Tensor:
        """f w, in float32."""
        return weight * self.factor.view(-1, *(1,) * (weight.dim() - 1))

    def into_packed(self, weight: PackedWeight) -> PackedWeight:
        """f w, in 4 bits: codes of the same format, a scale for each row."""
        factor = self.factor.view(-1, 1, 1)
        scales = weight.scales * torch.where(factor == 0, 1, factor.abs())  # no scale of 0, which runtimes divide by
        return replace(weight, values=weight.values * factor.sign() + 0.0, scales=scales)

    def into_layer(self, layer: Any) -> Any:
        """A copy of a layer in full precision, with weight f w and the bias."""
        folded = copy.copy(layer)
        folded._parameters = {
            "weight": nn.Parameter(self.into(layer.weight.detach().cpu().float())),
            "bias": nn.Parameter(self.bias),
        }
        return folded


@dataclass(frozen=True)
class Folds:
    """What is folded in an export.

    Args:
        of: by the name of the layer.
        left: normalizations that stay, by name, with the reason.
    """

    of: Mapping[str, Fold] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)

    @property
    def norms(self) -> set[str]:
        """The names of the normalizations that are gone."""
        return {fold.norm for fold in self.of.values()}

    def into_state(self, tensors: MutableMapping[str, Tensor]) -> None:
        """Fold in a state_dict, in place: weights as of layers in full precision, biases; normalizations lose their entries."""
        for name, fold in self.of.items():
            tensors[f"{name}.weight"] = fold.into(tensors[f"{name}.weight"].float())
            tensors[f"{name}.bias"] = fold.bias.clone()
        for key in [key for key in tensors if key.rpartition(".")[0] in self.norms]:
            del tensors[key]


def packed_weights(
    layers: Mapping[str, QuantizedLayer], tensors: MutableMapping[str, Tensor], folds: Folds
) -> Iterator[tuple[str, QuantizedLayer, PackedWeight]]:
    """The layers whose weights have 4 bits, by name, with what is folded into them.

    `tensors` is the state_dict; weights of more bits become there what they are rounded to, and normalizations are folded.

    Raises:
        UserError: as `weight_of`.
    """
    folds.into_state(tensors)
    for name, layer in layers.items():
        if layer.spec.is_identity:
            continue
        weight, fold = weight_of(name, layer), folds.of.get(name)
        if isinstance(weight, PackedWeight):
            yield name, layer, weight if fold is None else fold.into_packed(weight)
        else:
            tensors[f"{name}.weight"] = weight.clone() if fold is None else fold.into(weight)


def find_folds(model: nn.Module, input_shape: Sequence[int] | None, bounds: tuple[float, float] = FLOAT32) -> Folds:
    """The batch normalizations of a model in evaluation mode that fold into the layer in front of them.

    Args:
        model: as it is exported.
        input_shape: as of `export`.
        bounds: of the scales of rows.

    Raises:
        UserError: the model cannot be traced, or as `weight_of`.
    """
    graph = traced(model, "folding batch normalization")
    modules = dict(model.named_modules())
    objects = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    shared = {number for number, count in objects.items() if count > 1}
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    of: dict[str, Fold] = {}
    left: dict[str, str] = {}
    for name, nodes in calls.items():
        norm = modules[name]
        if not isinstance(norm, NORMS):
            continue
        before = nodes[0].args[0] if nodes[0].args else None
        layer = str(before.target) if isinstance(before, fx.Node) and before.op == "call_module" else ""
        if reason := _objection(modules, calls, nodes, layer, input_shape, shared):
            left[name] = reason
            continue
        fold = _fold(name, norm, modules[layer])
        if reason := _unfit(layer, modules[layer], fold, bounds):
            left[name] = reason
        else:
            of[layer] = fold
    return Folds(of, left)


def _objection(
    modules: Mapping[str, nn.Module],
    calls: Mapping[str, list[fx.Node]],
    nodes: Sequence[fx.Node],
    layer: str,
    input_shape: Sequence[int] | None,
    shared: Container[int],
) -> str:
    """Why a normalization does not follow a layer that it can fold into, to stand behind its name; "" where it does."""
    norm, found = modules[str(nodes[0].target)], modules.get(layer) if layer else None
    if norm.running_mean is None:
        return "has no running statistics"
    if found is None or not isinstance(found, (*LAYERS, *PLAIN)):
        return "has neither a convolution nor a linear layer directly in front of it"
    if len(nodes) > 1 or len(calls[layer]) > 1 or any(id(m) in shared for m in (norm, found)):
        return f"or {layer} is used more than once, or has two names"
    if len(calls[layer][0].users) > 1:
        return f"is not all that the result of {layer} goes to"
    flat = not isinstance(found, nn.Linear) or _is_matrix(modules, calls[layer][0].args[0], input_shape)
    if not flat or len(found.weight) != norm.num_features:  # type: ignore[arg-type]
        return f"may normalize another axis than the features of {layer}"
    return ""


_ELEMENTWISE = (nn.ReLU, nn.ReLU6, nn.Dropout, nn.Identity, nn.Linear, nn.BatchNorm1d)
_FUNCTIONS = {F.relu, torch.relu, F.relu6, F.dropout, torch.add, operator.add, operator.iadd}


def _is_matrix(modules: Mapping[str, nn.Module], node: object, input_shape: Sequence[int] | None) -> bool:
    """Whether a node surely has two axes: batch and features."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "placeholder":
        return input_shape is not None and len(input_shape) == 1
    if node.op == "call_module":
        module = modules[str(node.target)]
        if isinstance(module, nn.Flatten):
            return (module.start_dim, module.end_dim) == (1, -1)
        follows = isinstance(module, _ELEMENTWISE)
    elif node.target in (torch.flatten, "flatten"):
        names = {"start_dim": 0, "end_dim": -1} | dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))
        return {**names, **{k: v for k, v in node.kwargs.items() if k in names}} == {"start_dim": 1, "end_dim": -1}
    else:
        follows = node.target in _FUNCTIONS or node.target in ("relu", "relu_")
    return follows and all(_is_matrix(modules, n, input_shape) for n in node.all_input_nodes)


def _fold(name: str, norm: Any, layer: Any) -> Fold:
    """Found in float64, and rounded once."""
    mean, var, gamma, beta, bias = (
        None if t is None else t.detach().cpu().double()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias, layer.bias)
    )
    assert mean is not None and var is not None
    factor = (1.0 if gamma is None else gamma) / (var + norm.eps).sqrt()
    shift = ((0.0 if bias is None else bias) - mean) * factor + (0.0 if beta is None else beta)
    return Fold(name, factor.float(), shift.float())


def _unfit(name: str, layer: nn.Module, fold: Fold, bounds: tuple[float, float]) -> str:
    """Why the weight cannot take a factor for each row; "" where it can."""
    if not (torch.isfinite(fold.factor) & torch.isfinite(fold.bias)).all():
        return f"would make the weight or the bias of {name} infinite"
    if not isinstance(layer, QuantizedLayer) or layer.spec.is_identity:
        return ""
    weight = weight_of(name, layer)
    if not isinstance(weight, PackedWeight):
        return ""
    if weight.scale_format is not None:
        return f"has factors that the {weight.scale_format.name} scales of {name} cannot take"
    folded = fold.into_packed(weight)
    if (alone := ~torch.isin(folded.values, torch.tensor(weight.format.grid))).any():
        number = weight.values[alone][0]
        return f"has a negative factor for {number:g} in {name}, which has no opposite in {weight.format.name}"
    scales = weight.tensor_scale * folded.scales
    if ((scales >= bounds[0]) & (scales <= bounds[1])).all():
        return ""
    least, most = float(scales.min()), float(scales.max())
    return f"would make scales of {name} {least:.3g} to {most:.3g}, beyond {bounds[0]:.3g} to {bounds[1]:.3g}"
