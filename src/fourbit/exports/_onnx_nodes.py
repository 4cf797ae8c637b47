"""What the nodes of a traced network become in ONNX."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.errors import UserError


class Graph:
    """An ONNX graph under construction; methods return names of tensors."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.initializers: list[Any] = []
        self._used: set[str] = set()

    def fresh(self, name: str) -> str:
        """The name, or one like it that is not taken."""
        found, number = name, 1
        while found in self._used:
            found, number = f"{name}_{number}", number + 1
        self._used.add(found)
        return found

    def input(self, sizes: list[str | int]) -> str:
        """The input, float32."""
        from onnx import TensorProto, helper

        name = self.fresh("input")
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
        return name

    def output(self, name: str) -> str:
        """The result, float32, of open shape."""
        from onnx import TensorProto, helper

        found = self.fresh("output")
        self.nodes.append(helper.make_node("Identity", [name], [found]))
        self.outputs.append(helper.make_tensor_value_info(found, TensorProto.FLOAT, None))
        return found

    def add(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """A node with one result."""
        from onnx import helper

        result = self.fresh(f"{name or op}_out")
        self.nodes.append(helper.make_node(op, list(inputs), [result], name=self.fresh(name or op), **attributes))
        return result

    def constant(self, array: Any, name: str) -> str:
        """An initializer."""
        from onnx import numpy_helper

        found = self.fresh(name)
        self.initializers.append(numpy_helper.from_array(np.asarray(array), found))
        return found

    def nibbles(self, array: Any, name: str, signed: bool) -> str:
        """An initializer of INT4 or UINT4, two a byte, the first in the low nibble."""
        from onnx import TensorProto, helper

        found, flat = self.fresh(name), array.reshape(-1).astype(np.int8).view(np.uint8) & 15
        flat = np.pad(flat, (0, flat.size % 2))
        data = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8).tobytes()
        kind = TensorProto.INT4 if signed else TensorProto.UINT4
        self.initializers.append(helper.make_tensor(found, kind, array.shape, data, raw=True))
        return found

    def clip(self, x: str, low: float, high: float) -> str:
        """Between two numbers. Not by Clip, in front of which onnxruntime 1.32 expects QuantizeLinear to have 8 bits."""
        x = self.add("Max", x, self.constant(np.float32(low), "low"))
        return self.add("Min", x, self.constant(np.float32(high), "high"))

    def convolution(self, name: str, layer: Any, x: str, w: str, *bias: str) -> str:
        """Conv with the geometry of a torch layer."""
        if layer.padding_mode != "zeros":
            raise UserError(f"{name} pads by {layer.padding_mode}: --to onnx knows zeros alone.")
        if isinstance(layer.padding, str):
            both = layer._reversed_padding_repeated_twice[::-1]
            pads = [*both[1::2], *both[0::2]]
        else:
            pads = [*layer.padding, *layer.padding]
        geometry = {"strides": layer.stride, "dilations": layer.dilation, "group": layer.groups, "pads": pads}
        return self.add("Conv", x, w, *bias, name=name, kernel_shape=layer.kernel_size, **geometry)


def _array(t: Tensor) -> Any:
    return np.ascontiguousarray(t.detach().float().cpu().numpy())


def _conv(graph: Graph, name: str, m: Any, x: str) -> str:
    bias = () if m.bias is None else (graph.constant(_array(m.bias), f"{name}.bias"),)
    return graph.convolution(name, m, x, graph.constant(_array(m.weight), f"{name}.weight"), *bias)


def _linear(graph: Graph, name: str, m: nn.Linear, x: str) -> str:
    y = graph.add("MatMul", x, graph.constant(_array(m.weight.t()), f"{name}.weight"), name=name)
    return y if m.bias is None else graph.add("Add", y, graph.constant(_array(m.bias), f"{name}.bias"))


def _norm(graph: Graph, name: str, m: Any, x: str) -> str:
    if m.running_mean is None:
        raise UserError(f"{name} has no running statistics, without which its results depend on the batch.")
    weight = torch.ones_like(m.running_mean) if m.weight is None else m.weight
    bias = torch.zeros_like(m.running_mean) if m.bias is None else m.bias
    parts = {"weight": weight, "bias": bias, "running_mean": m.running_mean, "running_var": m.running_var}
    inputs = [graph.constant(_array(t), f"{name}.{key}") for key, t in parts.items()]
    return graph.add("BatchNormalization", x, *inputs, name=name, epsilon=m.eps)


def _tuple(value: Any, count: int = 2) -> list[int]:
    return list(value) if isinstance(value, tuple | list) else [value] * count


