"""LSTMs on the CPU: the cell, and whole sequences, whose steps share their memory and are called without torch between them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fourbit.backends import Plan
from fourbit.kernels._check import (
    bits_of,
    codes_of,
    pointer,
    require,
    require_disjoint,
)
from fourbit.kernels.cpu import _structures as lib
from fourbit.kernels.cpu._matrices import operands_of, panels
from fourbit.kernels.cpu._quantize import RULES, float_grid, kernels, log_grid, why_not_rounded
from fourbit.ops import LSTM_BACKWARD, LSTM_FORWARD, LSTM_RUN, LSTM_RUN_BACK, LstmBackward, LstmForward
from fourbit.quantizers import BLOCK, Bound, Integers, Packed, Rounded, carrier_dtype, grid_of, has_integer_codes


def _takes(*tensors: Tensor) -> bool:
    return all(t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() and not t.is_neg() for t in tensors)


def _address(t: Tensor, name: str, numel: int) -> int:
    return pointer(t, name, torch.float32, numel, torch.contiguous_format)


def _sizes(cell: Tensor, gates: tuple[Tensor, ...]) -> tuple[int, int]:
    """Rows and units."""
    require(cell.dim() == 2, "a cell state with two axes")
    rows, size = cell.shape
    require(all(t.shape == (rows, 4 * size) for t in gates), f"gates of shape ({rows}, {4 * size})")
    return rows, size


def _check_steps(steps: Sequence[tuple[int, int]], num: int, total: int) -> None:
    """Every step's rows are among `total`, and no step has more than `num`."""
    fits = all(begin >= 0 and 0 <= count <= num and begin + count <= total for begin, count in steps)
    require(fits, f"steps of up to {num} rows among {total}")


_NOT_PLAIN = "the tensors are not contiguous float32 numbers on the CPU"
_NO_WEIGHT = "the weight is not int8 numbers that are multiplied several times"


@LSTM_FORWARD.kernel("cpu")
def lstm_forward(gates_x: Tensor, gates_h: Tensor, cell: Tensor, kept: Tensor) -> Plan[tuple[Tensor, Tensor]]:
    """h' and c' of one step; the activated gates go into `kept`."""
    if not _takes(gates_x, gates_h, cell, kept):
        return _NOT_PLAIN
    return lambda: _forward(gates_x, gates_h, cell, kept)


