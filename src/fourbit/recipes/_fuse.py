"""Finding chains of convolution, batch normalization, residual and activation in a model, and running each as one.

A module is traced symbolically (torch.fx); where its own code cannot be traced, its children are. In the trace, each chain
becomes one call of `fourbit.nn.conv_norm_act`. The module keeps its class's name, parameters and state_dict: only its
`forward` runs the rewritten code, in training, and its own code everywhere else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import Target

from fourbit.nn import Composed, Conv2d, Quantized, conv_norm_act, run_layer

_ADD = (operator.add, operator.iadd, torch.add)
_RELU = {F.relu: math.inf, torch.relu: math.inf, F.relu6: 6.0, torch.relu_: math.inf}


class _Plain(dict[type, bool]):
    """Whether a class is one that code may branch on."""

    def __missing__(self, cls: type) -> bool:
        found = self[cls] = issubclass(cls, (bool, int, float, str, type(None)))
        return found


_plain = _Plain()


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.through: list[nn.Module] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = isinstance(m, (Quantized, Composed)) or super().is_leaf_module(m, module_qualified_name)
        if not leaf:
            self.through.append(m)
        return leaf


class Fused:
    """Mixin of modules whose `forward` was rewritten; `_fused` holds the code, made at the first call in training."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own."""
        own = super().forward  # type: ignore[misc]
        if not self.training or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return own(*args, **kwargs)
        found = self.__dict__.get("_fused")
        if found is None or found[1] != _settings(found[2]):
            found = self.__dict__["_fused"] = _rewrite(self)  # type: ignore[arg-type]
        function = found[0]
        return own(*args, **kwargs) if function is None else function(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__dict__.items() if key != "_fused"}
        return _rebuild, (original_module_class(self),), state  # type: ignore[arg-type]


def _rebuild(cls: type[nn.Module]) -> nn.Module:
    fused = _fused_class(cls)
    return fused.__new__(fused)


@cache
def _fused_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (Fused, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def original_module_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before it was fused."""
    cls = type(module)
    return cls.__mro__[2] if isinstance(module, Fused) else cls


def fuse(model: nn.Module) -> list[nn.Module]:
    """Rewrite the outermost modules that can be traced and have chains; returns them."""
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()) or isinstance(model, (Fused, Quantized)):
        return []
    if _rewrite(model)[0] is not None:
        object.__setattr__(model, "__class__", _fused_class(type(model)))
        return [model]
    return [fused for child in model.children() for fused in fuse(child)]


def unfuse(model: nn.Module) -> None:
    """Take every rewriting back."""
    for module in model.modules():
        if isinstance(module, Fused):
            module.__dict__.pop("_fused", None)
            object.__setattr__(module, "__class__", original_module_class(module))


def _settings(modules: list[nn.Module]) -> list[dict[str, Any]]:
    """What the code of traced modules may have branched on: their plain attributes."""
    return [{k: v for k, v in m.__dict__.items() if _plain[v.__class__]} for m in modules]


def _rewrite(module: nn.Module) -> tuple[Callable[..., Any] | None, list[dict[str, Any]], list[nn.Module]]:
    """The rewritten forward (None: nothing found, or not traceable), and what it depends on."""
    cls, tracer = type(module), _Tracer()
    training = module.training
    try:
        module.__class__ = original_module_class(module)
        module.training = True
        graph = tracer.trace(module)
    except Exception:  # whatever the module's own code does with a proxy: it then stays as it is
        return None, [], []
    finally:
        module.training = training
        module.__class__ = cls
    through = [module, *tracer.through]
    if not sum(_chain(graph, module, node) for node in list(graph.nodes)):
        return None, _settings(through), through
    graph.lint()
    code = fx.GraphModule(module, graph)
    return type(code).forward, _settings(through), through


def _module(root: nn.Module, node: Any) -> nn.Module | None:
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    return root.get_submodule(str(node.target))


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _residual(node: fx.Node | None, branch: fx.Node) -> fx.Node | None:
    """The other operand, if `node` adds two tensors of which one is `branch`."""
    if node is None or node.kwargs or len(node.args) != 2:
        return None
    if not (
        (node.op == "call_function" and node.target in _ADD)
        or (node.op == "call_method" and node.target in ("add", "add_"))
    ):
        return None
    left, right = node.args
    other = right if left is branch else left
    return other if isinstance(other, fx.Node) and other is not branch else None


def _activation(root: nn.Module, node: fx.Node | None) -> float | None:
    """Where the activation that `node` is caps its results; None if it is none of those that are fused."""
    if node is None:
        return None
    if node.op == "call_function" and node.target in _RELU and len(node.args) == 1 and set(node.kwargs) <= {"inplace"}:
        return _RELU[node.target]  # type: ignore[index]
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return math.inf
    module = _module(root, node)
    if type(module) is nn.ReLU:
        return math.inf
    return 6.0 if type(module) is nn.ReLU6 else None


def _chain(graph: fx.Graph, root: nn.Module, norm: fx.Node) -> bool:
    """Rewrite the chain around a batch normalization, if `norm` is one."""
    if type(_module(root, norm)) is not nn.BatchNorm2d or not isinstance(norm.args[0], fx.Node):
        return False
    before = norm.args[0]
    conv, x = _convolution(root, before) if _only_user(before) is norm else (None, before)
    last, residual = norm, _residual(_only_user(norm), norm)
    if residual is not None:
        last = next(iter(norm.users))
    cap = _activation(root, _only_user(last))
    if cap is not None:
        last = next(iter(last.users))
    takers = [user for user in last.users if isinstance(_module(root, user), Conv2d)]
    behind = takers[0] if takers else None
    if conv is None and behind is None:
        return False
    with graph.inserting_before(last):

        def attribute(target: Target | None) -> fx.Node | None:
            return None if target is None else graph.get_attr(str(target))

        taker = None if behind is None else behind.target
        arguments = (attribute(conv), attribute(norm.target), x, cap, residual, attribute(taker))
        want_out = len(last.users) > (behind is not None)
        both = graph.call_function(conv_norm_act, (*arguments, want_out))
        out = graph.call_function(operator.getitem, (both, 0))
        operand = graph.call_function(operator.getitem, (both, 1))
    last.replace_all_uses_with(out)
    if behind is not None:
        with graph.inserting_before(behind):
            layer = graph.call_function(run_layer, (graph.get_attr(str(behind.target)), operand))
        behind.replace_all_uses_with(layer)
        graph.erase_node(behind)
    for node in dict.fromkeys((out, operand, last, *_between(last, norm), norm, before)):
        if not node.users and not (node is before and conv is None):
            graph.erase_node(node)
    return True


def _convolution(root: nn.Module, node: fx.Node) -> tuple[Target | None, Any]:
    """Name and input of the convolution that `node` runs; None and the node itself if it runs none."""
    if isinstance(_module(root, node), Conv2d):
        return node.target, node.args[0]
    if node.op == "call_function" and node.target is run_layer:
        return node.args[0].target, node.args[1]  # type: ignore[union-attr]
    return None, node


def _between(last: fx.Node, norm: fx.Node) -> list[fx.Node]:
    """Nodes on the way from `last` back to `norm`."""
    found, node = [], last
    while node is not norm:
        found.append(node)
        node = next(a for a in node.all_input_nodes if a is norm or _leads(a, norm))
    return found


def _leads(node: fx.Node, norm: fx.Node) -> bool:
    return norm in node.all_input_nodes