def max_pool2d(
    graph: Graph,
    x: str,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> str:
    """torch's."""
    if return_indices:
        raise UserError("a max pool returns indices: --to onnx knows those that do not.")
    shape, pads = _tuple(kernel_size), _tuple(padding)
    strides = _tuple(kernel_size if stride is None else stride)
    sizes: dict[str, Any] = {
        "kernel_shape": shape,
        "strides": strides,
        "pads": [*pads, *pads],
        "dilations": _tuple(dilation),
    }
    return graph.add("MaxPool", x, ceil_mode=int(ceil_mode), **sizes)


def avg_pool2d(
    graph: Graph,
    x: str,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> str:
    """torch's."""
    if ceil_mode or divisor_override is not None:
        raise UserError("an average pool has ceil_mode or a divisor of its own: --to onnx knows those without.")
    shape, pads = _tuple(kernel_size), _tuple(padding)
    strides = _tuple(kernel_size if stride is None else stride)
    sizes: dict[str, Any] = {"kernel_shape": shape, "strides": strides, "pads": [*pads, *pads]}
    return graph.add("AveragePool", x, count_include_pad=int(count_include_pad), **sizes)


def adaptive_avg_pool2d(graph: Graph, x: str, output_size: Any) -> str:
    """To 1x1."""
    if _tuple(output_size) != [1, 1]:
        raise UserError(f"an adaptive pool makes {output_size}: --to onnx knows the one to 1x1.")
    return graph.add("GlobalAveragePool", x)


def flatten(graph: Graph, x: str, start_dim: int = 0, end_dim: int = -1) -> str:
    """From axis 1 on."""
    if (start_dim, end_dim) != (1, -1):
        raise UserError("a flatten begins elsewhere than at axis 1: --to onnx knows that alone.")
    return graph.add("Flatten", x, axis=1)


def relu(graph: Graph, x: str, inplace: bool = False) -> str:
    """max(x, 0)."""
    return graph.add("Relu", x)


def relu6(graph: Graph, x: str, inplace: bool = False) -> str:
    """Between 0 and 6."""
    return graph.clip(x, 0, 6)


def pad(graph: Graph, x: str, pad: tuple[int, ...], mode: str = "constant", value: float | None = None) -> str:
    """With a constant."""
    if mode != "constant":
        raise UserError(f"the network pads by {mode}: --to onnx knows constants alone.")
    lows, highs, count = pad[0::2][::-1], pad[1::2][::-1], len(pad) // 2
    sizes = graph.constant(np.array([*lows, *highs], np.int64), "pads")
    axes = graph.constant(np.arange(-count, 0, dtype=np.int64), "axes")
    return graph.add("Pad", x, sizes, graph.constant(np.float32(value or 0), "value"), axes)


def getitem(graph: Graph, x: str, index: Any) -> str:
    """Slices with a step."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice) for i in index):
        raise UserError("the network takes single elements of a tensor: --to onnx knows slices alone.")
    end = np.iinfo(np.int64).max
    bounds = [(i.start or 0, end if i.stop is None else i.stop, axis, i.step or 1) for axis, i in enumerate(index)]
    bounds = [b for b in bounds if (b[0], b[1], b[3]) != (0, end, 1)]
    if not bounds:
        return x
    columns = zip(("starts", "ends", "axes", "steps"), zip(*bounds, strict=True), strict=True)
    return graph.add("Slice", x, *(graph.constant(np.array(c, np.int64), name) for name, c in columns))


def cat(graph: Graph, tensors: Any, dim: int = 0) -> str:
    """Joined along an axis."""
    return graph.add("Concat", *tensors, axis=dim)


def same(graph: Graph, x: str, *args: Any, **kwargs: Any) -> str:
    """Nothing: dropout in evaluation mode, for example."""
    return x


def _binary(op: str) -> Callable[..., str]:
    def emit(graph: Graph, *both: Any, inplace: bool = False) -> str:
        if len(both) != 2:
            raise UserError(f"the network calls {op.lower()} with more than two tensors: --to onnx knows it with two.")
        return graph.add(op, *(v if isinstance(v, str) else graph.constant(np.float32(v), "number") for v in both))

    return emit


def _module(function: Callable[..., str], *fields: str) -> Callable[..., str]:
    """A module that calls a function with some of its fields."""

    def emit(graph: Graph, name: str, module: nn.Module, x: str) -> str:
        return function(graph, x, *(getattr(module, field) for field in fields))

    return emit


_POOL = ("kernel_size", "stride", "padding")

MODULES: dict[type[nn.Module], Callable[..., str]] = {
    nn.Conv1d: _conv,
    nn.Conv2d: _conv,
    nn.Conv3d: _conv,
    nn.Linear: _linear,
    nn.BatchNorm1d: _norm,
    nn.BatchNorm2d: _norm,
    nn.BatchNorm3d: _norm,
    nn.ReLU: _module(relu),
    nn.ReLU6: _module(relu6),
    nn.MaxPool2d: _module(max_pool2d, *_POOL, "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: _module(avg_pool2d, *_POOL, "ceil_mode", "count_include_pad", "divisor_override"),
    nn.AdaptiveAvgPool2d: _module(adaptive_avg_pool2d, "output_size"),
    nn.Flatten: _module(flatten, "start_dim", "end_dim"),
    nn.Identity: _module(same),
    nn.Dropout: _module(same),
    nn.Dropout2d: _module(same),
}
FUNCTIONS: dict[Any, Callable[..., str]] = {
    F.relu: relu,
    torch.relu: relu,
    F.relu6: relu6,
    F.max_pool2d: max_pool2d,
    F.avg_pool2d: avg_pool2d,
    F.adaptive_avg_pool2d: adaptive_avg_pool2d,
    F.dropout: same,
    F.pad: pad,
    torch.flatten: flatten,
    torch.cat: cat,
    torch.add: _binary("Add"),
    operator.add: _binary("Add"),
    operator.iadd: _binary("Add"),
    operator.mul: _binary("Mul"),
    operator.getitem: getitem,
}
METHODS: dict[Any, Callable[..., str]] = {"flatten": flatten, "relu": relu, "contiguous": same, "relu_": relu}
