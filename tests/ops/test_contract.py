"""The one autograd.Function: products, gradients and slots, for every kind of layer, against independent computations."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fourbit as fb
from fourbit import formats
from fourbit.errors import UserError
from fourbit.nn import functional as Q
from fourbit.ops import (
    REUSE,
    SLOTS,
    Contraction,
    Convolution,
    LayerSpec,
    LayerState,
    LinearMap,
    Matmul,
    Operand,
    contract,
)
from fourbit.quantizers import Amax, ClipValue, GradScale, QuantSpec, Sawb, pack, quantize

INT4 = QuantSpec(formats.INT4_SYM, Amax())
FP4 = QuantSpec(formats.FP4_R4_EVEN, Amax())

CASES: dict[str, tuple[Contraction, tuple[int, ...], tuple[int, ...]]] = {
    "linear": (LinearMap(), (5, 7), (4, 7)),
    "linear, three axes": (LinearMap(), (2, 3, 7), (4, 7)),
    "matmul, broadcast": (Matmul(), (2, 3, 4, 5), (3, 5, 6)),
    "conv1d": (Convolution((1,), (1,), (1,)), (2, 3, 9), (4, 3, 3)),
    "conv2d": (Convolution((1, 1), (1, 1), (1, 1)), (2, 3, 6, 5), (4, 3, 3, 3)),
    "conv2d, strided": (Convolution((2, 1), (0, 2), (1, 1)), (2, 3, 7, 5), (4, 3, 2, 3)),
    "conv2d, dilated": (Convolution((1, 1), (2, 2), (2, 2)), (2, 3, 6, 6), (4, 3, 3, 3)),
    "conv2d, grouped": (Convolution((1, 1), (1, 1), (1, 1), 2), (2, 4, 5, 5), (6, 2, 3, 3)),
    "conv2d, depthwise": (Convolution((1, 1), (1, 1), (1, 1), 4), (2, 4, 5, 5), (4, 1, 3, 3)),
    "conv2d, 1x1": (Convolution((2, 2), (0, 0), (1, 1)), (2, 3, 6, 6), (5, 3, 1, 1)),
    "conv2d, 1x1, padded": (Convolution((2, 3), (1, 2), (1, 1)), (2, 3, 6, 7), (5, 3, 1, 1)),
    "conv2d, 1x1, grouped": (Convolution((1, 2), (0, 0), (1, 1), 2), (2, 4, 5, 6), (6, 2, 1, 1)),
    "conv1d, one pixel": (Convolution((3,), (1,), (1,)), (2, 3, 9), (4, 3, 1)),
    "conv3d": (Convolution((1, 2, 1), (1, 0, 1), (1, 1, 1)), (2, 2, 4, 5, 4), (3, 2, 3, 2, 3)),
    "transposed 1d": (Convolution((2,), (1,), (1,), 1, True, (1,)), (2, 3, 5), (3, 4, 3)),
    "transposed 2d": (Convolution((2, 2), (1, 1), (1, 1), 1, True, (1, 0)), (2, 3, 4, 5), (3, 4, 3, 3)),
    "transposed 2d, grouped": (Convolution((1, 1), (0, 0), (2, 2), 2, True, (0, 0)), (2, 4, 4, 4), (4, 3, 2, 2)),
    "transposed 3d": (
        Convolution((1, 2, 1), (0, 1, 0), (1, 1, 1), 1, True, (0, 1, 0)),
        (1, 2, 3, 3, 3),
        (2, 3, 2, 3, 2),
    ),
}
every_contraction = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run(case, spec: LayerSpec, dtype=torch.float32, seed: int = 0, products="exact"):
    """(y, dx, dw, x, w, g) of one forward and backward pass."""
    contraction, x_shape, w_shape = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(x_shape, generator=generator).to(dtype).requires_grad_()
    w = torch.randn(w_shape, generator=generator).to(dtype).requires_grad_()
    y = contract(x, w, contraction, LayerState(spec, 1, products=products))
    g = torch.randn(y.shape, generator=generator).to(dtype)
    dx, dw = torch.autograd.grad(y, (x, w), g)
    return y.detach(), dx, dw, x.detach(), w.detach(), g


@every_contraction
def test_nothing_quantized_equals_torch(case):
    y, dx, dw, x, w, g = run(case, LayerSpec())
    x, w = x.requires_grad_(), w.requires_grad_()
    expected = case[0].fprop(x, w)
    torch.testing.assert_close(y, expected.detach())
    for actual, wanted in zip((dx, dw), torch.autograd.grad(expected, (x, w), g), strict=True):
        torch.testing.assert_close(actual, wanted)


@every_contraction
def test_fast_derivatives_equal_the_default_by_bilinearity(case):
    contraction, x_shape, w_shape = case
    x, w = torch.randn(x_shape, dtype=torch.float64), torch.randn(w_shape, dtype=torch.float64)
    g = torch.randn_like(contraction.fprop(x, w))
    torch.testing.assert_close(contraction.dgrad(g, w, x), Contraction.dgrad(contraction, g, w, x))
    torch.testing.assert_close(contraction.wgrad(g, x, w), Contraction.wgrad(contraction, g, x, w))


STRIDED = """
import itertools, torch, fourbit as fb
from fourbit.recipes import catalog
torch.set_num_threads(1)
for rule, stride, channels, size in itertools.product(catalog.IBM2020.rules, (2, 3), range(2, 9), (6, 12)):
    layer = fb.nn.Conv2d(channels, 8, 1, stride=stride, spec=rule.spec)
    for _ in range(5):
        layer(torch.randn(2, channels, size, size)).square().sum().backward()
