"""What a layer multiplies in evaluation mode: its weight as 4-bit codes with scales, and the scale of its input.

    w[row, spot, k] = tensor_scale * scale[row or 0, spot or 0, k // block] * grid value of codes[row, spot, k]

Rows are output channels, spots the positions of a kernel (one in a linear layer), k the input channels of a group. Weights
whose formats have more than 4 bits (FP16 1-6-9 of first and last layers) are kept as the float32 numbers that they are rounded
to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.nn import Conv1d, Conv2d, Conv3d, Linear, QuantizedLayer, quantized_layers
from fourbit.ops import LayerSpec, oriented, quantize_operand
from fourbit.quantizers import FixedScale, Packed, QuantSpec, Statistics

LAYERS = (Linear, Conv1d, Conv2d, Conv3d)


@dataclass(frozen=True)
class PackedWeight:
    """A weight in 4 bits.

    Args:
        shape: as the layer has it, [out, in / groups, *kernel].
        format: of the codes.
        values: grid values, float32 [rows, spots, k].
        scales: float32 [rows or 1, spots or 1, blocks of k].
        block: neighbours along k that share a scale; None: all of them.
        scale_format: whose numbers the scales are; None: float32.
        tensor_scale: float32, 0-d.
    """

    shape: tuple[int, ...]
    format: Format
    values: Tensor
    scales: Tensor
    block: int | None
    scale_format: Format | None
    tensor_scale: Tensor

    @property
    def codes(self) -> Tensor:
        """The code of each number, uint8 [rows, spots, k]: the format's own bit patterns."""
        return codes_of(self.values, self.format)

    @property
    def each(self) -> Tensor:
        """The scale of each number without that of the tensor, broadcastable against `values`."""
        if self.block is None:
            return self.scales
        return self.scales.repeat_interleave(self.block, 2)[:, :, : self.values.shape[2]]

    def numbers(self) -> Tensor:
        """The weight in float32, in the layer's shape."""
        return self.natural(self.tensor_scale * (self.each * self.values))

    def natural(self, t: Tensor) -> Tensor:
        """[rows, spots, k] in the layer's shape."""
        rows, k, *kernel = self.shape
        return t.reshape(rows, *kernel, k).movedim(-1, 1).contiguous()


def codes_of(values: Tensor, format: Format) -> Tensor:
    """Codes of grid values, uint8."""
    grid = torch.tensor(format.grid, dtype=torch.float32)
    codes = torch.tensor([format.encode(v) for v in format.grid], dtype=torch.uint8)
    return codes[torch.bucketize(values.contiguous(), grid)]


def weight_of(name: str, layer: QuantizedLayer) -> PackedWeight | Tensor:
    """The weight that `layer` multiplies in evaluation mode; a Tensor where it has more than 4 bits.

    Raises:
        UserError: a layer of another kind, or a weight that no product without this library could have.
    """
    spec, state = layer.spec, layer.quant
    require_plain(name, layer)
    wanted = spec.w_fprop
    weight = layer.weight.detach().to("cpu", torch.float32)  # type: ignore[union-attr,operator]
    if wanted is None:
        return weight
    contraction = layer.contraction()
    with torch.no_grad(), state.preserved():
        m, toward = contraction.prepare(weight, "w"), state.toward
        m, orientation = oriented("w_fprop", m, contraction, spec)
        if toward is not None:
            toward = oriented("w_fprop", contraction.prepare(toward, "w"), contraction, spec)[0]
        found = quantize_operand(state, "w_fprop", m.contiguous(), wanted, save=True, toward=toward)
    if not torch.isfinite(found.tensor.scale).all():
        raise UserError(f"the weight of {name} is not finite: export an earlier checkpoint.")
    if len(wanted.format.grid) > 16:
        return orientation.back(found.tensor.dequantize()).contiguous()
    assert found.packed is not None
    groups, rows, spots, k = m.shape
    blocks = found.packed.blocks
    values = _unpacked(found.packed).reshape(groups * rows, spots, k)
    scale, block, scale_format = torch.ones(1, 1, 1), None, None
    tensor_scale = found.tensor.scale.to(torch.float32)
    if blocks is not None:
        width = blocks.tile.sums
        block, scale_format = (None if width is None or width >= k else width), blocks.format
        whole = blocks.times(torch.ones(m.shape)).reshape(groups * rows, spots, k)
        scale = whole[:, :, :: block or k].contiguous()
    elif tensor_scale.numel() > 1 or tensor_scale.dim() == 4:
        scale, tensor_scale = tensor_scale.expand(groups, rows, 1, 1).reshape(groups * rows, 1, 1), torch.ones(())
    shape = tuple(layer.weight.shape)  # type: ignore[union-attr,arg-type]
    return PackedWeight(shape, found.tensor.format, values, scale, block, scale_format, tensor_scale.reshape(()))


