"""Linear and convolution layers in low precision: drop-in subclasses of torch's own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.chains import begin, begin_with, can_defer, take
from fourbit.errors import UserError
from fourbit.nn._base import QuantizedLayer, require_input, swaps, traced
from fourbit.nn._out_control import Channels
from fourbit.nn._tensor_parallel import parallel_linear
from fourbit.ops import (
    Contraction,
    Convolution,
    LayerSpec,
    LinearMap,
    Matmul,
    Pending,
    Products,
    ResultHandover,
    contract,
)
from fourbit.quantizers import is_shard, require_numbers


def _add_bias(y: Tensor, bias: Tensor | None, num_trailing: int) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * num_trailing)


@swaps(nn.Linear)
class Linear(QuantizedLayer, nn.Linear):
    """torch.nn.Linear with quantized operands: y[..., n] = sum_k Q(x)[..., k] Q(w)[n, k] + b[n].

    >>> from fourbit import LayerSpec, QuantSpec, Sawb
    >>> layer = Linear(8, 4, spec=LayerSpec(w_fprop=QuantSpec("int4_sym", Sawb())))
    >>> layer(torch.ones(2, 8)).shape
    torch.Size([2, 4])
    """

    def contraction(self) -> Contraction:
        """x w^T."""
        return LinearMap()

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if (node := traced(self, input)) is not None:
            return node
        if self.quant.is_identity:
            return super().forward(input)
        require_input(input, self, -1, self.in_features)
        if input.dim() == 1:  # a product has rows
            return self.forward(input.unsqueeze(0)).squeeze(0)
        if is_shard(self.weight):
            return parallel_linear(input, self.weight, self.bias, self.contraction(), self.quant)
        channels = self.quant._modules.get("channels")
        if isinstance(channels, Channels):
            return _add_bias(self._in_parts(input, channels), self.bias, 0)
        return _add_bias(contract(input, self.weight, self.contraction(), self.quant), self.bias, 0)

    def _in_parts(self, input: Tensor, channels: Channels) -> Tensor:
        """The product, with one of its own for the channels that stand out, once these are known."""
        recomputed = torch._C._current_graph_task_id() != -1
        if channels.records and self.training and torch.is_grad_enabled() and not recomputed:
            channels.record(input)
        parts = channels.parts()
        if parts is None:
            return contract(input, self.weight, self.contraction(), self.quant)
        channels.state.nonfinite = self.quant.nonfinite  # counted together
        y = None
        for state, which in zip((self.quant, channels.state), parts, strict=True):
            part = contract(
                input.index_select(-1, which), self.weight.index_select(1, which), self.contraction(), state
            )
            y = part if y is None else y + part
        assert y is not None
        return y


def _own_padding(conv: nn.modules.conv._ConvNd) -> tuple[int, ...] | None:
    """Zero padding that the contraction does itself; None where the input must be padded first."""
    if conv.padding_mode != "zeros":
        return None
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    both = conv._reversed_padding_repeated_twice[::-1]  # last dimension first in torch's list
    right, left = both[0::2], both[1::2]
    return tuple(left) if left == right else None


class _Conv(QuantizedLayer, nn.modules.conv._ConvNd):
    """Convolution in 1 to 3 dimensions: every stride, dilation, number of groups and padding mode of torch."""

    def contraction(self) -> Convolution:
        """The convolution without bias."""
        padding = _own_padding(self) or (0,) * len(self.stride)
        return Convolution(tuple(self.stride), padding, tuple(self.dilation), self.groups)

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, ...] or [C, ...] -> [N, out_channels, ...] or [out_channels, ...]."""
        if (node := traced(self, input)) is not None:
            return node
        if self.quant.is_identity:
            return super().forward(input)
        num_dims = len(self.stride)
        require_input(input, self, -num_dims - 1, self.in_channels, (num_dims + 1, num_dims + 2))
        batched = input.dim() == num_dims + 2
        x = input if batched else input.unsqueeze(0)
        if _own_padding(self) is None:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode)
        y = _add_bias(contract(x, self.weight, self.contraction(), self.quant), self.bias, num_dims)
        return y if batched else y.squeeze(0)


