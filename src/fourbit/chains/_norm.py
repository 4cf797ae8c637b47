"""Batch normalization with what surrounds it in a 4-bit network, in two calls of a kernel forward and one backward:

    v = round(scale * y)           y: the product of the layer before, which left its rounding to this step
    t = gamma (v - mean) / std + beta = slope v + offset

    t = t + residual
    o = act(t)                     act: identity, or min(max(t, 0), cap)
    q = codes of o                 for the layer behind, packed, with the mask of the straight-through gradient

and backward, with both gradients of o in, down to the 4-bit gradients of the layer before:

    g  = act'(t) (do + mask dq),   dalpha = sum of dq where q was clipped
    dv = gamma / std (g - mean g - (v - mean) / std^2 mean(g (v - mean)))
    codes of dv for dgrad and wgrad, and its largest magnitude for GradScale's vote

The arithmetic is a kernel of a backend ("norm_statistics", "norm_apply", "norm_backward"). There is no reference: without
a kernel, torch's own functions run, one after the other, and they are what the kernels are tested against.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourbit.backends import Operation
from fourbit.formats import Format
from fourbit.ops._fusion_handovers import NORM_SUPPORTED
from fourbit.ops._product import Layout
from fourbit.quantizers import Packed, Quantized, QuantSpec, Request


@dataclass(slots=True, eq=False)
class Norm:
    """The normalization itself: parameters and running statistics (None: not tracked), as of torch's batch norm."""

    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float


@dataclass(frozen=True)
class Activation:
    """min(max(t, 0), cap), or nothing."""

    clips: bool = False
    cap: float = float("inf")


NO_ACTIVATION, RELU = Activation(), Activation(True)


@dataclass(slots=True, eq=False)
class NormStatistics:
    """The first call: v, its statistics, and the running ones, one batch further.

    Args:
        y: [N, C, H, W] float32, channels_last; overwritten where `own`. Or v itself in the backend's 16-bit codes of `output`.
        scale, output: v = round(scale y) to `output` (None: not rounded).
        own: whether the memory of y is the step's own.
    """

    y: Tensor
    scale: float
    output: Format | None
    norm: Norm
    own: bool


@dataclass(slots=True, eq=False)
class Normalized:
    """What the first call leaves: v (as float32, or in 16-bit codes of `format`), and per channel, [4, C], mean, 1 / std,
    slope and offset."""

    v: Tensor
    format: Format | None
    moments: Tensor


@dataclass(slots=True, eq=False)
class NormApply:
    """The second call.

    Args:
        normalized: from the first.
        residual: added before the activation, [N, C, H, W] float32, channels_last.
        request: how the layer behind takes o; None: not at all.
        want_out: whether o itself is wanted.
    """

    normalized: Normalized
    residual: Tensor | None
    act: Activation
    request: Request | None
    want_out: bool


@dataclass(slots=True, eq=False)
class NormBackward:
    """One backward call.

    Args:
        normalized: from forward.
        gamma, act, layout: of the normalization, the activation, and y.
        dq, dq_scale: gradient of the codes (times a scale), bfloat16 or float32; None if there is none.
        packed, mask: of the codes.
        passes: bits where the activation passes; None: everywhere, or where mask or code says so.
        cap_clips: whether what the activation caps is clipped by the layer behind as well.
        do: gradient of o, float32; None if there is none.
        want_residual: whether the gradient of the residual is wanted.
        specs, exponent: quantizations of dv, and the scale's exponent; (): dv itself.
    """

    normalized: Normalized
    gamma: Tensor | None
    act: Activation
    layout: Layout
    dq: Tensor | None
    dq_scale: float
    packed: Packed | None
    mask: Tensor | None
    passes: Tensor | None
    cap_clips: bool
    do: Tensor | None
    want_residual: bool
    specs: tuple[QuantSpec, ...]
    exponent: Tensor | None


@dataclass(slots=True, eq=False)
class NormGradients:
    """dv, or its quantizations; the gradients of gamma, beta and the residual; what was clipped, by its sign; and max|dv|."""

    dv: Tensor | None
    quantized: tuple[Quantized, ...]
    dgamma: Tensor
    dbeta: Tensor
    d_residual: Tensor | None
    clipped: float
    amax: float


_MODULES = "(torch's own modules, which compute where no chain begins)"
NORM_STATISTICS: Operation[[NormStatistics], Normalized] = Operation("norm_statistics", reference=_MODULES)
"""The statistics of a batch, and what normalizes by them."""
NORM_APPLY: Operation[[NormApply], tuple[Tensor | None, Quantized | None, Tensor | None, bool]] = Operation(
    "norm_apply", reference=_MODULES
)
"""The result, its codes, where the activation passes, and whether what it caps is clipped as well."""
NORM_BACKWARD: Operation[[NormBackward], NormGradients] = Operation("norm_backward", reference=_MODULES)
"""Gradients of both."""


def can_normalize(y: Tensor) -> bool:
    """Whether some backend has these kernels for tensors like y."""
    return y.dim() == 4 and y.dtype == torch.float32 and NORM_SUPPORTED(y, None) is not None
