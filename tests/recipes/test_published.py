"""Published recipes against their arithmetic written out: in float64, number by number, from the definitions in pure Python."""

import pytest
import torch
from torch import nn

import fourbit as fb
from fourbit.formats import HIF4
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
        turn, key = Hadamard(64, "fresh"), q.quant.rotation_key(which)
        exact = rounded(turn.apply(a.contiguous(), key)) @ rounded(turn.apply(b.contiguous(), key)).T
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("recipe", ["hifloat4"])
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
