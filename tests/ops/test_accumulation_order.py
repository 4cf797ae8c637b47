"""Rounded sums in layers: which terms each product adds, in which order, and what a LayerSpec makes of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

import fourbit as fb
from fourbit import Accumulation, LayerSpec, QuantSpec, backends, formats
from fourbit.errors import UserError
from fourbit.formats import FloatFormat, IntFormat
from fourbit.nn import functional as Q
from fourbit.ops import Contraction, Convolution, LayerState, LinearMap, Matmul, ProductSize, accumulate, contract
from fourbit.quantizers import Amax, round_to_format

EXACT = Accumulation(IntFormat("int16", width=16, low=-32768, high=32767), chunk=3)
COARSE = FloatFormat("coarse", exponent_bits=5, mantissa_bits=1, exponent_bias=15)
"""Two significant bits: nearly every addition is rounded, so that any other order gives other numbers."""

acc = Accumulation(COARSE, chunk=5)


def total(terms: list[Fraction], format=COARSE, chunk: int = 5) -> float:
    sums = []
    for begin in range(0, len(terms), chunk):
        s = Fraction(0)
        for term in terms[begin : begin + chunk]:
            s = Fraction(format.round(s + term))
        sums.append(s)
    y = Fraction(0)
    for s in sums:
        y = Fraction(format.round(y + s))
    return float(y)


def convolution_terms(con: Convolution, which: str, a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]):
    """Terms of each result element in order, from the definition of a convolution, pixel by pixel.

    `a`, `b` and `which` are those of an ordinary convolution: of fprop(x, w), dgrad(g, w) or wgrad(g, x).
    """
    stride, padding, dilation = (np.array(v) for v in (con.stride, con.padding, con.dilation))

    def at(t: np.ndarray, n: int, channel: int, pixel) -> float:
        inside = all(0 <= i < size for i, size in zip(pixel, t.shape[2:], strict=True))
        return float(t[(n, channel, *pixel)]) if inside else 0.0

    for index in np.ndindex(*shape):
        terms = []
        if which == "fprop":
            (n, o, *p), (num_out, per_group, *kernel) = index, b.shape
            group = o // (num_out // con.groups)
            for r in np.ndindex(*kernel):
                for c in range(per_group):
                    pixel = np.array(p) * stride + np.array(r) * dilation - padding
                    terms.append(at(a, n, group * per_group + c, pixel) * float(b[(o, c, *r)]))
        elif which == "dgrad":
            (n, channel, *i), (num_out, per_group, *kernel) = index, b.shape
            group, c = divmod(channel, per_group)
            for r in reversed(list(np.ndindex(*kernel))):  # the gradient's pixels in order
                offset = np.array(i) + padding - np.array(r) * dilation
                for o in range(group * (num_out // con.groups), (group + 1) * (num_out // con.groups)):
                    met = not (offset % stride).any()
                    terms.append((at(a, n, o, offset // stride) if met else 0.0) * float(b[(o, c, *r)]))
        else:
            (o, c, *r), per_group = index, shape[1]
            group = o // (shape[0] // con.groups)
            for n in range(a.shape[0]):
                for p in np.ndindex(*a.shape[2:]):
                    pixel = np.array(p) * stride + np.array(r) * dilation - padding
                    terms.append(float(a[(n, o, *p)]) * at(b, n, group * per_group + c, pixel))
        yield index, [Fraction(t) for t in terms]


def conv(stride, padding, dilation=None, groups=1, transposed=False, output_padding=None) -> Convolution:
    d = len(stride)
    return Convolution(stride, padding, dilation or (1,) * d, groups, transposed, output_padding or (0,) * d)


CONVOLUTIONS = {
    "1d": (conv((1,), (1,)), (2, 3, 7), (4, 3, 3)),
    "1d, strided and dilated": (conv((3,), (2,), (2,)), (2, 2, 12), (2, 2, 3)),
    "1d, padding beyond the kernel": (conv((2,), (4,)), (1, 2, 5), (2, 2, 2)),
    "2d": (conv((1, 1), (1, 1)), (2, 3, 4, 3), (2, 3, 3, 3)),
    "2d, strided, pixels left over": (conv((2, 3), (0, 1)), (2, 2, 6, 6), (2, 2, 2, 3)),
    "2d, grouped": (conv((1, 1), (1, 0), None, 2), (2, 4, 3, 3), (6, 2, 2, 2)),
    "2d, depthwise": (conv((1, 2), (1, 1), None, 3), (2, 3, 4, 4), (3, 1, 3, 3)),
    "2d, 1x1, strided": (conv((2, 2), (0, 0)), (2, 3, 4, 4), (4, 3, 1, 1)),
    "3d": (conv((1, 2, 1), (1, 0, 1)), (1, 2, 3, 4, 2), (2, 2, 2, 2, 3)),
    "transposed 1d": (conv((2,), (1,), None, 1, True, (1,)), (2, 3, 4), (3, 2, 3)),
    "transposed 2d, grouped": (conv((1, 2), (0, 1), (2, 1), 2, True), (2, 4, 3, 3), (4, 2, 2, 2)),
    "transposed 3d": (conv((1, 2, 1), (0, 1, 0), None, 1, True, (0, 1, 0)), (1, 2, 2, 2, 2), (2, 2, 2, 3, 2)),
}


every_convolution = pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
OTHERS = {
    "linear": (LinearMap(), (5, 7), (4, 7)),
    "linear, three axes": (LinearMap(), (2, 3, 7), (4, 7)),
    "matmul": (Matmul(), (3, 4), (4, 2)),
    "matmul, broadcast": (Matmul(), (2, 1, 3, 4, 5), (3, 1, 5, 6)),
    "matmul, one batch of many": (Matmul(), (4, 5), (2, 3, 5, 6)),
    "matrix and vector": (Matmul(), (2, 4, 5), (5,)),
    "vector and matrix": (Matmul(), (5,), (2, 5, 3)),
    "two vectors": (Matmul(), (5,), (5,)),
}
every_contraction = pytest.mark.parametrize(
    "case", [*CONVOLUTIONS.values(), *OTHERS.values()], ids=[*CONVOLUTIONS, *OTHERS]
)


def three_products(case: tuple[Contraction, tuple[int, ...], tuple[int, ...]], accumulation: Accumulation):
    """y, dx, dw of operands that are small integers and a gradient g, and these."""
    contraction, x_shape, w_shape = case
    r = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, x_shape, generator=r).float().requires_grad_()
    w = torch.randint(-2, 3, w_shape, generator=r).float().requires_grad_()
    spec = LayerSpec(accumulation=accumulation)
    y = contract(x, w, contraction, LayerState(spec))
    g = torch.randint(-2, 3, y.shape, generator=r).float()
    dx, dw = torch.autograd.grad(y, (x, w), g)
    return y.detach(), dx, dw, x, w, g


@every_contraction
def test_where_sums_are_exact_all_three_products_equal_torch_s(case):
    y, dx, dw, x, w, g = three_products(case, EXACT)
    wanted = case[0].fprop(x, w)
    assert torch.equal(y, wanted)
    for found, expected in zip((dx, dw), torch.autograd.grad(wanted, (x, w), g), strict=True):
        assert found.shape == expected.shape and torch.equal(found, expected)


@every_convolution
def test_convolutions_add_their_terms_in_the_documented_order(case):
    contraction = case[0]
    y, dx, dw, x, w, g = three_products(case, acc)
    with backends.without():
        assert all(torch.equal(p, q) for p, q in zip((y, dx, dw), three_products(case, acc), strict=False))
    x, w, g = (t.detach().numpy() for t in (x, w, g))
    if contraction.transposed:  # an ordinary convolution, seen from the other side
        checks = ((y, "dgrad", x, w), (dx, "fprop", g, w), (dw, "wgrad", x, g))
    else:
        checks = ((y, "fprop", x, w), (dx, "dgrad", g, w), (dw, "wgrad", g, x))
    for found, which, a, b in checks:
        for index, terms in convolution_terms(contraction, which, a, b, tuple(found.shape)):
            assert float(found[index]) == total(terms), (which, index)


def test_linear_layers_add_features_in_order_and_rows_in_order():
    y, dx, dw, x, w, g = three_products(OTHERS["linear, three axes"], acc)
    x, g = x.detach().reshape(6, 7), g.reshape(6, 4)
    w = w.detach()

    def check(found, a, b):
        for m, n in np.ndindex(*found.shape):
            assert float(found[m, n]) == total([Fraction(v) for v in (a[m] * b[:, n]).tolist()])

    check(y.reshape(6, 4), x, w.t())
    check(dx.reshape(6, 7), g, w)
    check(dw, g.t(), x)


def test_a_broadcast_matmul_adds_the_batches_of_its_gradients_in_order():
    """x [2, 1, 3, 4, 5] @ w [3, 1, 5, 6] has batch axes [2, 3, 3]: dx sums over the second, dw over the first and third."""
    _, dx, dw, x, w, g = three_products(OTHERS["matmul, broadcast"], acc)
    x, w = x.detach(), w.detach()
    assert g.shape == (2, 3, 3, 4, 6)
    for i, j, m, k in itertools.product(range(2), range(3), range(4), range(5)):
        terms = [g[i, b, j, m, n] * w[b, 0, k, n] for b in range(3) for n in range(6)]
        assert float(dx[i, 0, j, m, k]) == total([Fraction(float(t)) for t in terms])
    for b, k, n in itertools.product(range(3), range(5), range(6)):
        terms = [x[i, 0, j, m, k] * g[i, b, j, m, n] for i in range(2) for j in range(3) for m in range(4)]
        assert float(dw[b, 0, k, n]) == total([Fraction(float(t)) for t in terms])


def test_the_paper_s_layer_scales_and_rounds_what_the_chains_give():
    spec = fb.recipes.get("ibm2020").rules[-1].spec
    spec = replace(spec, x_fprop=QuantSpec("int4_sym", Amax()), accumulation=Accumulation(chunk=4))
    state = LayerState(spec)
    x, w, g = torch.randn(6, 10, requires_grad=True), torch.randn(4, 10, requires_grad=True), torch.randn(6, 4) * 1e-4
    y = contract(x, w, LinearMap(), state)
    y.backward(g)
    a, b = fb.quantize(x, spec.x_fprop), fb.quantize(w, spec.w_fprop)

    def chains(left, right):
        return accumulate(left.float().unsqueeze(0), right.float().unsqueeze(0), spec.accumulation).squeeze(0)

    fp16 = formats.FP16_169
    assert torch.equal(y, round_to_format(chains(a.q, b.q.t()) * (a.scale * b.scale), fp16))
    even, odd = (fb.quantize(g, s, stored=state.g_exponent) for s in (spec.g_dgrad, spec.g_wgrad))
    assert torch.equal(x.grad, round_to_format(chains(even.q, b.q) * b.scale, fp16) * even.scale)
    assert torch.equal(w.grad, round_to_format(chains(odd.q.t(), a.q) * a.scale, fp16) * odd.scale)


def test_stochastic_layers_replay_a_step_draw_anew_in_the_next_and_differ_between_products():
    spec = LayerSpec(accumulation=Accumulation("fp8_152", rounding="stochastic"))
    assert spec.stochastic
    state = LayerState(spec, seed=3)
    x, w = torch.rand(8, 40), torch.rand(8, 40, requires_grad=True)
    first, again = (contract(x, w, LinearMap(), state) for _ in range(2))
    assert torch.equal(first, again)
    first.sum().backward()
    assert not torch.equal(contract(x, w, LinearMap(), state), first)
    keys = {state.counter.sum_key(which) for which in ("fprop", "dgrad", "wgrad")}
    assert len(keys) == 3 and None not in keys
    with pytest.raises(UserError, match="pass state="):
        Q.linear(x, w, None, spec)


def test_an_accumulation_is_part_of_the_spec():
    plain, rounded = LayerSpec(), LayerSpec(accumulation=Accumulation())
    assert plain.is_identity and not rounded.is_identity and not rounded.stochastic
    assert plain != rounded and hash(rounded) == hash(LayerSpec(accumulation=Accumulation("fp16_169", 64, "nearest")))
    with pytest.raises(UserError, match="must be an Accumulation or None"):
        LayerSpec(accumulation="fp16_169")  # type: ignore[arg-type]
    net = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(3)))
    text = str(fb.explain(net, "ibm2020-acc"))
    assert text.count("sums     fp16_169 after every addition, chunks of 64") == 2
    assert "sums" not in str(fb.explain(net, "ibm2020"))


def test_infinity_in_a_full_precision_operand_reaches_the_result_through_the_chain():
    layer = fb.nn.Linear(2, 1, bias=False, spec=LayerSpec(accumulation=Accumulation(), output=formats.FP16_169))
    assert layer(torch.tensor([[float("inf"), 0.0]])).isinf().all()
    assert layer(torch.tensor([[float("nan"), 0.0]])).isnan().all()


def test_empty_batches_give_empty_results_and_zero_gradients():
    spec = fb.recipes.get("ibm2020-acc").rules[-1].spec
    for layer in (fb.nn.Conv2d(3, 4, 3, padding=1, spec=spec), fb.nn.ConvTranspose2d(3, 4, 3, padding=1, spec=spec)):
        x = torch.zeros(0, 3, 5, 5, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (0, 4, 5, 5) and x.grad.shape == x.shape and not layer.weight.grad.any()


def test_operands_that_do_not_fit_get_a_clear_error():
    spec = LayerSpec(accumulation=Accumulation())
    with pytest.raises(UserError, match="needs 3 elements"):
        fb.nn.Conv2d(3, 4, 3, spec=spec)(torch.zeros(1, 2, 5, 5))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        fb.nn.Conv2d(3, 4, 3, spec=spec)(torch.zeros(1, 3, 2, 2))


def test_a_contraction_without_an_order_is_refused():
    class Outer(Contraction):
        def fprop(self, x, w):
            return torch.outer(x, w)

        def size(self, x, w, y):
            return ProductSize(1, x.numel(), w.numel(), 1, x.numel(), w.numel())

    spec = LayerSpec(accumulation=Accumulation())
    with pytest.raises(UserError, match="not defined for Outer: leave accumulation=None"):
        contract(torch.ones(2), torch.ones(3), Outer(), LayerState(spec))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_keep_the_dtype_of_the_inputs(dtype):
    layer = fb.nn.Conv2d(3, 4, 3, spec=fb.recipes.get("ibm2020-acc").rules[-1].spec).to(dtype)
    x = torch.randn(2, 3, 5, 5, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == layer.weight.grad.dtype == dtype and y.abs().sum() > 0
