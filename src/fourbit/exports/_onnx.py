"""ONNX (opset 21): 4-bit weights behind DequantizeLinear, 4-bit inputs between QuantizeLinear and DequantizeLinear.

    x ── clip ── QuantizeLinear (UINT4 or INT4) ── DequantizeLinear ──┐
                                 w INT4 ── DequantizeLinear ── Conv or MatMul ── rounding to 16 bits ── Add bias

The network is traced by torch.fx, in which a layer is one node; `_onnx_nodes.py` has what each node becomes. Where a recipe
rounds operands or results to FP16 1-6-9, the graph does so too, by Veltkamp's splitting: with c = 2^14 + 1 and v = c x, the
number v - (v - x) is x to ten significant bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, fx, nn

from fourbit._version import __version__
from fourbit.errors import UserError
from fourbit.exports._fold import Fold, Folds
from fourbit.exports._onnx_nodes import FUNCTIONS, METHODS, MODULES, Graph
from fourbit.exports._target import Target, register
from fourbit.exports._trace import traced
from fourbit.exports._weights import (
    Activation,
    PackedWeight,
    activation_objection,
    activation_of,
    evaluating,
    weight_objection,
    weight_of,
)
from fourbit.formats import FloatFormat, Format
from fourbit.nn import Linear, QuantizedLayer
from fourbit.ops import LayerSpec
from fourbit.quantizers import FixedScale, has_integer_codes

FILE = "model.onnx"
OPSET = 21


def _is_wide_float(format: Format) -> bool:
    """Whether rounding to it is rounding to so many significant bits, for numbers of ordinary size."""
    return isinstance(format, FloatFormat) and format.radix == 2 and format.bits == 16


def _objection(spec: LayerSpec) -> str:
    if found := weight_objection(spec):
        return f"weight {found}"
    if spec.accumulation is not None:
        return "sums are rounded after each addition, which ONNX cannot say"
    w, x = spec.w_fprop, spec.x_fprop
    if w is not None and len(w.format.grid) <= 16 and not has_integer_codes(w.format):
        return f"weight is {w.format.name}, where ONNX has integers of 4 bits"
    if x is not None:
        if found := activation_objection(x):
            return f"input {found}, where ONNX has constants"
        if not (has_integer_codes(x.format) or (_is_wide_float(x.format) and x.scaling == FixedScale())):
            return f"input is {x.format.name}, where ONNX has integers of 4 bits"
    if spec.output is not None and not _is_wide_float(spec.output):
        return f"results are rounded to {spec.output.name}, which ONNX cannot say"
    return ""


def _write(model: nn.Module, folder: Path, input_shape: Sequence[int] | None, folds: Folds) -> None:
    import onnx

    with evaluating(model):
        graph, names = Graph(), {}
        sizes = _input_sizes(model) if input_shape is None else ["batch", *input_shape]
        for node in traced(model, "--to onnx").nodes:
            names[node] = _emit(graph, model, node, names, sizes, folds)
        made = onnx.helper.make_graph(graph.nodes, "fourbit", graph.inputs, graph.outputs, graph.initializers)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    built = onnx.helper.make_model(made, opset_imports=opsets, producer_name="fourbit", producer_version=__version__)
    built.ir_version = 10  # the first with opset 21, which every runtime of it reads
    built = onnx.shape_inference.infer_shapes(built)  # of the result
    onnx.checker.check_model(built, full_check=True)
    onnx.save(built, folder / FILE)


def _emit(
    graph: Graph, model: nn.Module, node: fx.Node, names: dict[fx.Node, Any], sizes: list[str | int], folds: Folds
) -> Any:
    """What stands for the result of a node: the name of a tensor."""
    if node.op == "placeholder":
        if graph.inputs:
            raise UserError("the network has several inputs: --to onnx is for networks with one.")
        return graph.input(sizes)
    if node.op == "output":
        if not isinstance(node.args[0], fx.Node):
            raise UserError("the network has several results: --to onnx is for networks with one.")
        return graph.output(names[node.args[0]])
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: names[n])
    if node.op == "get_attr":
        value = model
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return graph.constant(value.detach().cpu().numpy(), str(node.target))
    if node.op == "call_module":
        module, name = model.get_submodule(str(node.target)), str(node.target)
        if name in folds.norms:
            return args[0]
        fold = folds.of.get(name)
        if isinstance(module, QuantizedLayer) and not module.spec.is_identity:
            return _layer(graph, name, module, str(args[0]), fold)
        if fold is not None:
            module = fold.into_layer(module)
        handler = next((MODULES[c] for c in type(module).__mro__ if c in MODULES), None)
        if handler is not None:
            return handler(graph, name, module, *args, **kwargs)
        what = type(module).__name__
    else:
        table = METHODS if node.op == "call_method" else FUNCTIONS
        handler = table.get(node.target)
        if handler is not None:
            return handler(graph, *args, **kwargs)
        what = getattr(node.target, "__name__", str(node.target))
    known = sorted({*(c.__name__ for c in MODULES), *METHODS, *(f.__name__ for f in FUNCTIONS)})
    raise UserError(f"--to onnx does not know {what}, which the network uses; it knows {', '.join(known)}.")


def _input_sizes(model: nn.Module) -> list[str | int]:
    """As the first layer says: batch, channels and so on, with names for what is open."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            return ["batch", module.in_channels, *("depth", "height", "width")[3 - len(module.stride) :]]
        if isinstance(module, nn.Linear):
            return ["batch", module.in_features]
    raise UserError("the network has neither a convolution nor a linear layer: nothing is there to export.")


