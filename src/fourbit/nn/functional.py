"""Functional twins of the layers: pass operands, a LayerSpec, and (for scalings that remember) a LayerState.

Without a state every call starts afresh: GradScale takes its exponent from the gradient at hand, and PACT's clip value
from the data. Stochastic rounding needs a state, which counts the steps.
"""

from __future__ import annotations

from torch import Tensor

from fourbit.errors import UserError
from fourbit.ops import Contraction, Convolution, LayerSpec, LayerState, LinearMap, Matmul, contract


def _run(x: Tensor, w: Tensor, contraction: Contraction, spec: LayerSpec, state: LayerState | None) -> Tensor:
    if state is None:
        if spec.stochastic:
            raise UserError(
                "stochastic rounding would repeat its random words: pass state=LayerState(spec) and keep it"
            )
        channels = w.shape[contraction.channel_axis("w")]
        state = LayerState(spec, channels).to(x.device)
    return contract(x, w, contraction, spec, state)


def matmul(input: Tensor, other: Tensor, spec: LayerSpec, state: LayerState | None = None) -> Tensor:
    """torch.matmul(input, other) under `spec`; the slots named w belong to `other`."""
    return _run(input, other, Matmul(), spec, state)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, spec: LayerSpec, state: LayerState | None = None
) -> Tensor:
    """F.linear under `spec`: [..., K], [N, K] -> [..., N]."""
    y = _run(input, weight, LinearMap(), spec, state)
    return y if bias is None else y + bias.to(y.dtype)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: LayerSpec,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    state: LayerState | None = None,
) -> Tensor:
    """F.conv1d, F.conv2d or F.conv3d under `spec`, by the number of dimensions of `weight`; batched input."""
    n = weight.dim() - 2
    y = _run(input, weight, Convolution((stride,) * n, (padding,) * n, (dilation,) * n, groups), spec, state)
    return y if bias is None else y + bias.to(y.dtype).view(-1, *(1,) * n)
