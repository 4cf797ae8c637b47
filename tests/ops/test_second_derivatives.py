"""Gradient penalties through quantized layers against straight-through expressions in float64, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

import fourbit as fb
from fourbit import backends, formats
from fourbit.errors import UserError
from fourbit.ops import Contraction, Convolution, LayerSpec, LayerState, LinearMap, contract
from fourbit.quantizers import ClipValue, GradScale, QuantSpec, Sawb

SPEC = LayerSpec(
    x_fprop=QuantSpec(formats.UINT4, ClipValue(init=1.5)),
    w_fprop=QuantSpec(formats.INT4_SYM, Sawb(clipped=True)),
    g_dgrad=QuantSpec(formats.FP4_R4_EVEN, GradScale()),
    g_wgrad=QuantSpec(formats.FP4_R4_ODD, GradScale()),
)
MAPS = {
    "linear": (LinearMap(), (6, 7), (4, 7)),
    "convolution": (Convolution((2, 1), (1, 2), (1, 1)), (2, 3, 7, 6), (4, 3, 3, 3)),
    "grouped": (Convolution((1, 1), (1, 1), (1, 1), 2), (2, 4, 5, 5), (6, 2, 3, 3)),
    "transposed": (Convolution((2,), (1,), (1,), 1, True, (1,)), (2, 3, 5), (3, 4, 3)),
}


def straight(t: Tensor, rounded: Tensor, inside: Tensor | None = None) -> Tensor:
    """The numbers of `rounded` with the gradient of t, where inside."""
    passing = t if inside is None else torch.where(inside, t, t.detach())
    return passing + (rounded.double() - passing).detach()


def rounded_weight(w: Tensor, spec: QuantSpec) -> Tensor:
    q = fb.quantize(w.detach().float(), spec)
    return straight(w, q.dequantize(), w.detach().abs() <= float(q.scale) * spec.format.max)


def rounded_input(x: Tensor, state: LayerState) -> tuple[Tensor, Tensor]:
    """Quantized under the layer's clip value, in the form it has; and where the gradient passes."""
    format = formats.INT4_SYM if state.x_form[1] else formats.UINT4
    alpha = state.x_alpha.detach()
    q = fb.quantize(x.detach().float(), SPEC.x_fprop, stored=alpha, format=format).dequantize()
    inside = (x.detach() < alpha) & (x.detach() > -alpha if format.signed else x.detach() >= 0)
    return straight(x, q, inside), inside


def rounded_gradient(g: Tensor, state: LayerState) -> Tensor:
    return straight(g, fb.quantize(g.detach().float(), SPEC.g_dgrad, stored=state.g_exponent).dequantize())


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("case", MAPS.values(), ids=MAPS.keys())
def test_the_gradient_of_an_input_is_differentiable_in_weight_and_gradient(case, kernels):
    contraction, x_shape, w_shape = case
    x, w = torch.randn(x_shape, requires_grad=True), torch.randn(w_shape, requires_grad=True)
    state = LayerState(SPEC, products="exact")
    with backends.without("cpu") if not kernels else torch.enable_grad():
        y = contract(x, w, contraction, state)
        g = torch.randn_like(y, requires_grad=True)
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        found = torch.autograd.grad(dx.square().sum(), (g, w))
        (alone,) = torch.autograd.grad(contract(x, w, contraction, state), x, g)
    assert torch.equal(dx, alone)
    x64, w64, g64 = (t.detach().double().requires_grad_() for t in (x, w, g))
    _, inside = rounded_input(x64, state)
    expected = Contraction.dgrad(
        contraction, rounded_gradient(g64, state), rounded_weight(w64, SPEC.w_fprop), x64.detach()
    )
    expected = torch.where(inside, expected, 0.0)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(found, torch.autograd.grad(expected.square().sum(), (g64, w64)), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4)


