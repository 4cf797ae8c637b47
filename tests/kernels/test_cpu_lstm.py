"""The native LSTM cell against float64, on every instruction set, and whole sequences against steps one by one."""

from __future__ import annotations

import math

import pytest
import torch
from instruction_sets import instruction_set, isas
from kernel_cases import has_products, isas_with_products, needs_library, needs_products, threads
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fourbit as fb
from fourbit import backends, formats
from fourbit.kernels.cpu import _lstm as cell
from fourbit.ops import LSTM_CELL, LSTM_RUN, LSTM_RUN_BACK
from fourbit.recipes import catalog

pytestmark = needs_library


def inputs(rows: int, size: int) -> list[Tensor]:
    """Shares of the gates, cell state, and the gradients of h and c."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(rows, 4 * size, generator=generator) * 5
    if size > 3:
        x[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 1e-6])
        x[-1, 2 * size : 2 * size + 3] = torch.tensor([math.inf, -math.inf, 0.25])
    return [x, *(torch.randn(rows, n * size, generator=generator) for n in (4, 1, 1, 1))]


@pytest.mark.parametrize("isa", isas("lstm_forward") or [None])
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


@pytest.mark.parametrize("isa", isas())
def test_gradients_may_take_the_place_of_the_gates(isa):
    x, u, c, dh, dc = inputs(3, 130)
    gates, d_gates = torch.empty_like(x), torch.empty_like(x)
    with instruction_set(isa):
        new = cell.lstm_forward(x, u, c, gates)[1]
        before = cell.lstm_backward(dh, dc, gates, c, new, d_gates)
        again = cell.lstm_backward(dh, dc, gates, c, new, gates)
    torch.testing.assert_close((again, gates), (before, d_gates), rtol=0, atol=0, equal_nan=True)


def test_other_dtypes_and_layouts_are_left_to_the_reference():
    x, u, c, dh, dc = inputs(4, 8)
    assert cell.lstm_forward(x.double(), u.double(), c.double(), x.double()) is None
    assert cell.lstm_forward(x.t().contiguous().t(), u, c, x) is None
    assert cell.lstm_backward(dh.t().contiguous().t(), dc, x, c, c, x) is None


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent_layers_train_on_every_instruction_set(isa, kind):
    """Also on those without products of their own, with a weight that is kept for all steps."""

    def step() -> list[Tensor]:
        torch.manual_seed(0)
        rnn = fb.convert(torch.nn.Sequential(kind(6, 16)), fb.Recipe("x", (fb.Rule(catalog.TPR),)))
        y = rnn(torch.randn(5, 4, 6))[0]
        y.square().sum().backward()
        return [y.detach(), *(p.grad for p in rnn.parameters())]

    with instruction_set(isa):
        found = step()
    with backends.without():
        expected = step()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_sequences_run_at_once_as_soon_as_the_instruction_set_allows_it():
    """What one instruction set said of the products is not remembered for another."""
    for isa in (*isas(), *reversed(isas())):
        with instruction_set(isa):
            multiplies = cell.operands_of(formats.UINT4, formats.INT4_SYM, torch.uint8, 4) is not None
        assert multiplies == has_products(isa) == (isa in ("avx2", "avx_vnni", "avx512_vnni", "dot_product"))


def trained(lengths: list[int] | None, size: int, spec, poison: str, last_only: bool) -> list[Tensor]:
    """Everything that three steps of a layer leave."""
    torch.manual_seed(0)
    rnn = fb.convert(torch.nn.Sequential(torch.nn.LSTM(6, size, bidirectional=True)), fb.Recipe("x", (fb.Rule(spec),)))
    found = []
    for step in range(3):
        x = torch.randn(5, 4, 6).requires_grad_()
        given = x if lengths is None else pack_padded_sequence(x, lengths)
        y, (h, c) = rnn(given)
        y = y.data if isinstance(y, PackedSequence) else y
        bad = torch.ones(())
        if poison == "gradient" and step == 1:
            bad = torch.tensor(math.nan)
        rnn.zero_grad()
        ((0 if last_only else (y.sin() * bad).sum()) + h.square().sum() * bad + c.sum()).backward()
        found += [y, h, c, x.grad, *(p.grad for p in rnn.parameters())]
        if poison == "state" and step == 1:
            with torch.no_grad():
                rnn[0].bias_hh_l0[0] = math.nan
        with torch.no_grad():
            for parameter in rnn.parameters():
                parameter -= 0.01 * parameter.grad.nan_to_num()
    return [t.detach().clone() for t in (*found, *rnn.buffers())]


def test_a_transposed_weight_is_not_read_as_if_it_lay_in_order():
    torch.manual_seed(0)
    rnn = fb.convert(torch.nn.Sequential(torch.nn.LSTM(6, 16)), fb.Recipe("x", (fb.Rule(catalog.TPR),)))
    weight = rnn[0].weight_hh_l0
    x, found = torch.randn(5, 4, 6), []
    for transposed in (False, True):
        if transposed:
            weight.data = weight.data.t().contiguous().t()
        for _ in range(2):
            y = rnn(x)[0]
            rnn.zero_grad()
            y.square().sum().backward()
        found.append((y.detach(), weight.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)
    assert rnn(torch.randn(5, 0, 6))[0].shape == (5, 0, 16)


@needs_products
@pytest.mark.parametrize("isa", isas_with_products())
@pytest.mark.parametrize("spec", [catalog.TPR, catalog.IBM2020_DW8.rules[-1].spec], ids=["radix-4", "FP8 in wgrad"])
@pytest.mark.parametrize("size", [7, 16, 40])
@pytest.mark.parametrize("lengths", [None, [5, 3, 3, 1]])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("poison", ["", "gradient", "state"])
def test_all_steps_at_once_give_the_bits_of_single_steps(isa, spec, size, lengths, last_only, poison, monkeypatch):
    with instruction_set(isa), backends.watching() as calls:
        at_once = trained(lengths, size, spec, poison, last_only)
    assert {call.operation for call in calls if not call.declined} >= {"lstm_run", "lstm_run_back"}
    for operation in (LSTM_RUN, LSTM_RUN_BACK):
        monkeypatch.setattr(operation, "kernels", [])
        monkeypatch.setattr(operation, "_kernels", None)
    with instruction_set(isa):
        one_by_one = trained(lengths, size, spec, poison, last_only)
    for a, b in zip(at_once, one_by_one, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
