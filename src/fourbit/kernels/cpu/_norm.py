"""Batch normalization fused with its neighbours, on the CPU: [N, C, H, W] float32 in channels_last."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fourbit.backends import Plan
from fourbit.chains import (
    NORM_APPLY,
    NORM_BACKWARD,
    NORM_STATISTICS,
    Normalized,
    NormApply,
    NormBackward,
    NormGradients,
    NormStatistics,
)
from fourbit.errors import UserError
from fourbit.formats import Format
from fourbit.kernels._check import (
    CHANNELS_LAST,
    bits_of,
    codes_of,
    fresh,
    mask_bytes,
    optional,
    packed_bytes,
    pointer,
    require,
)
from fourbit.kernels.cpu import _structures as c
from fourbit.kernels.cpu._quantize import RULES, float_grid, is_half, kernels, log_grid, plan_of
from fourbit.ops import NORM_SUPPORTED, Layout
from fourbit.quantizers import (
    ClipValue,
    Packed,
    QTensor,
    Quantized,
    exponent_scale,
    to_float32,
)


def _yes() -> bool:
    return True


@NORM_SUPPORTED.kernel("cpu")
def supported(y: Tensor, output: Format | None) -> Plan[bool]:
    """Any float32 tensor on the CPU, to be rounded to a format with a kernel."""
    if not y.is_cpu or y.dtype != torch.float32:
        return "the tensor is not float32 on the CPU"
    if output is not None and float_grid(output) is None:
        return f"no kernel rounds to {output.name}"
    return _yes


_F32, _U8 = torch.float32, torch.uint8


def _kept(normalized: Normalized) -> tuple[int, int, int]:
    """Number of elements of v, of channels, and the address of v."""
    v, moments = normalized.v, normalized.moments
    require(v.dim() == 4 and moments.shape == (4, v.shape[1]), "v of four axes, and four moments for each channel")
    n, dtype = v.numel(), torch.int16 if normalized.format is not None else _F32
    return n, v.shape[1], pointer(v, "v", dtype, n, CHANNELS_LAST)


@NORM_STATISTICS.kernel("cpu")
def statistics(s: NormStatistics) -> Plan[Normalized]:
    """v, and its statistics. `norm_supported` has said that they are to be had, here and below."""
    return lambda: _statistics(s)


def _statistics(s: NormStatistics) -> Normalized:
    y, norm = s.y, s.norm
    require(y.dim() == 4 and y.numel() > 0, "y of four axes that is not empty")
    channels, n = y.shape[1], y.numel()
    grid = None if s.output is None else float_grid(s.output)
    coded = y.dtype == torch.int16
    halves = coded or (is_half(s.output) and math.isfinite(s.scale))
    if coded:
        v = y
    elif halves:
        v = torch.empty_like(y, dtype=torch.int16)
    else:
        v = y if s.own or s.scale == 1.0 else torch.empty_like(y)
    require(not coded or is_half(s.output), "a format of 16 bits for codes of 16 bits")
    require((norm.running_mean is None) == (norm.running_var is None), "both running statistics, or none")
    for vector in (norm.gamma, norm.beta, norm.running_mean, norm.running_var):
        require(vector is None or vector.shape == (channels,), "one number for each channel")
    at = None if coded else pointer(y, "y", _F32, n, CHANNELS_LAST)
    moments = torch.empty(4, channels, dtype=_F32)
    first = fresh(moments)
    mean, inv_std, slope, offset = range(first, first + 16 * channels, 4 * channels)
    task: Any = c.NormStatistics(
        y=at,
        rows=n // channels,
        channels=channels,
        scale=s.scale,
        rounds=grid is not None,
        coded=coded,
        kept=pointer(v, "v", torch.int16, n, CHANNELS_LAST) if coded else at if v is y else fresh(v),
        halves=halves,
        gamma=optional(norm.gamma, "gamma", _F32, channels),
        beta=optional(norm.beta, "beta", _F32, channels),
        eps=norm.eps,
        running_mean=optional(norm.running_mean, "running_mean", _F32, channels),
        running_var=optional(norm.running_var, "running_var", _F32, channels),
        momentum=norm.momentum,
        mean=mean,
        inv_std=inv_std,
        slope=slope,
        offset=offset,
    )
    if grid is not None:
        task.grid = grid
    kernels().norm_statistics(ctypes.byref(task))
    return Normalized(v, s.output if halves else None, moments)


@NORM_APPLY.kernel("cpu")
def apply(a: NormApply) -> Plan[tuple[Tensor | None, Quantized | None, Tensor | None, bool]]:
    """o, its codes, the bits where the activation passes, and whether what it caps is clipped as well."""
    return lambda: _apply(a)


def _apply(a: NormApply) -> tuple[Tensor | None, Quantized | None, Tensor | None, bool]:
    v, request = a.normalized.v, a.request
    n, channels, kept = _kept(a.normalized)
    out = torch.empty_like(v, dtype=torch.float32) if a.want_out else None
    needs_pass = a.act.clips and (request is None or math.isfinite(a.act.cap))
    passes = torch.empty(mask_bytes(n), dtype=_U8) if needs_pass else None
    slope = pointer(a.normalized.moments, "moments", _F32, 4 * channels) + 8 * channels
    task: Any = c.NormApply(
        kept=kept,
        halves=a.normalized.format is not None,
        rows=n // max(channels, 1),
        channels=channels,
        slope=slope,
        offset=slope + 4 * channels,
        residual=optional(a.residual, "residual", _F32, n, v),
        act=a.act.clips,
        cap=a.act.cap,
        out=None if out is None else fresh(out),
        pass_=None if passes is None else fresh(passes),
        clips=request is not None,
    )
    if a.normalized.format is not None:
        task.grid = float_grid(a.normalized.format)
    if request is None:
        kernels().norm_apply(ctypes.byref(task))
        return out, None, passes, False
    clip, plan = request.spec.scaling, plan_of(request.format)
    require(isinstance(clip, ClipValue), "a clip value")
    scale = clip.of(None, request.format, request.stored)  # type: ignore[arg-type]
    bound = clip.bound(scale, request.format, request.stored)
    if plan.integers is None or not plan.packs or not bound:
        raise UserError("arguments of a kernel do not go together: a clipped format of 4-bit integers is needed")
    q = torch.empty_like(v, dtype=plan.carrier)
    data, mask = torch.empty(packed_bytes(n), dtype=_U8), torch.empty(mask_bytes(n), dtype=_U8)
    limit = float(bound.value)
    codes: Any = task.clip
    codes.inv_scale, codes.low, codes.high = to_float32(1.0 / float(scale)), plan.integers.low, plan.integers.high
    codes.mask_rule, codes.bound = RULES[bound.rule], limit
    codes.codes, codes.packed, codes.mask = fresh(q), fresh(data), fresh(mask)
    amax = kernels().norm_apply(ctypes.byref(task))
    if not math.isfinite(amax):
        scale = scale + amax * 0
    packed = Packed(data, v.shape, v.stride(), request.format.min < 0)
    return out, Quantized(QTensor(q, scale, request.format), amax, packed, mask), passes, a.act.cap >= limit


@NORM_BACKWARD.kernel("cpu")
def backward(b: NormBackward) -> Plan[NormGradients]:
    """dv or its codes, and the gradients of all else."""
    return lambda: _backward(b)


def _backward(b: NormBackward) -> NormGradients:
    normalized = b.normalized
    v, (n, channels, kept) = normalized.v, _kept(normalized)
    require(b.layout == Layout.of(v), "v in the layout of the result")
    require((b.packed is None) == (b.mask is None), "codes and their mask, or neither")
    require(b.dq is None or b.packed is not None, "codes for their gradient")
    grids = [log_grid(s.format) for s in b.specs]
    specs = b.specs if all(g is not None for g in grids) else ()
    residual = torch.empty_like(v, dtype=_F32) if b.want_residual else None
    dgamma, dbeta = torch.empty(channels, dtype=_F32), torch.empty(channels, dtype=_F32)
    moments = pointer(normalized.moments, "moments", _F32, 4 * channels)
    outs = [torch.empty_like(v, dtype=torch.bfloat16 if specs else _F32) for _ in specs or (None,)]
    require(b.dq is None or b.dq.dtype in (_F32, torch.bfloat16), "a gradient of the codes in float32 or bfloat16")
    arguments: Any = c.NormBackward(
        token=None if b.dq is None else pointer(b.dq, "dq", b.dq.dtype, n, like=v),
        token_dtype=0 if b.dq is None else c.CODES[b.dq.dtype],
        token_scale=b.dq_scale,
        packed=None if b.packed is None else codes_of(b.packed.data, n),
        is_signed=b.packed is not None and b.packed.signed,
        mask=bits_of(b.mask, "mask", n),
        out_grad=optional(b.do, "do", _F32, n, v),
        pass_=bits_of(b.passes, "passes", n),
        act=b.act.clips,
        cap_clips=b.cap_clips,
        kept=kept,
        halves=normalized.format is not None,
        rows=n // max(channels, 1),
        channels=channels,
        gamma=optional(b.gamma, "gamma", _F32, channels),
        mean=moments,
        inv_std=moments + 4 * channels,
        g=None if residual is None else fresh(residual),
        dgamma=fresh(dgamma),
        dbeta=fresh(dbeta),
        num=len(specs),
    )
    if normalized.format is not None:
        arguments.grid = float_grid(normalized.format)
    for i, out in enumerate(outs):
        arguments.out[i] = fresh(out)
    scale = None
    if specs:
        assert b.exponent is not None
        forward = exponent_scale(b.exponent)
        scale, arguments.inv_scale = forward.reciprocal(), float(forward)
        for i, grid in enumerate(grids):
            arguments.log_grid[i] = grid
    amax = kernels().norm_backward(ctypes.byref(arguments))
    quantized = ()
    if scale is not None:
        scale = scale if math.isfinite(amax) else scale + amax * 0
        quantized = tuple(Quantized(QTensor(out, scale, s.format), amax) for out, s in zip(outs, specs, strict=True))
    found = None if specs else outs[0]
    return NormGradients(found, quantized, dgamma, dbeta, residual, arguments.clipped, amax)