class _ConvTranspose(QuantizedLayer, nn.modules.conv._ConvTransposeNd):
    """Transposed convolution: x is spread by w over the output."""

    def contraction(self, output_padding: tuple[int, ...] | None = None) -> Convolution:
        """The transposed convolution without bias."""
        extra = tuple(self.output_padding) if output_padding is None else output_padding
        padding, dilation = tuple(self.padding), tuple(self.dilation)
        return Convolution(tuple(self.stride), padding, dilation, self.groups, True, extra)  # type: ignore[arg-type]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[N, C, ...] or [C, ...] -> [N, out_channels, ...] or [out_channels, ...]."""
        if (node := traced(self, input, output_size)) is not None:
            return node
        if self.quant.is_identity:
            return super().forward(input, output_size)
        num_dims = len(self.stride)
        require_input(input, self, -num_dims - 1, self.in_channels, (num_dims + 1, num_dims + 2))
        sizes: Any = (self.stride, self.padding, self.kernel_size, num_dims, self.dilation)
        padding = self._output_padding(input, output_size, *sizes)
        batched = input.dim() == num_dims + 2
        x = input if batched else input.unsqueeze(0)
        y = _add_bias(contract(x, self.weight, self.contraction(tuple(padding)), self.quant), self.bias, num_dims)
        return y if batched else y.squeeze(0)


@swaps(nn.Conv1d)
class Conv1d(_Conv, nn.Conv1d):
    """torch.nn.Conv1d with quantized operands."""


@swaps(nn.Conv2d)
class Conv2d(_Conv, nn.Conv2d):
    """torch.nn.Conv2d with quantized operands. In training it may be part of a chain (`fourbit.chains`)."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] or [C, H, W] -> [N, out_channels, ...] or [out_channels, ...]."""
        if (node := traced(self, input)) is not None:
            return node
        state = self.quant
        if state.is_identity or torch.compiler.is_compiling() or not can_defer(input, state):
            return super().forward(input)
        contraction = self.contraction()
        if not isinstance(input, Pending) or input.sizes[1] != self.in_channels:
            require_input(input, self, 1, self.in_channels)
        pads = _own_padding(self) is not None
        over = take(input, state) if pads else None
        if self.bias is not None or not pads:
            y = contract(input, self.weight, contraction, state, over) if over else None
            return begin_with(super().forward(input) if y is None else _add_bias(y, self.bias, 2), state)
        result = ResultHandover()
        return begin(contract(input, self.weight, contraction, state, over, result), result, state)


@swaps(nn.Conv3d)
class Conv3d(_Conv, nn.Conv3d):
    """torch.nn.Conv3d with quantized operands."""


@swaps(nn.ConvTranspose1d)
class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """torch.nn.ConvTranspose1d with quantized operands."""


@swaps(nn.ConvTranspose2d)
class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """torch.nn.ConvTranspose2d with quantized operands."""


@swaps(nn.ConvTranspose3d)
class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d with quantized operands."""


class MatMul(QuantizedLayer):
    """torch.matmul of two activations with quantized operands (attention scores, for example).

    The slots named w belong to the second argument. The functional twin is `fourbit.nn.functional.matmul`. `convert` gives
    it a spec only by a rule that names it, `Rule(spec, types=(fourbit.nn.MatMul,))`: the weights' half of a layer spec
    does not suit an activation.
    """

    def attach(self, spec: LayerSpec, seed: int = 0, index: int = 0, products: Products = "fast") -> None:
        """As for every layer; GradScale per channel is refused, because the number of channels is not fixed."""
        if spec.g_scaling is not None and spec.g_scaling.in_tiles:
            raise UserError("MatMul has no fixed output channels: use GradScale with granularity='tensor'")
        super().attach(spec, seed, index, products)

    def contraction(self) -> Contraction:
        """x @ w."""
        return Matmul()

    def forward(self, input: Tensor, other: Tensor) -> Tensor:
        """[..., M, K], [..., K, N] -> [..., M, N], batch axes broadcast."""
        if self.quant.is_identity:
            return torch.matmul(input, other)
        require_numbers(input, "MatMul")
        require_numbers(other, "MatMul")
        return contract(input, other, self.contraction(), self.quant)