def _forward(gates_x: Tensor, gates_h: Tensor, cell: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    rows, size = _sizes(cell, (gates_x, gates_h, kept))
    require_disjoint(kept, "kept", [(gates_x, "gates_x"), (gates_h, "gates_h"), (cell, "cell")])
    h, new = torch.empty_like(cell), torch.empty_like(cell)
    n = rows * size
    task = lib.LstmForward(
        gates_x=_address(gates_x, "gates_x", 4 * n),
        gates_h=_address(gates_h, "gates_h", 4 * n),
        c=_address(cell, "c", n),
        kept=_address(kept, "kept", 4 * n),
        h=_address(h, "h", n),
        new_c=_address(new, "new_c", n),
        rows=rows,
        size=size,
    )
    kernels().lstm_forward(ctypes.byref(task))
    return h, new


@LSTM_BACKWARD.kernel("cpu")
def lstm_backward(dh: Tensor, dc: Tensor, gates: Tensor, cell: Tensor, new: Tensor, out: Tensor) -> Plan[Tensor]:
    """The gradient of the cell state before the step; that of the gates goes into `out`."""
    if not _takes(dh, dc, gates, cell, new, out):
        return _NOT_PLAIN
    return lambda: _backward(dh, dc, gates, cell, new, out)


def _backward(dh: Tensor, dc: Tensor, gates: Tensor, cell: Tensor, new: Tensor, out: Tensor) -> Tensor:
    rows, size = _sizes(cell, (gates, out))
    read = [(dh, "dh"), (dc, "dc"), (gates, "gates"), (cell, "c"), (new, "new_c")]
    require_disjoint(out, "out", read)
    before = torch.empty_like(cell)
    n = rows * size
    task = lib.LstmBackward(
        dh=_address(dh, "dh", n),
        dc=_address(dc, "dc", n),
        gates=_address(gates, "gates", 4 * n),
        c=_address(cell, "c", n),
        new_c=_address(new, "new_c", n),
        d_gates=_address(out, "out", 4 * n),
        dc_before=_address(before, "before", n),
        rows=rows,
        size=size,
    )
    kernels().lstm_backward(ctypes.byref(task))
    return before


@LSTM_RUN.kernel("cpu")
def lstm_run(s: LstmForward) -> Plan[list[Rounded]]:
    """All steps: hidden state to codes, their product with the weight, the cell. Memory is allocated once for all of them."""
    request, w = s.request, s.w
    grid, output = grid_of(request.format), None if s.output is None else float_grid(s.output)
    require(s.h.dim() == s.c.dim() == 2 and s.h.shape == s.c.shape, "states of one shape, with two axes")
    if declined := why_not_rounded(request, s.scale):
        return declined
    if not isinstance(grid, Integers) or not has_integer_codes(request.format):
        return f"{request.format.name} has no codes of 4-bit integers"
    if not _takes(s.gates_x, s.h, s.c, s.kept, s.cells, s.outputs):
        return _NOT_PLAIN
    if s.output is not None and output is None:
        return f"no kernel rounds products to {s.output.name}"
    if not isinstance(w.q, Tensor) or w.q.dtype != torch.int8 or not w.q.is_contiguous() or w.cache is None:
        return _NO_WEIGHT
    of = operands_of(request.format, w.format, carrier_dtype(request.format), s.h.shape[1])
    if of is None:
        return f"{kernels().isa} has no product of these formats"
    bound = request.spec.scaling.bound(s.scale, request.format, request.stored)
    if bound is not None and isinstance(bound.value, Tensor) and bound.value.numel() != 1:
        return "there is more than one clip value"
    return lambda: _run(s, w.q, grid, output, of, bound)


def _run(s: LstmForward, w_q: Any, grid: Integers, output: Any, of: Any, bound: Bound | None) -> list[Rounded]:
    request, w = s.request, s.w
    assert w.cache is not None
    num, size = s.h.shape
    total = s.gates_x.shape[0]
    _check_steps(s.steps, num, total)
    require(w_q.shape == (4 * size, size), f"a weight of shape ({4 * size}, {size})")
    arrays = {"gates_x": s.gates_x, "h": s.h, "c": s.c, "kept": s.kept, "cells": s.cells, "outputs": s.outputs}
    for name in ("h", "c", "kept", "cells", "outputs"):
        require_disjoint(arrays[name], name, [(t, other) for other, t in arrays.items() if other != name])
    codes = torch.empty(num, size, dtype=carrier_dtype(request.format))
    gates_h = torch.empty(num, 4 * size, dtype=torch.float32)
    blocks = [-(-count * size // BLOCK) for _, count in s.steps]
    packed = torch.empty(sum(blocks) * BLOCK // 2, dtype=torch.uint8)
    masks = None if bound is None else torch.empty(sum(blocks) * 8, dtype=torch.uint8)

    n = total * size
    x, kept = _address(s.gates_x, "gates_x", 4 * n), _address(s.kept, "kept", 4 * n)
    h, c, outputs = _address(s.h, "h", num * size), _address(s.c, "c", num * size), _address(s.outputs, "outputs", n)
    before, after = (_address(t, "cells", n) for t in (s.cells[0], s.cells[1]))
    at_packed = pointer(packed, "packed", torch.uint8, sum(blocks) * BLOCK // 2)
    at_masks = 0 if masks is None else pointer(masks, "masks", torch.uint8, sum(blocks) * 8)
    rule, value = (0, 0.0) if bound is None else (RULES[bound.rule], float(bound.value))
    clip: Any = lib.Clip(
        x=h,
        dtype=lib.CODES[torch.float32],
        inv_scale=float(s.scale.reciprocal()),
        low=grid.low,
        high=grid.high,
        mask_rule=rule,
        bound=value,
        codes=pointer(codes, "codes", codes.dtype, num * size),
    )
    weight, into = pointer(w_q, "w", torch.int8, 4 * size * size), _address(gates_h, "gates_h", 4 * num * size)
    product: Any = lib.MatMul(
        a=clip.codes,
        b=weight,
        out=into,
        rows=num,
        columns=4 * size,
        depth=size,
        scale=float(s.scale if w.scale is None else s.scale * w.scale),
        rounds=output is not None,
        post=1.0,
        integers=True,
        is_unsigned=codes.dtype == torch.uint8,
        of=of,
    )
    if output is not None:
        product.grid = output
    product.panels = panels(product, w.cache)
    cell: Any = lib.LstmForward(gates_h=into, h=h, new_c=c, size=size)
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


@LSTM_RUN_BACK.kernel("cpu")
def lstm_run_back(s: LstmBackward) -> Plan[tuple[list[float], Tensor | None]]:
    """All steps: the cell, the gradient of its gates to codes, their product with the weight, masked."""
    request, w = s.request, s.w
    output = None if s.output is None else float_grid(s.output)
    grid = log_grid(request.format)
    require(
        s.dh.dim() == s.dc.dim() == 2 and s.dh.shape == s.dc.shape, "gradients of states of one shape, with two axes"
    )
    if declined := why_not_rounded(request, s.scale):
        return declined
    if grid is None or carrier_dtype(request.format) is not torch.bfloat16:
        return f"{request.format.name} is no logarithmic grid in bfloat16"
    if not _takes(s.dh, s.dc, s.gates, s.cells, s.d_gates):
        return _NOT_PLAIN
    if s.output is not None and output is None:
        return f"no kernel rounds products to {s.output.name}"
    if not isinstance(w.q, Tensor) or w.q.dtype != torch.int8 or not w.q.is_contiguous() or w.cache is None:
        return _NO_WEIGHT
    of = operands_of(request.format, w.format, torch.bfloat16)
    if of is None:
        return f"{kernels().isa} has no product of these formats"
    if any(q is not None and (q.grid is not None or mask is None) for q, mask in zip(s.codes, s.masks, strict=True)):
        return "the codes of the hidden state are not those of integers with a mask"
    return lambda: _run_back(s, w.q, grid, output, of)


def _run_back(s: LstmBackward, w_q: Any, grid: Any, output: Any, of: Any) -> tuple[list[float], Tensor | None]:
    w = s.w
    assert w.cache is not None
    num, size = s.dh.shape
    total = s.gates.shape[0]
    _check_steps(s.steps, num, total)
    require(len(s.masks) == len(s.codes) == len(s.steps), "a mask and codes, or None, for every step")
    require(w_q.shape == (4 * size, size), f"a weight of shape ({4 * size}, {size})")
    require(s.dy is None or s.dy.shape == (total, size), f"a gradient of the outputs of shape ({total}, {size})")
    arrays = {"dh": s.dh, "dc": s.dc, "d_gates": s.d_gates, "gates": s.gates, "cells": s.cells}
    for name in ("dh", "dc", "d_gates"):
        require_disjoint(arrays[name], name, [(t, other) for other, t in arrays.items() if other != name])
    rounded = torch.empty(num, 4 * size, dtype=torch.bfloat16)
    dc_before = torch.empty_like(s.dc)

    n = total * size
    dh, dc, d_gates = (
        _address(s.dh, "dh", num * size),
        _address(s.dc, "dc", num * size),
        _address(s.d_gates, "d_gates", 4 * n),
    )
    gates, (before, after) = (
        _address(s.gates, "gates", 4 * n),
        (_address(t, "cells", n) for t in (s.cells[0], s.cells[1])),
    )
    cell: Any = lib.LstmBackward(dh=dh, dc=dc, dc_before=_address(dc_before, "dc_before", num * size), size=size)
    log: Any = lib.LogRound(dtype=lib.CODES[torch.float32], inv_scale=float(s.scale.reciprocal()), num=1)
    left = pointer(rounded, "rounded", torch.bfloat16, 4 * num * size)
    log.grid[0], log.out[0], log.out_dtype = grid, left, lib.CODES[torch.bfloat16]
    weight = pointer(w_q, "w", torch.int8, 4 * size * size)
    product: Any = lib.MatMul(
        a=left, b=weight, out=dh, rows=num, columns=size, depth=4 * size, scale=1.0, post=1.0, of=of
    )
    product.panels = panels(product, w.cache)
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
        rest.mask = bits_of(mask, "mask", rest.n)
        rest.packed = None
        if codes is not None:
            rest.packed = codes_of(codes.data, rest.n)
            rest.is_signed = codes.signed
        clipped = run.epilogue(ctypes.byref(rest))
        if codes is not None:
            part = torch.tensor(clipped, dtype=torch.float32)
            total = part if total is None else total + part
        amaxes.append(amax)
    return amaxes, total