def _unpacked(packed: Packed) -> Tensor:
    return replace(packed, blocks=None).unpack(torch.float32)


@dataclass(frozen=True)
class Activation:
    """How a layer's input is quantized in evaluation mode: x ~ scale * q, q on the grid of `format`."""

    format: Format
    scale: float


def activation_of(name: str, layer: QuantizedLayer) -> Activation | None:
    """The fixed scale of a layer's input; None where it is not quantized.

    Raises:
        UserError: the scale follows from each batch, or no batch has decided it yet.
    """
    wanted, state = layer.spec.x_fprop, layer.quant
    if wanted is None:
        return None
    if objection := activation_objection(wanted):
        raise UserError(f"the input of {name} {objection}.")
    format, stored = wanted.format, None
    if wanted.scaling.state_class is not None:
        remembered = state.scalings["x"]
        was, state.training = state.training, True
        open_still = remembered.awaits(state)
        state.training = was
        if open_still:
            raise UserError(f"no batch has decided the scale of the input of {name}: train the model first.")
        with torch.no_grad(), state.preserved():
            format, stored = remembered.use(torch.zeros(1), wanted.format, state)
    scale = wanted.scaling.of(Statistics(torch.zeros(1)), format, None if stored is None else stored.detach().cpu())
    return Activation(format, float(scale))


def activation_objection(spec: QuantSpec) -> str:
    """Why the input's scale is not a constant, to stand behind the input's name; "" where it is one."""
    if spec.transform is not None:
        return f"is rotated ({spec.transform})"
    if spec.outliers is not None:
        return "is split at its outliers"
    if spec.stochastic:
        return "is rounded stochastically"
    fixed = spec.scaling.state_class is not None or isinstance(spec.scaling, FixedScale)
    return "" if fixed and not spec.in_tiles else f"has a scale that follows from each batch ({spec})"


def weight_objection(spec: LayerSpec) -> str:
    """Why a weight has no fixed numbers of its own, to stand behind the weight's name; "" where it has."""
    w = spec.w_fprop
    if w is None:
        return ""
    if w.transform is not None:
        return f"is rotated ({w.transform}), and only a product with a rotated input undoes that"
    if w.stochastic:
        return "is rounded stochastically, and has other numbers in each step"
    return ""


def require_plain(name: str, layer: QuantizedLayer) -> None:
    """Reject layers whose weight cannot be written down.

    Raises:
        UserError: says which can.
    """
    if not isinstance(layer, LAYERS):
        raise UserError(
            f"{name} is a {type(layer).__name__}: exports have linear layers and convolutions, none transposed or recurrent."
        )
    if objection := weight_objection(layer.spec):
        raise UserError(f"the weight of {name} {objection}.")
    if layer.quant._modules.get("channels") is not None:
        raise UserError(f"{name} multiplies some channels in another format (OutControl), which no export has.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[dict[str, QuantizedLayer]]:
    """The quantized layers of a model in evaluation mode; afterwards every module has the mode that it had.

    Raises:
        UserError: there is none.
    """
    layers = quantized_layers(model)
    if not layers:
        raise UserError("the model has no quantized layer: convert it first, with fourbit.convert(model, recipe).")
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield layers
    finally:
        for module, mode in modes.items():
            module.training = mode