def _layer(graph: Graph, name: str, layer: QuantizedLayer, x: str, fold: Fold | None) -> str:
    """A quantized linear layer or convolution."""
    spec = layer.spec
    weight, activation = weight_of(name, layer), activation_of(name, layer)
    if activation is not None:
        x = _quantized_input(graph, name, x, activation)
    if isinstance(weight, PackedWeight):
        weight = weight if fold is None else fold.into_packed(weight)
        w = _packed(graph, name, weight, transposed=isinstance(layer, Linear))
    else:
        weight = weight if fold is None else fold.into(weight)
        numbers = weight.t() if isinstance(layer, Linear) else weight
        w = graph.constant(np.ascontiguousarray(numbers.numpy()), f"{name}.weight")
    y = graph.add("MatMul", x, w, name=name) if isinstance(layer, Linear) else graph.convolution(name, layer, x, w)
    if spec.output is not None and fold is None:
        y = _rounded(graph, y, spec.output)
    bias = getattr(layer, "bias", None) if fold is None else fold.bias
    if bias is None:
        return y
    shape = (-1,) if isinstance(layer, Linear) else (-1, *(1,) * len(layer.stride))  # type: ignore[arg-type]
    return graph.add("Add", y, graph.constant(bias.detach().view(shape).cpu().numpy(), f"{name}.bias"))


def _quantized_input(graph: Graph, name: str, x: str, found: Activation) -> str:
    format = found.format
    if not has_integer_codes(format):
        return _rounded(graph, x, format)
    low, high = (-8, 7) if format.signed else (0, 15)
    if (format.min, format.max) != (low, high):  # QuantizeLinear saturates at the ends of the type only
        x = graph.clip(x, found.scale * format.min, found.scale * format.max)
    scale = graph.constant(np.float32(found.scale), f"{name}.input_scale")
    zero = graph.nibbles(np.zeros((), np.int8), f"{name}.input_zero_point", format.signed)
    q = graph.add("QuantizeLinear", x, scale, zero)
    return graph.add("DequantizeLinear", q, scale, zero)


def _packed(graph: Graph, name: str, weight: PackedWeight, transposed: bool) -> str:
    """The weight behind DequantizeLinear: with one scale, one for each output channel, or one for each block of inputs."""
    rows, spots, k = weight.values.shape
    values = weight.natural(weight.values)
    scales = weight.tensor_scale * weight.scales
    axis = 1 if transposed else 0
    extra: dict[str, Any] = {}
    if scales.numel() == 1:
        scales = scales.reshape(())
    elif weight.block is None and scales.shape[1] == 1:
        scales, extra = scales.expand(rows, 1, 1).flatten(), {"axis": axis}
    else:
        if spots > 1:
            scales = scales.expand(rows, spots, -1)
        kernel = weight.shape[2:]
        scales = scales.expand(rows, -1, -1).reshape(rows, *kernel, -1).movedim(-1, 1)
        scales = scales.t() if transposed else scales
        extra = {"axis": 0 if transposed else 1, "block_size": weight.block or k}
    values = values.t() if transposed else values
    q = graph.nibbles(values.contiguous().numpy().astype(np.int8), f"{name}.weight", weight.format.signed)
    return graph.add(
        "DequantizeLinear", q, graph.constant(scales.contiguous().numpy(), f"{name}.weight_scale"), **extra
    )


def _rounded(graph: Graph, x: str, format: Format) -> str:
    """To the significant bits of a format, saturated at its ends."""
    assert isinstance(format, FloatFormat)
    split = graph.constant(np.float32(2.0 ** (23 - format.mantissa_bits) + 1), "split")
    v = graph.add("Mul", x, split)
    high = graph.add("Sub", v, graph.add("Sub", v, x))
    return graph.clip(high, format.min, format.max)


register(Target("onnx", "a graph of ONNX with INT4 weights and inputs", _objection, _write, FILE, "onnx"))
