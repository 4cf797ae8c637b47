"""LSTMs on the CPU: the cell, and whole sequences, whose steps share their memory and are called without torch between them."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.kernels.cpu import _library as lib
from fourbit.kernels.cpu._matrices import multiplies_bfloat16, multiplies_integers, panels
from fourbit.kernels.cpu._quantize import RULES, float_grid, kernels, log_grid, takes
from fourbit.ops import LstmBackward, LstmForward
from fourbit.quantizers import BLOCK, Integers, Packed, Rounded, carrier_dtype, grid_of, has_integer_codes


def _takes(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


@backends.register("lstm_forward", "cpu")
def lstm_forward(gates_x: Tensor, gates_h: Tensor, cell: Tensor, kept: Tensor) -> tuple[Tensor, Tensor] | None:
    """h' and c' of one step; the activated gates go into `kept`."""
    if not _takes(gates_x, gates_h, cell, kept):
        return None
    h, new = torch.empty_like(cell), torch.empty_like(cell)
    arrays = (t.data_ptr() for t in (gates_x, gates_h, cell, kept, h, new))
    task: Any = lib.LstmForward(*arrays, *cell.shape)
    kernels().lstm_forward(ctypes.byref(task))
    return h, new


@backends.register("lstm_backward", "cpu")
def lstm_backward(dh: Tensor, dc: Tensor, gates: Tensor, cell: Tensor, new: Tensor, out: Tensor) -> Tensor | None:
    """The gradient of the cell state before the step; that of the gates goes into `out`."""
    if not _takes(dh, dc, gates, cell, new, out):
        return None
    before = torch.empty_like(cell)
    arrays = (t.data_ptr() for t in (dh, dc, gates, cell, new, out, before))
    task: Any = lib.LstmBackward(*arrays, *cell.shape)
    kernels().lstm_backward(ctypes.byref(task))
    return before


@backends.register("lstm_run", "cpu")
def lstm_run(s: LstmForward) -> list[Rounded] | None:
    """All steps: hidden state to codes, their product with the weight, the cell. Memory is allocated once for all of them."""
    request, w = s.request, s.w
    grid, output = grid_of(request.format), None if s.output is None else float_grid(s.output)
    num, size = s.h.shape
    if not takes(request, s.scale) or not isinstance(grid, Integers) or not has_integer_codes(request.format):
        return None
    if not _takes(s.gates_x, s.h, s.c, s.kept, s.cells, s.outputs) or (s.output is not None and output is None):
        return None
    if not isinstance(w.q, Tensor) or w.q.dtype != torch.int8 or not w.q.is_contiguous() or w.cache is None:
        return None
    if not multiplies_integers(w.q):
        return None
    bound = request.spec.scaling.bound(s.scale, request.format, request.stored)
    codes = torch.empty(num, size, dtype=carrier_dtype(request.format))
    gates_h = torch.empty(num, 4 * size, dtype=torch.float32)
    blocks = [-(-count * size // BLOCK) for _, count in s.steps]
    packed = torch.empty(sum(blocks) * BLOCK // 2, dtype=torch.uint8)
    masks = None if bound is None else torch.empty(sum(blocks) * 8, dtype=torch.uint8)

    x, h, c = s.gates_x.data_ptr(), s.h.data_ptr(), s.c.data_ptr()
    kept, before, outputs = s.kept.data_ptr(), s.cells[0].data_ptr(), s.outputs.data_ptr()
    after, at_packed, at_masks = s.cells[1].data_ptr(), packed.data_ptr(), 0 if masks is None else masks.data_ptr()
    rule, value = (0, 0.0) if bound is None else (RULES[bound.rule], float(bound.value))
    clip: Any = lib.Clip(h, lib.CODES[torch.float32], 0, float(s.scale.reciprocal()), grid.low, grid.high, rule, value)
    clip.codes = codes.data_ptr()
    product: Any = lib.MatMul(codes.data_ptr(), 0, w.q.data_ptr(), gates_h.data_ptr(), num, 4 * size, size, post=1.0)
    product.scale = float(s.scale if w.scale is None else s.scale * w.scale)
    product.rounds, product.integers, product.is_unsigned = output is not None, True, codes.dtype == torch.uint8
    if output is not None:
        product.grid = output
    product.panels = panels(product, w.cache).data_ptr()
    cell: Any = lib.LstmForward(gates_h=gates_h.data_ptr(), h=h, new_c=c, size=size)
    run, scale = kernels(), product.scale
    row, done = 4 * size, []
    for (begin, count), length in zip(s.steps, blocks, strict=True):
        clip.n, clip.packed, clip.mask = count * size, at_packed, at_masks or None
        amax = run.clip(ctypes.byref(clip))
        product.rows, product.scale = count, scale if math.isfinite(amax) else math.nan
        run.multiply(ctypes.byref(product))
        ctypes.memmove(before + begin * row, c, count * row)
        cell.gates_x, cell.c, cell.kept = x + 4 * begin * row, before + begin * row, kept + 4 * begin * row
        cell.rows = count
        run.lstm_forward(ctypes.byref(cell))
        ctypes.memmove(after + begin * row, c, count * row)
        ctypes.memmove(outputs + begin * row, h, count * row)
        done.append(amax)
        at_packed += length * BLOCK // 2
        at_masks += length * 8 if at_masks else 0
    pieces = packed.split([length * BLOCK // 2 for length in blocks])
    bits = [None] * len(blocks) if masks is None else masks.split([length * 8 for length in blocks])
    shapes = [torch.Size((count, size)) for _, count in s.steps]
    signed = request.format.min < 0
    return [
        Rounded(None, amax, Packed(piece, shape, (size, 1), signed), mask)
        for amax, piece, shape, mask in zip(done, pieces, shapes, bits, strict=True)
    ]


@backends.register("lstm_run_back", "cpu")
def lstm_run_back(s: LstmBackward) -> tuple[list[float], Tensor | None] | None:
    """All steps: the cell, the gradient of its gates to codes, their product with the weight, masked."""
    request, w = s.request, s.w
    output = None if s.output is None else float_grid(s.output)
    grid = log_grid(request.format)
    num, size = s.dh.shape
    if not takes(request, s.scale) or grid is None or carrier_dtype(request.format) is not torch.bfloat16:
        return None
    if not _takes(s.dh, s.dc, s.gates, s.cells, s.d_gates) or (s.output is not None and output is None):
        return None
    if not isinstance(w.q, Tensor) or w.q.dtype != torch.int8 or not w.q.is_contiguous() or w.cache is None:
        return None
    if not multiplies_bfloat16():
        return None
    if any(q is not None and (q.grid is not None or mask is None) for q, mask in zip(s.codes, s.masks, strict=True)):
        return None
    rounded = torch.empty(num, 4 * size, dtype=torch.bfloat16)
    dc_before = torch.empty_like(s.dc)

    dh, dc, d_gates = s.dh.data_ptr(), s.dc.data_ptr(), s.d_gates.data_ptr()
    gates, before, after = s.gates.data_ptr(), s.cells[0].data_ptr(), s.cells[1].data_ptr()
    cell: Any = lib.LstmBackward(dh=dh, dc=dc, dc_before=dc_before.data_ptr(), size=size)
    log: Any = lib.LogRound(dtype=lib.CODES[torch.float32], inv_scale=float(s.scale.reciprocal()), num=1)
    log.grid[0], log.out[0] = grid, rounded.data_ptr()
    product: Any = lib.MatMul(rounded.data_ptr(), 0, w.q.data_ptr(), dh, num, size, 4 * size, scale=1.0, post=1.0)
    product.panels = panels(product, w.cache).data_ptr()
    float32 = lib.CODES[torch.float32]
    rest: Any = lib.Epilogue(x=dh, dtype=float32, rounds=output is not None, out=dh, out_dtype=float32)
    rest.scale = 1.0 if w.scale is None else float(w.scale)
    if output is not None:
        rest.grid = output
    run, late = kernels(), float(s.scale)
    row, amaxes, total = 4 * size, [], None
    for (begin, count), mask, codes in zip(s.steps, s.masks, s.codes, strict=True):
        if s.dy is not None:
            s.dh[:count] += s.dy[begin : begin + count]
        cell.gates, cell.d_gates = gates + 4 * begin * row, d_gates + 4 * begin * row
        cell.c, cell.new_c, cell.rows = before + begin * row, after + begin * row, count
        run.lstm_backward(ctypes.byref(cell))
        ctypes.memmove(dc, cell.dc_before, count * row)
        log.x, log.n = cell.d_gates, 4 * count * size
        amax = run.log_round(ctypes.byref(log))
        product.rows = count
        run.multiply(ctypes.byref(product))
        rest.n, rest.post = count * size, late if math.isfinite(amax) else math.nan
        rest.mask = None if mask is None else mask.data_ptr()
        if codes is not None:
            rest.packed, rest.is_signed = codes.data.data_ptr(), codes.signed
        clipped = run.epilogue(ctypes.byref(rest))
        if codes is not None:
            part = torch.tensor(clipped, dtype=torch.float32)
            total = part if total is None else total + part
        amaxes.append(amax)
    return amaxes, total
