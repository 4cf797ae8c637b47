"""Batch normalization fused with its neighbours, on the CPU: [N, C, H, W] float32 in channels_last."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.chains import Normalized, NormApply, NormBackward, NormGradients, NormStatistics
from fourbit.formats import Format
from fourbit.kernels.cpu import _library as c
from fourbit.kernels.cpu._quantize import BLOCK, RULES, float_grid, is_half, kernels, log_grid
from fourbit.quantizers import Integers, Packed, QTensor, Quantized, carrier_dtype, exponent_scale, grid_of


@backends.register("norm_supported", "cpu")
def supported(y: Tensor, output: Format | None = None) -> bool | None:
    """Any float32 tensor on the CPU, to be rounded to a format with a kernel."""
    rounds = output is None or float_grid(output) is not None
    return True if y.device.type == "cpu" and y.dtype == torch.float32 and rounds else None


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@backends.register("norm_statistics", "cpu")
def statistics(s: NormStatistics) -> Normalized:
    """v, and its statistics."""
    y, norm = s.y, s.norm
    channels = y.shape[1]
    grid = None if s.output is None else float_grid(s.output)
    coded = y.dtype == torch.int16
    halves = coded or (is_half(s.output) and math.isfinite(s.scale))
    if coded:
        v = y
    elif halves:
        v = torch.empty_like(y, dtype=torch.int16)
    else:
        v = y if s.own or s.scale == 1.0 else torch.empty_like(y)
    moments = torch.empty(4, channels, dtype=torch.float32)
    first = moments.data_ptr()
    mean, inv_std, slope, offset = range(first, first + 16 * channels, 4 * channels)
    task: Any = c.NormStatistics(
        y=None if coded else y.data_ptr(),
        rows=y.numel() // channels,
        channels=channels,
        scale=s.scale,
        rounds=grid is not None,
        coded=coded,
        kept=v.data_ptr(),
        halves=halves,
        gamma=_pointer(norm.gamma),
        beta=_pointer(norm.beta),
        eps=norm.eps,
        running_mean=_pointer(norm.running_mean),
        running_var=_pointer(norm.running_var),
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


@backends.register("norm_apply", "cpu")
def apply(a: NormApply) -> tuple[Tensor | None, Quantized | None, Tensor | None, bool]:
    """o, its codes, the bits where the activation passes, and whether what it caps is clipped as well."""
    v, moments, request = a.normalized.v, a.normalized.moments, a.request
    channels = moments.shape[1]
    blocks = -(-v.numel() // BLOCK)
    out = torch.empty_like(v, dtype=torch.float32) if a.want_out else None
    needs_pass = a.act.clips and (request is None or math.isfinite(a.act.cap))
    passes = torch.empty(blocks * 8, dtype=torch.uint8) if needs_pass else None
    slope = moments.data_ptr() + 8 * channels
    task: Any = c.NormApply(
        kept=v.data_ptr(),
        halves=a.normalized.format is not None,
        rows=v.numel() // channels,
        channels=channels,
        slope=slope,
        offset=slope + 4 * channels,
        residual=_pointer(a.residual),
        act=a.act.clips,
        cap=a.act.cap,
        out=_pointer(out),
        passes=_pointer(passes),
        clips=request is not None,
    )
    if a.normalized.format is not None:
        task.grid = float_grid(a.normalized.format)
    if request is None:
        kernels().norm_apply(ctypes.byref(task))
        return out, None, passes, False
    scale = request.spec.scaling.of(None, request.format, request.stored)  # type: ignore[arg-type]
    integers, bound = grid_of(request.format), request.spec.scaling.bound(scale, request.format, request.stored)
    assert isinstance(integers, Integers) and bound is not None
    q = torch.empty_like(v, dtype=carrier_dtype(request.format))
    data, mask = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8), torch.empty(blocks * 8, dtype=torch.uint8)
    limit = float(bound.value)
    task.clip.inv_scale, task.clip.low, task.clip.high = float(scale.reciprocal()), integers.low, integers.high
    task.clip.mask_rule, task.clip.bound = RULES[bound.rule], limit
    task.clip.codes, task.clip.packed, task.clip.mask = q.data_ptr(), data.data_ptr(), mask.data_ptr()
    amax = kernels().norm_apply(ctypes.byref(task))
    if not math.isfinite(amax):
        scale = scale + amax * 0
    packed = Packed(data, v.shape, v.stride(), request.format.min < 0)
    return out, Quantized(QTensor(q, scale, request.format), amax, packed, mask), passes, a.act.cap >= limit


@backends.register("norm_backward", "cpu")
def backward(b: NormBackward) -> NormGradients:
    """dv or its codes, and the gradients of all else."""
    normalized, like = b.normalized, b.layout
    v, moments = normalized.v, normalized.moments
    channels = moments.shape[1]
    grids = [log_grid(s.format) for s in b.specs]
    specs = b.specs if all(g is not None for g in grids) else ()
    residual = like.empty(torch.float32, v.device) if b.want_residual else None
    dgamma, dbeta = torch.empty(2, channels, dtype=torch.float32)
    outs = [like.empty(torch.bfloat16, v.device) for _ in specs] or [like.empty(torch.float32, v.device)]
    arguments: Any = c.NormBackward(
        token=_pointer(b.dq),
        token_dtype=0 if b.dq is None else c.CODES[b.dq.dtype],
        token_scale=b.dq_scale,
        packed=None if b.packed is None else b.packed.data.data_ptr(),
        is_signed=b.packed is not None and b.packed.signed,
        mask=_pointer(b.mask),
        out_grad=_pointer(b.do),
        passes=_pointer(b.passes),
        act=b.act.clips,
        cap_clips=b.cap_clips,
        kept=v.data_ptr(),
        halves=normalized.format is not None,
        rows=v.numel() // channels,
        channels=channels,
        gamma=_pointer(b.gamma),
        mean=moments.data_ptr(),
        inv_std=moments.data_ptr() + 4 * channels,
        g=_pointer(residual),
        dgamma=dgamma.data_ptr(),
        dbeta=dbeta.data_ptr(),
        num=len(specs),
    )
    if normalized.format is not None:
        arguments.grid = float_grid(normalized.format)
    for i, out in enumerate(outs):
        arguments.out[i] = out.data_ptr()
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
    return NormGradients(None if specs else outs[0], quantized, dgamma, dbeta, residual, arguments.clipped)
