"""Convolution, batch normalization, residual, activation and the next layer's quantization without a float tensor between.

`conv_norm_act` is what `convert` puts in place of the modules of such a chain. It decides at every call, from what the
modules are just then, how much of the chain can run as one; the rest is done by the modules themselves. So hooks,
evaluation, autocast, other devices and machines without kernels see the network as it was written; observers see every operand.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fourbit.nn._layers import Conv2d
from fourbit.ops import Activation, Norm, OperandHandover, ResultHandover, can_normalize, normalize

Operand = Tensor | OperandHandover
"""The input of a convolution: as a tensor, or quantized by the node before."""


def _is_watched(module: nn.Module) -> bool:
    m = module.__dict__
    hooks = m["_forward_hooks"] or m["_forward_pre_hooks"] or m["_backward_hooks"] or m["_backward_pre_hooks"]
    return bool(hooks) or "forward" in m


def run_layer(conv: nn.Module, x: Operand) -> Tensor:
    """A layer on an input that may be quantized already."""
    if isinstance(x, Tensor):
        return conv(x)
    assert isinstance(conv, Conv2d)
    return conv.forward_handover(x)


def conv_norm_act(
    conv: nn.Module | None,
    norm: nn.Module,
    x: Operand,
    cap: float | None,
    residual: Tensor | None,
    behind: nn.Module | None,
    want_out: bool,
) -> tuple[Tensor | None, Operand]:
    """o = min(max(norm(conv(x)) + residual, 0), cap), and o as the input of the layer `behind`.

    Args:
        conv: the convolution; None if x is its result already.
        norm: batch normalization.
        cap: where the activation ends, infinity for ReLU; None: no activation.
        residual: added before the activation; None: nothing.
        behind: the convolution that will take the second result; None: nobody.
        want_out: whether somebody needs o as a tensor.

    Returns:
        (o or None, o as a tensor or a handover).
    """
    if not isinstance(norm, nn.BatchNorm2d) or not _can_fuse(norm, x, residual):
        y = x if conv is None else run_layer(conv, x)
        assert isinstance(y, Tensor)
        return _plainly(norm(y), cap, residual)
    before, result, token = None, None, None
    if isinstance(conv, Conv2d) and conv.takes_handover and conv.bias is None and not _is_watched(conv):
        before, result = conv.quant, ResultHandover()
        token = conv.contract(x, conv.weight, conv.contraction(), result)
    y = result or (x if conv is None else run_layer(conv, x))
    assert not isinstance(y, OperandHandover)
    taker = None
    if isinstance(behind, Conv2d) and behind.takes_handover and not _is_watched(behind):
        taker = behind.quant
    out, operand = normalize(
        y,
        token,
        _norm_of(norm),
        Activation(cap is not None, math.inf if cap is None else cap),
        residual,
        before,
        taker,
        want_out,
    )
    if operand is None:
        assert out is not None
        return out, out
    return out, operand


def _can_fuse(norm: nn.Module, x: Operand, residual: Tensor | None) -> bool:
    t = x if isinstance(x, Tensor) else x.token
    if (
        type(norm) is not nn.BatchNorm2d
        or not norm.training
        or _is_watched(norm)
        or torch.is_autocast_enabled(t.device.type)
        or (norm.weight is not None and norm.weight.dtype != torch.float32)
        or (residual is not None and residual.dtype != torch.float32)
    ):
        return False
    return isinstance(x, OperandHandover) or (x.numel() > 0 and can_normalize(x))


def _plainly(z: Tensor, cap: float | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    if residual is not None:
        z = z + residual
    if cap is not None:
        z = torch.relu(z) if cap == math.inf else F.hardtanh(z, 0.0, cap)
    return z, z


def _norm_of(norm: nn.BatchNorm2d) -> Norm:
    """The normalization's parameters, and its running statistics, one batch further."""
    if not norm.track_running_stats:
        return Norm(norm.weight, norm.bias, None, None, 0.0, norm.eps)
    momentum = norm.momentum
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    return Norm(norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum or 0.0, norm.eps)
