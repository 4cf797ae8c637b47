"""The native LSTM cell against float64, on every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import instruction_set, isas, needs_library, threads
from torch import Tensor

from fourbit import backends
from fourbit.kernels.cpu import _cell as cell
from fourbit.ops import LSTM_CELL

pytestmark = needs_library


def inputs(rows: int, size: int) -> list[Tensor]:
    """Shares of the gates, cell state, and the gradients of h and c."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(rows, 4 * size, generator=generator) * 5
    if size > 3:
        x[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 1e-6])
        x[-1, 2 * size : 2 * size + 3] = torch.tensor([math.inf, -math.inf, 0.25])
    return [x, *(torch.randn(rows, n * size, generator=generator) for n in (4, 1, 1, 1))]


@pytest.mark.parametrize("isa", isas() or [None])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (7, 15), (3, 16), (33, 64), (9, 333)])
def test_the_native_cell_agrees_with_float64(isa, num_threads, rows, size):
    x, u, c, dh, dc = inputs(rows, size)
    gates, d_gates = torch.empty_like(x), torch.empty_like(x)
    with instruction_set(isa), threads(num_threads):
        forward = cell.lstm_forward(x, u, c, gates)
        assert forward is not None
        before = cell.lstm_backward(dh, dc, gates, c, forward[1], d_gates)
    kept, out = torch.empty_like(x).double(), torch.empty_like(x).double()
    with backends.without():
        expected = LSTM_CELL.forward(x.double(), u.double(), None, c.double(), kept)
        states = c.double(), forward[1].double(), out
        d = LSTM_CELL.backward(dh.double(), dc.double(), gates.double(), None, None, *states)
    for a, b in zip((*forward, gates), (*expected, kept), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=2e-6, atol=1e-6, equal_nan=True)
    for a, b in zip((d_gates, before), (out, d.c), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=5e-6, atol=2e-6, equal_nan=True)


def test_other_dtypes_and_layouts_are_left_to_the_reference():
    x, u, c, dh, dc = inputs(4, 8)
    assert cell.lstm_forward(x.double(), u.double(), c.double(), x.double()) is None
    assert cell.lstm_forward(x.t().contiguous().t(), u, c, x) is None
    assert cell.lstm_backward(dh.t().contiguous().t(), dc, x, c, c, x) is None