def test_a_gradient_penalty_trains_the_weights_of_a_network_as_straight_through_mathematics_says():
    """Without rounding of gradients, which the backward pass of the penalty would apply as any other does."""
    spec = replace(SPEC, g_dgrad=None, g_wgrad=None)
    first, second = fb.nn.Linear(7, 9, spec=spec), fb.nn.Linear(9, 1, bias=False, spec=spec)
    x = torch.rand(5, 7, requires_grad=True)
    (dx,) = torch.autograd.grad(second(torch.tanh(first(x))).sum(), x, create_graph=True)
    (dx.norm(dim=1) - 1).square().mean().backward()

    w, v, b = (p.detach().double().requires_grad_() for p in (first.weight, second.weight, first.bias))
    x_hat, inside = rounded_input(x.detach().double(), first.quant)
    w_hat, v_hat = (rounded_weight(t, SPEC.w_fprop) for t in (w, v))
    h = torch.tanh(F.linear(x_hat, w_hat, b))
    _, inside_h = rounded_input(h, second.quant)
    dh = torch.where(inside_h, torch.ones(5, 1, dtype=torch.float64) @ v_hat, 0.0)
    expected = torch.where(inside, (dh * (1 - h * h)) @ w_hat, 0.0)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-4, atol=1e-6)
    wanted = torch.autograd.grad((expected.norm(dim=1) - 1).square().mean(), (w, v, b))
    for mine, theirs in zip((first.weight, second.weight, first.bias), wanted, strict=True):
        assert theirs.abs().sum() > 0
        torch.testing.assert_close(mine.grad.double(), theirs, rtol=1e-3, atol=1e-5)


def ready(recipe: str, *layers: nn.Module) -> nn.Module:
    rule = fb.Rule(fb.recipes.get(recipe).rules[-1].spec)
    return fb.convert(nn.Sequential(*layers), fb.Recipe("all alike", (rule,)))


def penalty(model: nn.Module, x: Tensor, of) -> Tensor:
    y = model(x)
    y = y[0] if isinstance(y, tuple) else y
    return torch.autograd.grad(y.square().sum(), of, create_graph=True)[0].square().sum()


def test_the_gradient_of_a_weight_has_its_value_with_create_graph_and_is_refused_after_that():
    layer = ready("int4-fwd", nn.Linear(5, 3))
    x = torch.rand(4, 5)
    plain = torch.autograd.grad(layer(x).square().sum(), layer[0].weight)[0]
    again = torch.autograd.grad(layer(x).square().sum(), layer[0].weight, create_graph=True)[0]
    assert torch.equal(plain, again)
    with pytest.raises(UserError, match="inputs only"):
        again.square().sum().backward()


@pytest.mark.parametrize(
    ("layers", "shape", "message"),
    [
        ((nn.LSTM(4, 4),), (3, 2, 4), "recurrent layer"),
        (
            (nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3)),
            (2, 16, 7, 7),
            "fuse",
        ),
    ],
    ids=["recurrent", "chain"],
)
def test_what_is_differentiable_once_says_so(layers, shape, message):
    model = ready("int4-fwd", *layers)
    x = torch.randn(shape, requires_grad=True)
    with backends.without("cpu") if message == "recurrent layer" else torch.enable_grad():
        penalty(model, x, x)
        if message == "fuse" and backends.OPERATIONS["norm_supported"](x, None) is None:
            pytest.skip("no backend has the kernels of chains")
        with pytest.raises(UserError, match=message):
            penalty(model, x, x).backward()


def test_a_weight_that_is_gone_is_named_and_one_that_is_not_asked_for_does_not_matter():
    spec, x = fb.recipes.get("int4-fwd").rules[-1].spec, torch.rand(3, 5, requires_grad=True)
    raw = torch.randn(2, 5, requires_grad=True)
    y = contract(x, raw * 2, LinearMap(), LayerState(spec))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(UserError, match="keep a reference"):
        dx.square().sum().backward()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda t: f(t).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacrev(f)(x),
    ],
    ids=["vmap", "grad", "jvp", "jacrev"],
)
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.GRU(4, 4)], ids=["linear", "gru"])
def test_transforms_of_torch_func_are_refused_in_one_sentence(layer, transform):
    model = ready("int4-fwd", copy.deepcopy(layer))
    with pytest.raises(UserError, match=r"torch\.func"):
        transform(lambda x: model(x) if isinstance(layer, nn.Linear) else model(x)[0], torch.rand(2, 3, 4))


def test_forward_mode_is_refused_in_one_sentence():
    model = ready("int4-fwd", nn.Linear(4, 4))
    with forward_ad.dual_level(), pytest.raises(UserError, match="forward mode"):
        model(forward_ad.make_dual(torch.rand(2, 4), torch.ones(2, 4)))
