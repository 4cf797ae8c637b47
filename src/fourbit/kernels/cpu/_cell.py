"""What an LSTM does between its products, on the CPU."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fourbit import backends
from fourbit.kernels.cpu import _library as c
from fourbit.kernels.cpu._quantize import kernels


def _takes(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


@backends.register("lstm_forward", "cpu")
def lstm_forward(gates_x: Tensor, gates_h: Tensor, cell: Tensor, kept: Tensor) -> tuple[Tensor, Tensor] | None:
    """h' and c' of one step; the activated gates go into `kept`."""
    if not _takes(gates_x, gates_h, cell, kept):
        return None
    h, new = torch.empty_like(cell), torch.empty_like(cell)
    arrays = (t.data_ptr() for t in (gates_x, gates_h, cell, kept, h, new))
    task: Any = c.LstmForward(*arrays, *cell.shape)
    kernels().lstm_forward(ctypes.byref(task))
    return h, new


@backends.register("lstm_backward", "cpu")
def lstm_backward(dh: Tensor, dc: Tensor, gates: Tensor, cell: Tensor, new: Tensor, out: Tensor) -> Tensor | None:
    """The gradient of the cell state before the step; that of the gates goes into `out`."""
    if not _takes(dh, dc, gates, cell, new, out):
        return None
    before = torch.empty_like(cell)
    arrays = (t.data_ptr() for t in (dh, dc, gates, cell, new, out, before))
    task: Any = c.LstmBackward(*arrays, *cell.shape)
    kernels().lstm_backward(ctypes.byref(task))
    return before
