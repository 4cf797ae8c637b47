"""Batch normalization fused with its neighbours, on the CPU: [N, C, H, W] float32 in channels_last."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.formats import Format
from fourbit.kernels.cpu import _library as c
from fourbit.kernels.cpu._quantize import BLOCK, RULES, float_grid, is_half, kernels, log_grid
from fourbit.ops import Kept, NormBackward, NormForward
from fourbit.quantizers import Integers, Packed, QTensor, Quantized, carrier_dtype, exponent_scale, grid_of


@backends.register("norm_supported", "cpu")
def supported(y: Tensor, output: Format | None = None) -> bool | None:
    """Any float32 tensor on the CPU, to be rounded to a format with a kernel."""
    rounds = output is None or float_grid(output) is not None
    return True if y.device.type == "cpu" and y.dtype == torch.float32 and rounds else None


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@backends.register("norm_forward", "cpu")
def forward(f: NormForward) -> tuple[Tensor | None, Quantized | None, Kept] | None:
    """o, its codes, and what backward needs."""
    y, norm, request = f.y, f.norm, f.request
    channels = y.shape[1]
    grid = None if f.output is None else float_grid(f.output)
    rounded = y.dtype == torch.int16
    halves = rounded or (is_half(f.output) and math.isfinite(f.scale))
    if rounded:
        v = y
    elif halves:
        v = torch.empty_like(y, dtype=torch.int16)
    else:
        v = y if f.own or f.scale == 1.0 else torch.empty_like(y)
    mean, inv_std = y.new_empty(2, channels, dtype=torch.float32)
    blocks = -(-y.numel() // BLOCK)
    out = torch.empty_like(y, dtype=torch.float32) if f.want_out else None
    needs_pass = f.act.clips and (request is None or math.isfinite(f.act.cap))
    passes = y.new_empty(blocks * 8, dtype=torch.uint8) if needs_pass else None
    clip, quantized, scale = c.Clip(), None, None
    if request is not None:
        scale = request.spec.scaling.of(None, request.format, request.stored)  # type: ignore[arg-type]
        integers, bound = grid_of(request.format), request.spec.scaling.bound(scale, request.format, request.stored)
        assert isinstance(integers, Integers) and bound is not None
        q = torch.empty_like(y, dtype=carrier_dtype(request.format))
        packed, mask = y.new_empty(blocks * BLOCK // 2, dtype=torch.uint8), y.new_empty(blocks * 8, dtype=torch.uint8)
        clip.inv_scale, clip.low, clip.high = float(scale.reciprocal()), integers.low, integers.high
        clip.mask_rule, clip.bound = RULES[bound.rule], float(bound.value)
        clip.codes, clip.packed, clip.mask = q.data_ptr(), packed.data_ptr(), mask.data_ptr()
        quantized = (q, packed, mask)
    amax = kernels().norm_forward(
        ctypes.byref(
            c.NormForward(
                None if rounded else y.data_ptr(),
                y.numel() // channels,
                channels,
                f.scale,
                grid is not None,
                grid or c.FloatGrid(),
                v.data_ptr(),
                halves,
                _pointer(norm.gamma),
                _pointer(norm.beta),
                norm.eps,
                _pointer(norm.running_mean),
                _pointer(norm.running_var),
                norm.momentum,
                mean.data_ptr(),
                inv_std.data_ptr(),
                _pointer(f.residual),
                f.act.clips,
                f.act.cap,
                _pointer(out),
                _pointer(passes),
                clip,
                request is not None,
            )
        )
    )
    kept = Kept(v, f.output if halves else None, mean, inv_std, passes, f.act.cap >= clip.bound)
    if quantized is None or request is None or scale is None:
        return out, None, kept
    q, data, mask = quantized
    if not math.isfinite(amax):
        scale = scale + amax * 0
    packed = Packed(data, y.shape, y.stride(), request.format.min < 0)
    return out, Quantized(QTensor(q, scale, request.format), amax, packed, mask), kept


@backends.register("norm_backward", "cpu")
def backward(b: NormBackward) -> Any:
    """dv or its codes, dgamma, dbeta, the residual's gradient, and the sum of what was clipped."""
    kept, like = b.kept, b.layout
    channels = kept.mean.numel()
    device = kept.mean.device
    grids = [log_grid(s.format) for s in b.specs]
    specs = b.specs if all(g is not None for g in grids) else ()
    residual = like.empty(torch.float32, device) if b.want_residual else None
    dgamma, dbeta = torch.empty_like(kept.mean), torch.empty_like(kept.mean)
    outs = [like.empty(torch.bfloat16, device) for _ in specs] or [like.empty(torch.float32, device)]
    arguments: Any = c.NormBackward(
        token=_pointer(b.dq),
        token_dtype=0 if b.dq is None else c.CODES[b.dq.dtype],
        token_scale=b.dq_scale,
        packed=None if b.packed is None else b.packed.data.data_ptr(),
        is_signed=b.packed is not None and b.packed.signed,
        mask=_pointer(b.mask),
        out_grad=_pointer(b.do),
        passes=_pointer(kept.passes),
        act=b.act.clips,
        cap_clips=kept.cap_clips,
        kept=kept.v.data_ptr(),
        halves=kept.format is not None,
        rows=kept.v.numel() // channels,
        channels=channels,
        gamma=_pointer(b.gamma),
        mean=kept.mean.data_ptr(),
        inv_std=kept.inv_std.data_ptr(),
        g=_pointer(residual),
        dgamma=dgamma.data_ptr(),
        dbeta=dbeta.data_ptr(),
        num=len(specs),
    )
    if kept.format is not None:
        arguments.grid = float_grid(kept.format)
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
    return (None if specs else outs[0]), quantized, dgamma, dbeta, residual, arguments.clipped
