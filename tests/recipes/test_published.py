"""Published recipes against their arithmetic written out: in float64, number by number, from the definitions in pure Python."""

import dataclasses

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.formats import HIF4
from fourbit.ops._quantize import rotation_key
from fourbit.quantizers import Hadamard


def layer(recipe: str, features: int = 128, out: int = 64) -> nn.Linear:
    """The first of two layers, which is not the last."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, out, bias=False), nn.Linear(out, 4))
    return fb.convert(model, recipe)[0]


def rounded(t: torch.Tensor) -> torch.Tensor:
    """Rows in HiFloat4, by the definition."""
    return torch.tensor(HIF4.round(t.tolist()), dtype=torch.float64)


def test_hifloat4_rounds_all_operands_to_nearest_and_rotates_the_backward_ones():
    q = layer("hifloat4")
    torch.manual_seed(1)
    x, g = torch.randn(192, 128, requires_grad=True), torch.randn(192, 64)
    y = q(x)
    y.backward(g)
    w = q.weight.detach()
    torch.testing.assert_close(y.double(), rounded(x) @ rounded(w).T, rtol=1e-5, atol=1e-4)
    for which, ours, a, b in (("dgrad", x.grad, g, w.T), ("wgrad", q.weight.grad, g.T, x.detach().T)):
        turn, key = Hadamard(64, "fresh"), rotation_key(q.quant, which)
        exact = rounded(turn.apply(a.contiguous(), key)) @ rounded(turn.apply(b.contiguous(), key)).T
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("recipe", ["hifloat4", "fp4-dge-occ"])
def test_a_compiled_layer_computes_the_same(recipe):
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        q = layer(recipe)
        call = torch.compile(q, backend="aot_eager", fullgraph=True) if compiled else q
        torch.manual_seed(1)
        x = torch.randn(40, 128, requires_grad=True)
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, q.weight.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def e2m1_rows(t: torch.Tensor) -> torch.Tensor:
    """Each row in E2M1 with a scale of its own, float64."""
    from fourbit.formats import FP4_E2M1

    rows = []
    for row in t.tolist():
        scale = float(torch.tensor(max(map(abs, row)), dtype=torch.float32) / 6)
        rows.append([FP4_E2M1.round(v / scale) * scale for v in row])
    return torch.tensor(rows, dtype=torch.float64)


def power_curve(x: float) -> float:
    """f'(x) of the paper on the intervals of E2M1, by cases."""
    magnitude = min(abs(x), 6.0)
    low, width = next(
        (a, b - a) for a, b in ((4, 6), (3, 4), (2, 3), (1.5, 2), (1, 1.5), (0.5, 1), (0, 0.5)) if magnitude >= a
    )
    u = abs(2 * (magnitude - low) / width - 1)
    return min(3.0, 0.2 * u**-0.8) if u else 3.0


def test_fp4_dge_occ_clamps_tokens_and_multiplies_dw_by_the_slope():
    q = layer("fp4-dge-occ", 200, 24)
    torch.manual_seed(1)
    x = torch.randn(40, 200)
    x[3, 5], x[7, 9] = 40.0, -60.0
    x.requires_grad_()
    g = torch.randn(40, 24)
    y = q(x)
    y.backward(g)
    w, t = q.weight.detach().double(), x.detach()
    ordered = t.sort(1).values
    inside = t.clamp(ordered[:, 2:3], ordered[:, 198:199])  # int(0.01 * 200) and int(0.99 * 200)
    assert int((inside != t).sum()) == 40 * 3
    expected = (e2m1_rows(inside) + (t - inside).double()) @ e2m1_rows(w).T
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), g.double() @ w, rtol=1e-5, atol=1e-5)
    scales = w.abs().amax(1) / 6
    slope = torch.tensor(
        [[power_curve(v / s) for v in row] for row, s in zip(w.tolist(), scales.tolist(), strict=True)]
    )
    torch.testing.assert_close(q.weight.grad.double(), g.double().T @ t.double() * slope, rtol=2e-4, atol=1e-3)
    assert slope.min() >= 0.199 and slope.max() == 3.0


def test_slopes_of_all_formats_are_those_of_the_definition():
    for format in (fb.formats.get(name) for name in ("fp4_e2m1", "int4_sym", "uint4", "fp4_r4_even", "int4_midrise")):
        x = torch.linspace(format.min * 1.1, format.max * 1.1, 997)
        expected = torch.tensor([format.slope(v, 3.0, 2.5) for v in x.tolist()])
        torch.testing.assert_close(fb.quantizers.DGE(3.0, 2.5).slope(x, format), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.LSTM])
def test_estimator_and_outliers_hold_in_other_layers_too(kind):
    """A convolution of one pixel and an LSTM of one step are linear layers."""
    spec = fb.recipes.get("fp4-dge-occ").rules[-1].spec
    recipe = fb.Recipe("mine", (fb.Rule(spec),))
    torch.manual_seed(0)
    if kind is nn.Conv2d:
        other, x = nn.Conv2d(64, 12, 1), torch.randn(20, 64, requires_grad=True)
        weight, run = other.weight.view(12, 64), lambda m: m(x[:, :, None, None]).flatten(1)
    else:
        other, x = nn.LSTM(64, 3), torch.randn(20, 64, requires_grad=True)
        weight, run = other.weight_ih_l0, lambda m: m(x[None])[0][0]
    linear = fb.convert(nn.Sequential(nn.Linear(64, 12)), recipe)[0]
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(other.bias if kind is nn.Conv2d else other.bias_ih_l0 + other.bias_hh_l0)
    plain = linear(x)
    if kind is nn.LSTM:
        i, _, c, o = plain.chunk(4, 1)
        plain = o.sigmoid() * (i.sigmoid() * c.tanh()).tanh()
    plain.square().sum().backward()
    dx, x.grad = x.grad, None
    fb.convert(other, recipe)
    y = run(other)
    y.square().sum().backward()
    torch.testing.assert_close(y, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, dx, rtol=1e-4, atol=1e-4)
    dw = other.weight.grad.view(12, 64) if kind is nn.Conv2d else other.weight_ih_l0.grad
    torch.testing.assert_close(dw, linear.weight.grad, rtol=1e-3, atol=1e-3)


def test_estimators_and_outliers_where_they_cannot_be_are_refused():
    e2m1 = fb.recipes.get("fp4-forward").rules[-1].spec.x_fprop
    beyond, curved = (
        dataclasses.replace(e2m1, **more) for more in ({"outliers": 0.99}, {"estimator": fb.quantizers.DGE()})
    )
    for make, says in (
        (lambda: fb.LayerSpec(beyond, e2m1), "x_wgrad: fprop has x without its outliers"),
        (lambda: fb.LayerSpec(e2m1, beyond, x_wgrad=None), "outliers are those of x_fprop"),
        (lambda: fb.LayerSpec(beyond, e2m1, x_wgrad=None, output="fp16_169"), "leave output and accumulation out"),
        (lambda: fb.LayerSpec(curved, e2m1), "give it to w_fprop"),
        (lambda: dataclasses.replace(e2m1, outliers=1.5), "a quantile between 0.5 and 1"),
        (lambda: dataclasses.replace(beyond, transform=Hadamard(16)), "without a transform or a clip value"),
        (lambda: dataclasses.replace(curved, transform=Hadamard(16)), "neither rotated nor clipped"),
        (lambda: fb.quantizers.DGE(k=0.5), "DGE has k >= 1"),
    ):
        with pytest.raises(fb.UserError, match=says):
            make()
