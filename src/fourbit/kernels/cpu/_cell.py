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
def lstm_forward(gates_x: Tensor, gates_h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """h', c' and the activated gates of one step."""
    if not _takes(gates_x, gates_h, cell):
        return None
    h, new, kept = torch.empty_like(cell), torch.empty_like(cell), torch.empty_like(gates_x)
    arrays = (t.data_ptr() for t in (gates_x, gates_h, cell, kept, h, new))
    task: Any = c.LstmForward(*arrays, *cell.shape)
    kernels().lstm_forward(ctypes.byref(task))
    return h, new, kept


@backends.register("lstm_backward", "cpu")
def lstm_backward(dh: Tensor, dc: Tensor, gates: Tensor, cell: Tensor, new: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gradients of the gates and of the cell state before the step."""
    if not _takes(dh, dc, gates, cell, new):
        return None
    d_gates, before = torch.empty_like(gates), torch.empty_like(cell)
    arrays = (t.data_ptr() for t in (dh, dc, gates, cell, new, d_gates, before))
    task: Any = c.LstmBackward(*arrays, *cell.shape)
    kernels().lstm_backward(ctypes.byref(task))
    return d_gates, before