print("fine")
"""


def test_a_strided_convolution_of_one_pixel_leaves_the_heap_whole():
    """Under the checks of the C library, where it has them: torch's own gradient writes beyond it on some processors."""
    checks = "libc_malloc_debug.so"
    try:
        ctypes.CDLL(checks)
    except OSError:
        pytest.skip(f"this C library has no {checks}")
    environment = {**os.environ, "MALLOC_CHECK_": "3", "LD_PRELOAD": checks}
    ran = subprocess.run([sys.executable, "-c", STRIDED], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0 and ran.stdout == "fine\n", ran.stderr[-1000:]


CHANGES = {
    # slot: which of y, dx, dw may (and must) change when this slot alone is quantized
    "x_fprop": {"y", "dw"},
    "w_fprop": {"y", "dx"},
    "g_dgrad": {"dx"},
    "w_dgrad": {"dx"},
    "g_wgrad": {"dw"},
    "x_wgrad": {"dw"},
}


@every_contraction
@pytest.mark.parametrize("slot", SLOTS)
def test_each_slot_changes_exactly_the_results_that_it_enters(case, slot):
    plain = LayerSpec()
    exact = dict(zip(("y", "dx", "dw"), run(case, plain)[:3], strict=True))
    changed = dict(zip(("y", "dx", "dw"), run(case, replace(plain, **{slot: INT4}))[:3], strict=True))
    assert {name for name in exact if not torch.equal(exact[name], changed[name])} == CHANGES[slot]


@every_contraction
@pytest.mark.parametrize(("products", "error"), [("exact", 1e-5), ("fast", 2.0**-8)])
def test_all_six_slots_agree_with_a_float64_computation_from_the_quantized_operands(case, products, error):
    spec = LayerSpec(
        x_fprop=INT4,
        w_fprop=replace(INT4, format=formats.INT3_SYM),
        g_dgrad=FP4,
        w_dgrad=replace(INT4, format=formats.INT8_SYM),
        g_wgrad=replace(FP4, format=formats.FP4_R4_ODD),
        x_wgrad=replace(INT4, format=formats.FP4_E2M1),
    )
    y, dx, dw, x, w, g = run(case, spec, products=products)
    of = {"x": x, "w": w, "g": g}
    q = {slot: quantize(of[slot[0]], getattr(spec, slot)).dequantize().double() for slot in SLOTS}
    contraction = case[0]
    torch.testing.assert_close(y.double(), contraction.fprop(q["x_fprop"], q["w_fprop"]), rtol=1e-5, atol=1e-5)
    expected_dx = Contraction.dgrad(contraction, q["g_dgrad"], q["w_dgrad"], x.double())
    torch.testing.assert_close(dx.double(), expected_dx, rtol=error, atol=1e-5)
    expected_dw = Contraction.wgrad(contraction, q["g_wgrad"], q["x_wgrad"], w.double())
    torch.testing.assert_close(dw.double(), expected_dw, rtol=error, atol=1e-5)


@every_contraction
def test_channel_scales_agree_with_a_float64_computation(case):
    contraction = case[0]
    channel = QuantSpec(formats.INT4_SYM, Amax(), "channel")
    spec = LayerSpec(x_fprop=INT4, w_fprop=channel, g_dgrad=channel, w_dgrad=INT4, g_wgrad=channel, x_wgrad=channel)
    y, dx, dw, x, w, g = run(case, spec)

    def rounded(which, operand, t):
        orientation = contraction.orientation(which, operand, t.shape)
        q = quantize(orientation.of(t), channel, sums=(2, 3) if which != "dgrad" else (0, 1, 2))
        q = quantize(orientation.of(t).transpose(1, 3), channel, sums=(2, 3)) if which == "dgrad" else q
        m = q.dequantize().double()
        return orientation.back(m.transpose(1, 3) if which == "dgrad" else m)

    xq, wq, gq = quantize(x, INT4).dequantize().double(), rounded("fprop", "w", w), rounded("dgrad", "g", g)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(y.double(), contraction.fprop(xq, wq), **close)
    w_int4 = quantize(w, INT4).dequantize().double()
    torch.testing.assert_close(dx.double(), Contraction.dgrad(contraction, gq, w_int4, x.double()), **close)
    gq, xq = rounded("wgrad", "g", g), rounded("wgrad", "x", x)
    torch.testing.assert_close(dw.double(), Contraction.wgrad(contraction, gq, xq, w.double()), **close)


def test_the_paper_s_layer_follows_section_9_step_by_step():
    """g = s dy; dx = fp16(q_even(g) W^T) / s; dW = fp16(A^T q_odd(g)) / s, in float64 with pure-Python rounding."""
    spec = fb.recipes.get("ibm2020").rules[-1].spec
    state = LayerState(spec)
    x = torch.randn(6, 10).relu().requires_grad_()
    w = torch.randn(4, 10).requires_grad_()
    g = torch.randn(6, 4) * 1e-5
    y = contract(x, w, LinearMap(), state)
    y.backward(g)

    def each(format, t):
        return torch.tensor([format.round(v) for v in t.double().flatten().tolist()], dtype=torch.float64).view(t.shape)

    alpha, beta = float(state.x_alpha.detach()), float(quantize(w, spec.w_fprop).scale) * 7
    a = each(formats.UINT4, x.detach() * torch.tensor(alpha / 15).reciprocal())
    b = each(formats.INT4_SYM, w.detach() * torch.tensor(beta / 7).reciprocal())
    out = formats.FP16_169
    torch.testing.assert_close(y.double(), each(out, (a @ b.t() * (alpha / 15 * beta / 7))), rtol=2e-3, atol=1e-6)
    s = 2.0 ** int(state.g_exponent)
    assert 32 < float(g.abs().max()) * s <= 64
    even, odd = each(formats.FP4_R4_EVEN, g * s), each(formats.FP4_R4_ODD, g * s)
    inside = (x.detach() >= 0) & (x.detach() < alpha)
    dx = each(out, even @ b * (beta / 7)) / s * inside
    torch.testing.assert_close(x.grad.double(), dx, rtol=2e-3, atol=1e-12)
    dw = each(out, odd.t() @ a * (alpha / 15)) / s
    torch.testing.assert_close(w.grad.double(), dw, rtol=2e-3, atol=1e-12)


def test_int4_products_are_exact():
    """Integer sums fit float32: the order of summation cannot matter."""
    spec = LayerSpec(x_fprop=INT4, w_fprop=INT4)
    x, w = torch.randn(64, 2048), torch.randn(32, 2048)
    y = Q.linear(x, w, None, spec)
    xq, wq = quantize(x, INT4), quantize(w, INT4)
    exact = (xq.q.double() @ wq.q.double().t()).float() * (xq.scale * wq.scale)
    assert torch.equal(y, exact)


@pytest.mark.parametrize("output", [None, formats.FP16_169, formats.BFLOAT16, formats.BINARY16])
def test_results_are_rounded_to_the_output_format(output):
    spec = LayerSpec(output=output)
    y, dx, dw, *_ = run(CASES["linear"], spec)
    exact_y, exact_dx, exact_dw, *_ = run(CASES["linear"], LayerSpec())
    for actual, exact in ((y, exact_y), (dx, exact_dx), (dw, exact_dw)):
        wanted = fb.round_to_format(exact, output) if output else exact
        assert torch.equal(actual, wanted)


def test_pact_gradients_equal_autograd_of_the_straight_through_expression():
    spec = LayerSpec(x_fprop=QuantSpec(formats.UINT4, ClipValue(init=1.5, signed_format=None)))
    state = LayerState(spec)
    x, w = torch.randn(20, 8).requires_grad_(), torch.randn(3, 8).requires_grad_()
    g = torch.randn(20, 3)
    contract(x, w, LinearMap(), state).backward(g)
    alpha = torch.tensor(1.5, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    clipped = torch.where(x2 >= alpha, alpha, x2.clamp(min=0))
    scale = alpha.detach() / 15
    rounded = clipped + ((clipped / scale).round() * scale - clipped).detach()
    F.linear(rounded, w.detach()).backward(g)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(state.x_alpha.grad, alpha.grad.view(1))


@pytest.mark.parametrize("signed", [False, True])
def test_pact_s_clip_gradient_equals_finite_differences_where_rounding_is_fine(signed):
    """With 16 bits instead of 4 the rounding error vanishes and the straight-through gradient is the true one."""
    fine = (
        formats.IntFormat("fine", width=16, low=-32767, high=32767)
        if signed
        else formats.IntFormat("fine", width=16, low=0, high=65535)
    )
    spec = LayerSpec(x_fprop=QuantSpec(fine, ClipValue(init=1.0, signed_format=None)))
    x, w, g = torch.randn(200, 8) + 0.5, torch.rand(3, 8), torch.rand(200, 3)  # no cancellation in the sum

    def loss(alpha: float, backward: bool = False) -> float:
        state = LayerState(spec)
        with torch.no_grad():
            state.x_alpha.fill_(alpha)
        value = (contract(x, w, LinearMap(), state) * g).sum()
        if backward:
            value.backward()
            return float(state.x_alpha.grad)
        return float(value.double())

    step = 0.01
    assert loss(1.0, backward=True) == pytest.approx((loss(1 + step) - loss(1 - step)) / (2 * step), rel=0.05)


def test_clipped_sawb_zeroes_the_gradient_of_clipped_weights_and_plain_sawb_passes_it():
    x, w = torch.randn(30, 64), torch.randn(16, 64)
    for clipped in (True, False):
        weight = w.clone().requires_grad_()
        Q.linear(
            x, weight, None, LayerSpec(w_fprop=QuantSpec(formats.INT4_SYM, Sawb(clipped=clipped)))
        ).sum().backward()
        alpha = quantize(w, QuantSpec(formats.INT4_SYM, Sawb())).scale * 7
        outside = w.abs() > alpha
        assert outside.any()
        assert bool((weight.grad[outside] == 0).all()) == clipped


def test_reuse_where_the_scale_varies_along_the_summed_axis_is_refused_with_the_remedy():
    channel = QuantSpec(formats.INT4_SYM, Amax(), "channel")
    with pytest.raises(UserError, match=r"write w_dgrad=QuantSpec"):
        LayerSpec(w_fprop=channel, g_dgrad=INT4)
    LayerSpec(w_fprop=channel, w_dgrad=INT4, g_dgrad=INT4)
    LayerSpec(w_fprop=channel)  # a product in full precision takes any numbers


@pytest.mark.parametrize(
    "kwargs",
    [
        {"x_fprop": REUSE},
        {"g_dgrad": REUSE},
        {"g_dgrad": QuantSpec(formats.UINT4, ClipValue())},
        {"x_fprop": QuantSpec(formats.FP4_R2, GradScale())},
        {"x_fprop": "int4"},
        {"x_wgrad": QuantSpec(formats.UINT4, ClipValue())},
        {"g_dgrad": QuantSpec(formats.FP4_R2, GradScale()), "g_wgrad": QuantSpec(formats.FP4_R2, GradScale(max=32.0))},
    ],
)
def test_contradictory_specs_are_refused_in_one_sentence(kwargs):
    with pytest.raises(UserError) as error:
        LayerSpec(**kwargs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_keep_the_dtype_of_the_inputs(dtype):
    spec = fb.recipes.get("ibm2020").rules[-1].spec
    y, dx, dw, *_ = run(CASES["conv2d"], spec, dtype)
    assert y.dtype == dx.dtype == dw.dtype == dtype
    assert all(t.isfinite().all() and t.abs().sum() > 0 for t in (y, dx, dw))


def test_only_the_gradients_that_are_needed_are_computed():
    spec = fb.recipes.get("ibm2020").rules[-1].spec
    for need_x, need_w in itertools.product((True, False), repeat=2):
        x, w = torch.randn(3, 5, requires_grad=need_x), torch.randn(2, 5, requires_grad=need_w)
        contract(x, w, LinearMap(), LayerState(spec)).sum().backward()
        assert (x.grad is not None) == need_x and (w.grad is not None) == need_w


def test_empty_batches_give_empty_results_and_zero_gradients():
    spec = fb.recipes.get("ibm2020").rules[-1].spec
    layer = fb.nn.Conv2d(3, 4, 3, padding=1, spec=spec)
    x = torch.zeros(0, 3, 5, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (0, 4, 5, 5) and x.grad.shape == x.shape and not layer.weight.grad.any()
    assert int(layer.quant.g_exponent) == fb.quantizers.UNSET


def test_functional_and_module_twins_agree():
    spec = LayerSpec(x_fprop=INT4, w_fprop=INT4, g_dgrad=FP4, g_wgrad=FP4)
    layer = fb.nn.Linear(6, 4, spec=spec)
    x = torch.randn(5, 6)
    assert torch.equal(layer(x), Q.linear(x, layer.weight, layer.bias, spec))
    conv = fb.nn.Conv2d(3, 4, 3, padding=1, stride=2, spec=spec)
    image = torch.randn(2, 3, 6, 6)
    assert torch.equal(conv(image), Q.conv(image, conv.weight, conv.bias, spec, stride=2, padding=1))
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    assert torch.equal(fb.nn.MatMul(spec=spec)(a, b), Q.matmul(a, b, spec))
    assert isinstance(fb.nn.MatMul(spec=spec), nn.Module)


def test_the_clip_gradient_of_an_asymmetric_format_is_a_sum_of_signs():
    spec = LayerSpec(x_fprop=QuantSpec(formats.INT4, ClipValue(init=1.0)))
    state = LayerState(spec)
    contract(torch.tensor([[-3.0, 3.0, 0.1]]), torch.tensor([[1.0, 2.0, 4.0]]), LinearMap(), state).sum().backward()
    assert float(state.x_alpha.grad) == -1.0 + 2.0


def test_a_clipped_operand_that_is_a_mean_of_samples_has_its_mask_and_clip_gradient():
    spec = LayerSpec(x_fprop=QuantSpec("uint4", ClipValue(1.0, None), rounding=fb.Rounding.STOCHASTIC, samples=2))
    state = LayerState(spec)
    x = torch.tensor([[-3.0, 3.0, 0.5]], requires_grad=True)
    contract(x, torch.tensor([[1.0, 2.0, 4.0]]), LinearMap(), state).sum().backward()
    assert x.grad.tolist() == [[0.0, 0.0, 4.0]] and float(state.x_alpha.grad) == 2.0


def test_clipping_is_decided_in_float32_for_half_precision_inputs():
    spec = LayerSpec(x_fprop=QuantSpec(formats.UINT4, ClipValue(init=1.003)))
    x = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    contract(x, torch.ones(1, 1), LinearMap(), LayerState(spec)).sum().backward()
    assert float(x.grad) == 1.0


def test_infinity_in_a_full_precision_operand_is_not_saturated_by_the_output_format():
    layer = fb.nn.Linear(2, 1, bias=False, spec=LayerSpec(output=formats.FP16_169))
    assert layer(torch.tensor([[float("inf"), 0.0]])).isinf().all()
    assert layer.quant.nonfinite.tolist() == [1, 0, 0]


def test_bad_gradients_are_counted_where_the_gradient_is_not_quantized_too():
    layer = fb.nn.Linear(2, 1, spec=fb.recipes.get("int4-fwd").rules[-1].spec)
    layer(torch.rand(3, 2)).backward(torch.full((3, 1), float("nan")))
    assert layer.quant.nonfinite[2] > 0


def test_functional_calls_without_a_state_refuse_stochastic_rounding():
    spec = fb.recipes.get("luq").rules[-1].spec
    with pytest.raises(UserError, match="pass state="):
        Q.linear(torch.rand(2, 3), torch.rand(4, 3), None, spec)


@pytest.mark.parametrize("packs", [False, True])
def test_an_operand_of_several_products_is_brought_into_a_dtype_once(packs):
    q = torch.tensor([[-7, 0, 3]], dtype=torch.int8)
    kept = pack(q, formats.INT4_SYM) if packs else q
    operand = Operand(kept, cache={})
    assert operand.to(torch.float32) is operand.to(torch.float32)
    assert torch.equal(operand.to(torch.float32), q.float())
    assert operand.to(torch.bfloat16).dtype == torch.bfloat16
    assert Operand(kept).to(torch.float32) is not Operand(kept).to(torch.float32)
