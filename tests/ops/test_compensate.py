"""What rounding loses of a gradient, given back to its products, against float64."""

import pytest
import torch
from torch.nn import functional as F

from fourbit import LayerSpec, QuantSpec, nn
from fourbit.errors import UserError
from fourbit.formats import FP4_R4_EVEN, FP4_R4_ODD
from fourbit.ops import REUSE, LinearMap
from fourbit.ops._compensate import compensated
from fourbit.quantizers import GradScale, quantize, request_for, run


def _spec(compensate: str) -> LayerSpec:
    even, odd = (QuantSpec(f, GradScale(), compensate=compensate) for f in (FP4_R4_EVEN, FP4_R4_ODD))
    return LayerSpec(g_dgrad=even, g_wgrad=odd)


def _rounded(g: torch.Tensor, spec: QuantSpec, exponent: torch.Tensor) -> torch.Tensor:
    return quantize(g, QuantSpec(spec.format, spec.scaling), stored=exponent).dequantize().double()


@pytest.mark.parametrize("compensate", ["magnitude", "sum"])
def test_products_of_a_linear_layer(compensate):
    torch.manual_seed(0)
    spec = _spec(compensate)
    layer = nn.Linear(24, 16, bias=False, spec=spec)
    x, g = torch.randn(64, 24, requires_grad=True), torch.randn(64, 16) + 0.5
    layer(x).backward(g)
    exponent = layer.quant.g_exponent
    for which, slot in (("dx", spec.g_dgrad), ("dw", spec.g_wgrad)):
        q = _rounded(g, slot, exponent)
        if compensate == "magnitude":
            q = q * (g.double().square().sum() / (g.double() * q).sum())
        else:
            q = q + (g.double() - q).mean(0)
            assert torch.allclose(q.sum(0), g.double().sum(0))
        expected = q @ layer.weight.double() if which == "dx" else q.T @ x.double()
        found = x.grad if which == "dx" else layer.weight.grad
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_magnitude_restores_the_projection_of_the_weight_gradient():
    torch.manual_seed(1)
    g = torch.randn(512, 8)
    x = g @ torch.randn(8, 32)
    projections = {}
    for compensate in ("", "magnitude"):
        layer = nn.Linear(32, 8, bias=False, spec=_spec(compensate))
        layer(x).backward(g)
        exact = g.T @ x
        projections[compensate] = float((layer.weight.grad * exact).sum() / exact.square().sum())
    assert projections[""] < 0.95
    assert abs(projections["magnitude"] - 1) < 0.02


def test_a_convolution_sums_over_its_own_channels():
    torch.manual_seed(2)
    even = QuantSpec(FP4_R4_EVEN, GradScale(), compensate="sum")
    layer = nn.Conv2d(3, 5, 3, padding=1, bias=False, spec=LayerSpec(g_dgrad=even, g_wgrad=REUSE))
    x, g = torch.randn(4, 3, 8, 8, requires_grad=True), torch.randn(4, 5, 8, 8) + 0.3
    layer(x).backward(g)
    q = _rounded(g, even, layer.quant.g_exponent)
    q = q + (g.double() - q).mean((0, 2, 3), keepdim=True)
    x64, w64 = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    F.conv2d(x64, w64, padding=1).backward(q)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(layer.weight.grad.double(), w64.grad, rtol=1e-4, atol=1e-4)


def test_a_gradient_of_zeros_and_one_that_underflows():
    layer = nn.Linear(4, 4, bias=False, spec=_spec("magnitude"))
    x = torch.ones(2, 4)
    layer(x).backward(torch.zeros(2, 4))
    assert torch.equal(layer.weight.grad, torch.zeros(4, 4))
    layer(x).backward(torch.full((2, 4), 1e-3))
    layer(x).backward(torch.full((2, 4), 1e-9))
    assert layer.weight.grad.isfinite().all()


def test_squares_of_tiny_gradients_do_not_underflow():
    spec = QuantSpec(FP4_R4_EVEN, GradScale(), compensate="magnitude")
    g = torch.randn(64, 8) * 1e-24
    quantized = compensated(g, run(request_for(g, spec, None, torch.tensor(84))), spec, LinearMap()).tensor
    found = quantized.q.double() * quantized.scale.double()
    assert float((found * g.double()).sum() / g.double().square().sum()) == pytest.approx(1, abs=1e-3)


def test_only_gradients_are_compensated():
    with pytest.raises(UserError, match="compensate='magnitude' is for gradients"):
        LayerSpec(x_fprop=QuantSpec("int4_sym", compensate="magnitude"))
    with pytest.raises(UserError, match="compensate must be"):
        QuantSpec("int4_sym", compensate="everything")
